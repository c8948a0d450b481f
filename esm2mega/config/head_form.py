"""Decides whether two configurations of a head compute the same function, apart from weights and dropout."""

from __future__ import annotations

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS

CLS_TANH = ("cls", "tanh")
"""It is a dense layer on `<cls>`, tanh, linear, as in `EsmForSequenceClassification` and BERT's pooler."""

RESIDUE_LINEAR = ("residue linear",)
"""It is a linear layer on each residue, as in `EsmForTokenClassification`."""

ATTENTION_MAPS = (PAIR_KIND, "attention_maps")
"""It is the contact head of ESM-2."""


def head_form(task: TaskConfig) -> tuple[str, ...]:
    """Return a value that is equal for heads which compute the same function of the same weights."""
    if task.kind == PAIR_KIND:
        return ATTENTION_MAPS if task.head == "attention_maps" else (PAIR_KIND, "product")
    if task.kind in RESIDUE_KINDS:
        return ("residue cnn",) if task.head == "cnn" else RESIDUE_LINEAR
    if task.head == "hf":
        return CLS_TANH
    if task.head == "pooler":
        return ("cls", task.pooler_activation)
    return ("linear" if task.head == "linear" else "mlp", task.pooling)
