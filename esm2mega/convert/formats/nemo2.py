"""Reads directories of BioNeMo 2 and NeMo 2: ``context/`` (configuration) and ``weights/`` (tensors).

The layout is that of NeMo 2.4, ``nemo/lightning/io``, and the names are those of BioNeMo framework 2.7,
``bionemo-esm2``. That model has the tanh form of GELU in its feed-forward layers (Megatron-Core's fused bias
and GELU) and computes its rotary frequencies; it has no contact head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import DistributedStore
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, flag_from, shape_from
from esm2mega.convert.name_table import BODY, OUTPUT_BIAS, TABLE, VOCABULARY, NameTable, TableRow
from esm2mega.convert.reading import from_store
from esm2mega.errors import UserError
from esm2mega.files import parse_json

IS_DIRECTORY = True
_CONTEXT, _WEIGHTS = "context", "weights"

NAMES = NameTable(
    rows=(
        TableRow(TABLE, TABLE, VOCABULARY),
        *(TableRow(name, name) for name in BODY),
        TableRow(OUTPUT_BIAS, OUTPUT_BIAS, VOCABULARY),
    ),
    tied={"output_layer.weight": False},
)


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a directory of NeMo 2."""
    return (source.path / _CONTEXT).is_dir() and (source.path / _WEIGHTS).is_dir()


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read the weights; objects of Transformer Engine and of the optimizer beside them are not opened."""
    description, store = open_directory(source.path)
    return from_store(store, NAMES, description, drop=drop, partial=partial)


def open_directory(path: Path) -> tuple[Description, DistributedStore]:
    """Open a directory: its description and whole tensors, one per layer, under names without ``module.``."""
    file = path / _CONTEXT / "io.json"
    config = _model_config(file)
    shape = shape_from(file, config, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    if flag_from(file, config, "rotary_interleaved", False):
        raise UserError(f"{file}: rotary_interleaved is on, which this version does not read")
    tanh = flag_from(file, config, "bias_activation_fusion", True)
    epsilon = epsilon_from(file, config, "layernorm_epsilon", 1e-5)
    description = Description(shape, epsilon, "gelu_tanh" if tanh else "gelu")
    if not (path / _WEIGHTS / ".metadata").is_file():
        raise UserError(f"{path / _WEIGHTS}: not in the torch_dist format (.metadata is missing)")
    return description, DistributedStore(path, _WEIGHTS, prefix="module.")


_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "layernorm_epsilon",
    "bias_activation_fusion",
    "rotary_interleaved",
)


def _model_config(file: Path) -> dict[str, Any]:
    """Return the keys above from the object in ``io.json`` that has a number of layers and of heads.

    The file is a serialised object graph: every object has ``items``, pairs of ``Attr(name='KEY')`` and a
    value, which is ``{"type": "leaf", "value": …}`` for plain values. It is read as data; no object is
    constructed.
    """
    try:
        objects = [dict(_leaves(node)) for node in _nodes(parse_json(file.read_text()))]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    found = [o for o in objects if isinstance(o.get("num_layers"), int) and "num_attention_heads" in o]
    distinct = {tuple(o.get(key) for key in _KEYS[:4]) for o in found}
    if len(distinct) != 1:
        raise UserError(f"{file}: holds {len(distinct)} configurations of a model, expected one")
    return found[0]


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)


def _leaves(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and plain values of one object."""
    items = node.get("items")
    pairs = [p for p in items if isinstance(p, list) and len(p) == 2] if isinstance(items, list) else []
    for label, value in [*pairs, *node.items()]:
        key = str(label).removeprefix("Attr(name='").removesuffix("')")
        if key in _KEYS:
            is_leaf = isinstance(value, dict) and value.get("type") == "leaf"
            yield key, value["value"] if is_leaf and "value" in value else value
