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

PRODUCT = (PAIR_KIND, "product")
"""Means the contact head of TAPE."""

RESIDUAL_BLOCKS = (PAIR_KIND, "residual blocks")
"""Means the contact head of ProteinLM."""

TAPE_RESIDUES = ("tape residues",)
"""Means the two convolutions over a protein of TAPE and ProteinLM."""

TAPE_PROTEIN, PROTEINLM_PROTEIN = ("tape protein", "pooler"), ("tape protein", "cls")
"""Mean the two weight-normed layers on `<cls>` of TAPE, behind its pooler, and of ProteinLM."""


def head_form(task: TaskConfig) -> tuple[str, ...]:
    """Return a value that is equal for heads which compute the same function of the same weights."""
    if task.kind == PAIR_KIND:
        return {"attention_maps": ATTENTION_MAPS, "proteinlm": RESIDUAL_BLOCKS}.get(task.head, PRODUCT)
    if task.kind in RESIDUE_KINDS:
        others = {"cnn": ("residue cnn",), "tape": TAPE_RESIDUES, "proteinlm": TAPE_RESIDUES}
        return others.get(task.head, RESIDUE_LINEAR)
    if task.head in ("tape", "proteinlm"):
        return TAPE_PROTEIN if task.head == "tape" else PROTEINLM_PROTEIN
    if task.head == "hf":
        return CLS_TANH
    if task.head == "pooler":
        return ("cls", task.pooler_activation)
    return ("linear" if task.head == "linear" else "mlp", task.pooling)
