"""Reads and writes directories of BioNeMo 2 and NeMo 2: ``context/`` (configuration), ``weights/`` (tensors).

The layout is that of NeMo 2.4, ``nemo/lightning/io``, and the names are those of BioNeMo framework 2.7,
``bionemo-esm2``. That model has the tanh form of GELU in its feed-forward layers (Megatron-Core's fused bias
and GELU) unless its configuration says otherwise. It computes its rotary frequencies, and has no contact
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esm2mega.convert.files.distributed_writer import write_distributed
from esm2mega.convert.files.nemo_context import CONTEXT, IO_FILE, read_model_config, write_model_config
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import DistributedStore
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, flag_from, shape_from
from esm2mega.convert.name_table import BODY, OUTPUT_BIAS, TABLE, NameTable, TableRow, padded_vocabulary
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import OutputReader, outputs
from esm2mega.errors import UserError
from esm2mega.model.esm2 import VOCAB_SIZE

IS_DIRECTORY = True
FAMILIES = ("esm2",)
_WEIGHTS = "weights"
_PREFIX = "module."

_ROWS = 128
"""BioNeMo pads its vocabulary to a multiple of this number, and cuts or fills it under tensor parallelism."""

_PADDING_BIAS = -10000.0
"""With this bias padding has no share of any softmax; Megatron-Core masks with it, and fp16 can hold it."""

_DIMENSIONS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_EPSILON, _TANH, _INTERLEAVED = "layernorm_epsilon", "bias_activation_fusion", "rotary_interleaved"

NAMES = NameTable(
    rows=(
        TableRow(TABLE, TABLE, padded_vocabulary(_ROWS)),
        *(TableRow(name, name) for name in BODY),
        TableRow(OUTPUT_BIAS, OUTPUT_BIAS, padded_vocabulary(_ROWS, _PADDING_BIAS)),
    ),
    tied={"output_layer.weight": False},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory of NeMo 2."""
    return (source.path / CONTEXT).is_dir() and (source.path / _WEIGHTS).is_dir()


def read(source: SourceFiles, drop: Sequence[str] = ()) -> Weights:
    """Read the weights; objects of Transformer Engine and of the optimizer beside them are not opened."""
    description, store = open_directory(source.path)
    return from_store(store, NAMES, description, drop=drop)


def open_directory(path: Path) -> tuple[Description, DistributedStore]:
    """Open a directory: its description and whole tensors, one per layer, under names without ``module.``."""
    file = path / CONTEXT / IO_FILE
    config = read_model_config(file, (*_DIMENSIONS, _EPSILON, _TANH, _INTERLEAVED))
    shape = shape_from(file, config, *_DIMENSIONS)
    if flag_from(file, config, _INTERLEAVED, False):
        raise UserError(f"{file}: {_INTERLEAVED} is on, which this version does not read")
    tanh = flag_from(file, config, _TANH, True)
    epsilon = epsilon_from(file, config, _EPSILON, 1e-5)
    description = Description(shape, epsilon, "gelu_tanh" if tanh else "gelu")
    if not (path / _WEIGHTS / ".metadata").is_file():
        raise UserError(f"{path / _WEIGHTS}: not in the torch_dist format (.metadata is missing)")
    return description, DistributedStore(path, _WEIGHTS, prefix=_PREFIX)


def write(weights: Weights, path: Path) -> None:
    """Write configuration and weights, without an optimizer, for ``initial_ckpt_path`` of BioNeMo 2."""
    description, notes = weights.description, weights.notes
    tanh = description.activation == "gelu_tanh"
    if not tanh:
        notes.changed.append(
            "feed-forward GELU: erf in the source, which io.json says; BioNeMo 2 does not take it from there "
            "and computes tanh unless its own configuration has bias_activation_fusion=False"
        )
    notes.filled.append(
        f"{_ROWS - VOCAB_SIZE} rows of vocabulary padding: zeros, and {_PADDING_BIAS:g} in the bias, so that "
        "they have no probability"
    )
    planned = outputs(weights, NAMES)
    infos = {name: output.info for name, output in planned.items()}
    reader = OutputReader(weights, planned)
    write_distributed(path / _WEIGHTS, infos, reader, description.shape.num_layers, _PREFIX)
    config = {
        **description.shape._asdict(),
        _EPSILON: description.layernorm_epsilon,
        _TANH: tanh,
        "make_vocab_size_divisible_by": _ROWS,
    }
    write_model_config(path / CONTEXT, config)
