"""Reads and writes files of fair-esm: ``NAME.pt`` and, beside it, ``NAME-contact-regression.pt``.

Names are those of fair-esm 2.0.0, ``esm/pretrained.py`` and ``esm/model/esm2.py``. The loader strips the
prefixes that training left on the names. A state dict alone, as people save it from fair-esm's model, is read
too: its tensors show the shape of the model.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.config.presets import PRESETS, ModelShape
from esm2mega.convert.files import foreign, pickles
from esm2mega.convert.files.source import OF_PYTORCH, OF_TRANSFORMERS, SourceFiles
from esm2mega.convert.files.stores import (
    JoinedStore,
    MemoryStore,
    TensorStore,
    safetensors_of,
    without_shared_prefix,
)
from esm2mega.convert.lazy_weights import Description, Notes, Weights, flag_from, shape_from
from esm2mega.convert.name_table import (
    CONTACT_HEAD,
    FREQUENCIES,
    LAYER,
    OUTPUT_BIAS,
    QKV,
    REPEATED,
    TABLE,
    NameTable,
    TableRow,
)
from esm2mega.convert.reading import from_store
from esm2mega.convert.writing import tensors_of, with_contact_head
from esm2mega.errors import UserError
from esm2mega.files import first_of

IS_DIRECTORY = False
FAMILIES = ("esm2",)
EPSILON = 1e-5
"""The epsilon of LayerNorms is fixed in fair-esm's code (defaults of ``torch.nn.LayerNorm`` and apex)."""

_LAYER = "layers.{n}."
NAMES = NameTable(
    rows=(
        TableRow(TABLE, "embed_tokens.weight"),
        TableRow(LAYER + "self_attention.linear_qkv.layer_norm_{p}", _LAYER + "self_attn_layer_norm.{p}"),
        TableRow(
            LAYER + "self_attention.linear_qkv.{p}",
            tuple(_LAYER + f"self_attn.{x}_proj.{{p}}" for x in "qkv"),
            QKV,
        ),
        TableRow(LAYER + "self_attention.linear_proj.{p}", _LAYER + "self_attn.out_proj.{p}"),
        # a LayerNorm in every layer, in spite of its name
        TableRow(LAYER + "mlp.linear_fc1.layer_norm_{p}", _LAYER + "final_layer_norm.{p}"),
        TableRow(LAYER + "mlp.linear_fc1.{p}", _LAYER + "fc1.{p}"),
        TableRow(LAYER + "mlp.linear_fc2.{p}", _LAYER + "fc2.{p}"),
        TableRow("encoder.final_layernorm.{p}", "emb_layer_norm_after.{p}"),
        TableRow("lm_head.dense.{p}", "lm_head.dense.{p}"),
        TableRow("lm_head.layer_norm.{p}", "lm_head.layer_norm.{p}"),
        TableRow(OUTPUT_BIAS, "lm_head.bias"),
        TableRow(FREQUENCIES, _LAYER + "self_attn.rot_emb.inv_freq", REPEATED, optional=True),
        TableRow(CONTACT_HEAD + "{p}", "contact_head.regression.{p}", optional=True),
    ),
    tied={"lm_head.weight": True},
)
_TABLE, _FREQUENCIES = "embed_tokens.weight", "layers.0.self_attn.rot_emb.inv_freq"
_ENCODER, _HEAD = "encoder.sentence_encoder.", "encoder."


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a file of tensors that no ``config.json`` describes."""
    return source.path.is_file() and source.path.suffix in OF_PYTORCH and not source.has_config


def read(source: SourceFiles, drop: Sequence[str] = (), partial: bool = False) -> Weights:
    """Read ``NAME.pt``, and the contact head from ``NAME-contact-regression.pt`` if that file exists."""
    path = source.path
    found = open_file(path, partial)
    store, names = found.store, dict(found.names)
    regression = contact_file(path)
    if regression.is_file():
        contact = pickles.load_pickle(regression)
        contact = contact.get("model") if isinstance(contact, Mapping) else None
        beside = MemoryStore(regression, pickles.flat_tensors(regression, contact))
        names |= {name: name for name in beside.infos}
        store = JoinedStore(path, [store, beside])
    elif not any(name.startswith(CONTACT_HEAD) for name in names):
        found.notes.dropped.append(f"contact head: {regression.name} is not there")
    weights = from_store(store, NAMES, Description(found.shape, EPSILON), names, drop, partial)
    weights.notes.dropped += found.notes.dropped
    weights.notes.filled += found.notes.filled
    return weights


@dataclass(frozen=True)
class ModelFile:
    """Holds an opened file of fair-esm.

    Attributes:
        store: Its tensors, without prefixes that all of them have.
        names: Names in `store` by names of the table.
        shape: Dimensions of the model.
        is_whole: Whether the file has the configuration that fair-esm's own loader needs.
        notes: What was taken off, and what the file does not say.
    """

    store: TensorStore
    names: Mapping[str, str]
    shape: ModelShape
    is_whole: bool
    notes: Notes


def open_file(path: Path, partial: bool = False) -> ModelFile:
    """Open the file of a model, which fair-esm wrote or which holds a state dict of its model.

    With `partial`, it may lack the token table if it has the configuration that fair-esm writes.

    Raises:
        UserError: The file holds another model, or does not show the shape of the model.
    """
    config: dict[str, Any] | None = None
    stored: TensorStore | None = safetensors_of(path)
    if stored is None:
        content = pickles.load_pickle(path, [Namespace])
        config = _config(path, content)
        stored = MemoryStore(path, pickles.state_dict(path, content))
    store, prefix = without_shared_prefix(stored)
    shapes = {name: info.shape for name, info in store.infos.items()}
    names = {_normal(name): name for name in shapes}
    if (name := foreign.named_by_tensors(shapes)) is not None:
        raise UserError(foreign.refusal(path, name))
    if _TABLE not in names and not (partial and config is not None):
        raise UserError(f"{path}: {_what_else(path, shapes)}")
    notes = Notes(dropped=prefix)
    if (values := config) is None:
        values, how = _values_of({normal: shapes[name] for normal, name in names.items()}, path)
        notes.filled.append(
            f"configuration: none in the file; {values['encoder_attention_heads']} heads {how}, the rest as "
            "in every ESM-2 of fair-esm"
        )
    values = {**values, "ffn": 4 * _integer(values.get("encoder_embed_dim"))}
    keys = ("encoder_layers", "encoder_embed_dim", "ffn", "encoder_attention_heads")
    return ModelFile(store, names, shape_from(path, values, *keys), config is not None and not prefix, notes)


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _config(path: Path, content: Any) -> dict[str, Any] | None:
    """Return the configuration of a model of fair-esm, or None if the file has none."""
    if not isinstance(content, Mapping):
        return None
    if isinstance(arguments := content.get("args"), Namespace):
        raise UserError(foreign.refusal(path, foreign.named_by_arguments(vars(arguments))))
    config = content.get("cfg")
    namespace = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(namespace, Namespace):
        return None
    if not flag_from(path, vars(namespace), "token_dropout", True):
        raise UserError(f"{path}: token_dropout is off; ESM-2 has it, and no other model is supported")
    return vars(namespace)


def _values_of(shapes: Mapping[str, tuple[int, ...]], path: Path) -> tuple[dict[str, Any], str]:
    """Return the dimensions of a model that its tensors show, and in words what shows the number of heads.

    Args:
        shapes: Shapes of the tensors by the names of the table.
        path: The file, named in errors.

    Raises:
        UserError: Nothing shows the number of heads.
    """
    layers = len({match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))})
    width = shapes[_TABLE][-1] if shapes[_TABLE] else 0
    frequencies, contacts = shapes.get(_FREQUENCIES), shapes.get(f"{CONTACT_HEAD}weight")
    if frequencies and frequencies[-1]:
        heads, how = width // (2 * frequencies[-1]), "by the number of its rotary frequencies"
    elif contacts and layers:
        heads, how = contacts[-1] // layers, "by the size of its contact head"
    else:
        published = [preset for tag, preset in PRESETS.items() if tag != "tiny"]
        same = [preset for preset in published if preset[:2] == (layers, width)]
        if not same:
            raise UserError(
                f"{path}: holds tensors alone, which do not say how many heads the model has; give the file "
                "with 'cfg' that fair-esm publishes, or a directory of Hugging Face with config.json"
            )
        heads, how = same[0].num_attention_heads, "as in the published model of this shape"
    return {"encoder_layers": layers, "encoder_embed_dim": width, "encoder_attention_heads": heads}, how


def _what_else(path: Path, names: Iterable[str]) -> str:
    """Say what a file holds that has no tensor table under fair-esm's name."""
    if any(name.endswith(("word_embeddings.weight", "lm_head.decoder.bias")) for name in names):
        endings = "" if path.suffix in OF_TRANSFORMERS else f" under a name in {' or '.join(OF_TRANSFORMERS)}"
        return (
            "its tensors have the names of transformers, whose config.json says how many heads the model "
            f"has; put the file{endings} beside config.json"
        )
    return f"its tensors have the names of no known format: {first_of(sorted(names), 4)}"


