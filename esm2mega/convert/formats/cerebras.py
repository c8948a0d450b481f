"""Reads and writes files of Cerebras Model Zoo: ``NAME.mdl``, a pickle of tensors, and ``NAME.yaml``.

Names are those of Model Zoo, ``tools/checkpoint_converters/esm2.py`` and ``models/nlp/bert``. Rotary pairs
lie in neighbouring channels there, so the rows of q and k are reordered within each head. A file holds a
masked language model, a classifier (`esm2mega.convert.heads.cerebras_classifier`), or an encoder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from esm2mega.convert.files import pickles
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import MemoryStore
from esm2mega.convert.heads import cerebras_classifier
from esm2mega.convert.lazy_weights import Description, Weights, epsilon_from, shape_from
from esm2mega.convert.name_table import INTERLEAVED_QKV, LAYER, OUTPUT_BIAS, TABLE, NameTable, TableRow
from esm2mega.convert.reading import from_store
from esm2mega.convert.tensors import same_values
from esm2mega.convert.writing import tensors_of
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.vocabulary import MASK, PAD

IS_DIRECTORY = False
FAMILIES = ("esm2",)

_ENCODER = "bert_encoder.transformer_encoder."
_LAYER = _ENCODER + "layers.{n}."
_HEAD = "bert_mlm_head.mlm_transform."
_CLASSIFIER = "bert_mlm_head.classifier.ffn.0.linear_layer."
NAMES = NameTable(
    rows=(
        TableRow(TABLE, "bert_encoder.embedding_layer.word_embeddings.weight"),
        TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", _LAYER + "norm1.{p}"),
        TableRow(
            LAYER + "self_attention.linear_qkv.{p}",
            tuple(_LAYER + f"self_attn.proj_{x}_dense_layer.{{p}}" for x in "qkv"),
            INTERLEAVED_QKV,
        ),
        TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "self_attn.proj_output_dense_layer.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", _LAYER + "norm2.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", _LAYER + "ffn.ffn.0.linear_layer.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", _LAYER + "ffn.ffn.1.linear_layer.{p}"),
        TableRow("encoder.final_layernorm.{p}", _ENCODER + "norm.{p}"),
        TableRow("lm_head.dense.{p}", _HEAD + "ffn.ffn.0.linear_layer.{p}"),
        TableRow("lm_head.layer_norm.{p}", _HEAD + "ln.{p}"),
        TableRow(OUTPUT_BIAS, _CLASSIFIER + "bias"),
    ),
    tied={_CLASSIFIER + "weight": True},
    dropped={
        r"bert_encoder\.pooler\..*": "the pooler for pairs of sentences, which nothing here computes with",
    },
)
_BESIDE_CLASSIFIER = {
    r"bert_mlm_head\..*": "the masked-language-model head, which stays beside a classifier unused"
}
_HDF5 = b"\x89HDF\r\n\x1a\n"


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a ``.mdl`` file."""
    return source.path.is_file() and source.path.suffix == ".mdl"


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read a ``.mdl`` file and its parameters."""
    path = source.path
    location, model = read_parameters(path)
    shape = shape_from(location, model, "num_hidden_layers", "hidden_size", "filter_size", "num_heads")
    for key, required in {**_FIXED, "rotary_dim": shape.hidden_size // shape.num_attention_heads}.items():
        if key in model and model[key] != required:
            raise UserError(f"{location}: {key} is {model[key]!r}; this version reads {required!r} only")
    if model.get("token_dropout") is not True:
        raise UserError(
            f"{location}: token_dropout is not true; ESM-2 has it, and no other model is supported"
        )
    tensors = stored_tensors(path)
    names, twice = _names(path, tensors)
    store = MemoryStore(path, tensors)
    head: Any = "lm"
    classifier = cerebras_classifier.find_head(
        location, {name: store.infos[stored] for name, stored in names.items()}, model
    )
    if classifier is not None or not any(name.startswith("bert_mlm_head.") for name in names):
        head = classifier
    epsilon = epsilon_from(location, model, "layer_norm_epsilon", 1e-5)
    description = Description(shape, epsilon, head=head)
    weights = from_store(store, _table(description), description, names, drop, partial)
    weights.notes.dropped += twice
    if classifier is not None and classifier.task.kind == "classification":
        weights.notes.filled.append("names of the classes: their numbers, the source has none")
    return weights


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.mdl`` file by their stored names.

    Raises:
        UserError: The file is no pickle of tensors.
    """
    with path.open("rb") as file:
        if file.read(len(_HDF5)) == _HDF5:
            raise UserError(
                f"{path}: is HDF5, as cerebras.pytorch saves; where that package is installed, make a pickle "
                'of it: torch.save({"model": cstorch.load(PATH)["model"]}, NEW)'
            )
    return pickles.state_dict(path, pickles.load_pickle(path))


