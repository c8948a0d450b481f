"""Reads and writes files of fair-esm: ``NAME.pt`` and, beside it, ``NAME-contact-regression.pt``.

Names are those of fair-esm 2.0.0, ``esm/pretrained.py`` and ``esm/model/esm2.py``. The loader strips the
prefixes that training left on the names.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.convert.files import pickles
from esm2mega.convert.files.source import SourceFiles
from esm2mega.convert.files.stores import MemoryStore
from esm2mega.convert.lazy_weights import Description, Weights, flag_from, shape_from
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
_ENCODER, _HEAD = "encoder.sentence_encoder.", "encoder."


def matches(source: SourceFiles) -> bool:
    """Tell whether this is a ``.pt`` file."""
    return source.path.is_file() and source.path.suffix == ".pt"


def read(source: SourceFiles, drop: Sequence[str] = ()) -> Weights:
    """Read ``NAME.pt``, and the contact head from ``NAME-contact-regression.pt`` if that file exists."""
    path = source.path
    content = pickles.load_pickle(path, [Namespace])
    config, tensors = _parts(path, content)
    names = {_normal(name): name for name in tensors}
    regression = contact_file(path)
    note = []
    if regression.is_file():
        contact = pickles.load_pickle(regression)
        contact = contact.get("model") if isinstance(contact, Mapping) else None
        found = pickles.flat_tensors(regression, contact)
        names |= {name: name for name in found}
        tensors |= found
    else:
        note.append(f"contact head: {regression.name} is not there")
    if not flag_from(path, config, "token_dropout", True):
        raise UserError(f"{path}: token_dropout is off; ESM-2 has it, and no other model is supported")
    values = {**config, "ffn": 4 * _integer(config.get("encoder_embed_dim"))}
    shape = shape_from(path, values, "encoder_layers", "encoder_embed_dim", "ffn", "encoder_attention_heads")
    weights = from_store(MemoryStore(path, tensors), NAMES, Description(shape, EPSILON), names, drop)
    weights.notes.dropped += note
    return weights


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _parts(path: Path, content: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{path}: not a file of fair-esm: it has no 'model'")
    config = content.get("cfg")
    namespace = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(namespace, Namespace):
        raise UserError(f"{path}: no ESM-2 of fair-esm: its cfg has no 'model' (ESM-1 files are not read)")
    return vars(namespace), pickles.flat_tensors(path, content["model"])


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