def _normal(name: str) -> str:
    for prefix in (_ENCODER, _HEAD):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def contact_file(path: Path) -> Path:
    """Return the file in which fair-esm looks for the contact head of ``NAME.pt``."""
    return path.with_name(f"{path.stem}-contact-regression.pt")


def beside(path: Path) -> list[Path]:
    """Return the files that `write` makes beside ``NAME.pt``."""
    return [contact_file(path)]


def write(weights: Weights, path: Path) -> None:
    """Write ``NAME.pt`` and its contact head; all tensors are in memory at once, as a pickle needs them."""
    description, shape = weights.description, weights.description.shape
    if not path.name.startswith("esm2") or path.suffix != ".pt":
        raise UserError(
            f"{path.name}: fair-esm reads ESM-2 only if the name begins with 'esm2' and ends in .pt"
        )
    if shape.ffn_hidden_size != 4 * shape.hidden_size:
        raise UserError(
            f"fair-esm has feed-forward layers of 4 x {shape.hidden_size}, "
            f"this model of {shape.ffn_hidden_size}; write another format"
        )
    if description.layernorm_epsilon != EPSILON:
        raise UserError(
            f"fair-esm has a LayerNorm epsilon of {EPSILON}, this model of {description.layernorm_epsilon}; "
            "write another format"
        )
    if description.activation != "gelu":
        weights.notes.changed.append("feed-forward GELU: tanh in the source, erf in fair-esm")
    # clone: parts of one fused tensor would each store all of it
    tensors = {name: value.clone() for name, value in tensors_of(with_contact_head(weights), NAMES)}
    contact = {name: tensors.pop(name) for name in list(tensors) if name.startswith(CONTACT_HEAD)}
    config = Namespace(
        encoder_layers=shape.num_layers,
        encoder_embed_dim=shape.hidden_size,
        encoder_attention_heads=shape.num_attention_heads,
        token_dropout=True,
    )
    state = {
        f"{_HEAD if name.startswith('lm_head.') else _ENCODER}{name}": value
        for name, value in tensors.items()
    }
    pickles.save_pickle(path, {"cfg": {"model": config}, "model": state})
    pickles.save_pickle(contact_file(path), {"model": contact})