def _names(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Return stored names by names of the table, and a note if tensors are stored under two names.

    Raises:
        UserError: Two tensors of one name differ.
    """
    names: dict[str, str] = {}
    twice = []
    for stored, value in tensors.items():
        first = names.setdefault(cerebras_classifier.name_in_table(stored), stored)
        if first == stored:
            continue
        twice.append(stored)
        other = tensors[first]
        if value.data_ptr() != other.data_ptr() and (
            value.shape != other.shape or not same_values([value, other])
        ):
            raise UserError(f"{path}: {first} and {stored} are one tensor and differ; copy the file again")
    if not twice:
        return names, []
    return names, [f"{twice[0]}{' and others' if len(twice) > 1 else ''}: stored under another name too"]


def _table(description: Description) -> NameTable:
    """Return the name table of a model with the head of `description`."""
    if description.head == "lm":
        return NAMES
    if description.task is None:
        return NAMES.with_head(())
    table = NAMES.with_head(cerebras_classifier.ROWS)
    return replace(table, dropped={**table.dropped, **_BESIDE_CLASSIFIER})


def read_parameters(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the YAML file of the same name, or the only one beside `path`, and its section ``model``."""
    own = path.with_suffix(".yaml")
    files = [own] if own.is_file() else sorted(path.parent.glob("*.yaml"))
    if len(files) != 1:
        raise UserError(f"{path}: its parameters are not there: expected {own.name} beside it")
    try:
        content = yaml.safe_load(files[0].read_text())
        section = content.get("model") or content["trainer"]["init"]["model"]
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise UserError(f"{files[0]}: holds no section 'model' ({str(error).splitlines()[0]})") from error
    if not isinstance(section, dict):
        raise UserError(f"{files[0]}: its section 'model' holds no parameters")
    return files[0], section


_FIXED = {
    "position_embedding_type": "rotary",
    "vocab_size": VOCAB_SIZE,
    "mask_token_id": MASK,
    "pad_token_id": PAD,
    "encoder_nonlinearity": "gelu",
    "mlm_nonlinearity": "gelu",
    "norm_first": True,
    "use_final_layer_norm": True,
    "embedding_layer_norm": False,
    "share_embedding_weights": True,
    "disable_nsp": True,
}
"""Every ESM-2 has these values among its parameters."""


def beside(path: Path) -> list[Path]:
    """Return the files that `write` makes beside ``NAME.mdl``."""
    return [path.with_suffix(".yaml")]


def write(weights: Weights, path: Path) -> None:
    """Write ``NAME.mdl`` and ``NAME.yaml``; all tensors are in memory at once, as a pickle needs them."""
    if path.suffix != ".mdl":
        raise UserError(f"{path.name}: a checkpoint of Cerebras is a file that ends in .mdl")
    shape, head = weights.description.shape, weights.description.task
    extra = {} if head is None else cerebras_classifier.parameters_of(head)
    if weights.description.activation != "gelu":
        weights.notes.changed.append("feed-forward GELU: tanh in the source, erf in the Model Zoo")
    # clone: parts of one fused tensor would each store all of it
    tensors = {name: value.clone() for name, value in tensors_of(weights, _table(weights.description))}
    if head is not None:
        tensors = {cerebras_classifier.stored_name(name): value for name, value in tensors.items()}
        if head.info.names != [str(number) for number in range(len(head.info.names))]:
            weights.notes.dropped.append(f"names of the outputs ({first_of(head.info.names)}): numbers there")
        weights.notes.changed.append(
            "no masked-language-model head, which Model Zoo's classifier keeps unused: load the file there "
            "with disable_strict_checkpoint_loading: True"
        )
    pickles.save_pickle(path, {"model": tensors})
    model = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "filter_size": shape.ffn_hidden_size,
        "num_heads": shape.num_attention_heads,
        "layer_norm_epsilon": weights.description.layernorm_epsilon,
        "rotary_dim": shape.hidden_size // shape.num_attention_heads,
        "token_dropout": True,
        "max_position_embeddings": 1026,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
        **_FIXED,
        **extra,
    }
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model}, sort_keys=False))
