"""Decides whether two configurations of a head compute the same function, apart from weights and dropout."""

from __future__ import annotations

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS

CLS_TANH = ("cls", "tanh")
"""Means a dense layer on `<cls>`, tanh, linear: `EsmForSequenceClassification`, and the pooler of BERT."""

CLS_GELU = ("cls", "gelu")
"""Means the same with GELU, which has its erf form: the classifier of Cerebras Model Zoo."""

RESIDUE_LINEAR = ("residue linear",)
"""Means a linear layer on each residue: `EsmForTokenClassification`."""

ATTENTION_MAPS = (PAIR_KIND, "attention_maps")
"""Means the contact head of ESM-2."""


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
