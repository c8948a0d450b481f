"""The head of a task in a directory of PEFT: the classifier of `EsmForSequenceClassification` or
`EsmForTokenClassification`, which peft trains in full as one of its ``modules_to_save``.

The scale of numeric targets goes into their last layer, so that their logits are in the units of the labels.
What logits mean, such as the names of the classes, has no place in a PEFT directory; it goes into `TASK`,
which peft does not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esm2mega.config.schema import Run, TaskConfig
from esm2mega.config.task import RESIDUE_KINDS
from esm2mega.data.targets import TargetInfo
from esm2mega.errors import UserError

TASK = "esm2mega_task.json"
PREFIX = "base_model.model.classifier."
MODULE = "classifier"

_SEQUENCE = {"dense.": "head.dense.", "out_proj.": "head.output."}
_TOKEN = {"": "head.output."}
_CLASSES = {"sequence": "EsmForSequenceClassification", "token": "EsmForTokenClassification"}
_TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


def kind_of_head(run: Run, head: Mapping[str, Tensor]) -> str | None:
    """``sequence`` or ``token`` where transformers has the same head; None where it has not.

    Args:
        run: Configuration with the task.
        head: Its tensors.
    """
    per_residue = run.task.kind in RESIDUE_KINDS
    same = run.task.head in (("auto", "linear", "hf") if per_residue else ("hf",))
    names = _names("token" if per_residue else "sequence").values()
    if not same or head.keys() != set(names):
        return None
    return "token" if per_residue else "sequence"


def task_type(kind: str) -> str:
    """What peft calls it."""
    return _TASK_TYPES[kind]


def described(kind: str, info: TargetInfo) -> str:
    """For whom an exported head is, in a line."""
    named = ", ".join(info.names[:8]) + (", …" if len(info.names) > 8 else "")
    return f"head     {_CLASSES[kind]} with num_labels={info.num_outputs}: {named}"


def to_theirs(kind: str, head: Mapping[str, Tensor], info: TargetInfo) -> dict[str, Tensor]:
    """Tensors of the classifier by the names that peft gives them."""
    scaled = dict(head)
    if info.mean:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (info.mean, info.std))
        weight, bias = head["head.output.weight"], head["head.output.bias"]
        scaled["head.output.weight"] = (weight.double() * std[:, None]).to(weight.dtype)
        scaled["head.output.bias"] = (bias.double() * std + mean).to(bias.dtype)
    return {theirs: scaled[ours].contiguous() for theirs, ours in _names(kind).items()}


def write_task(directory: Path, run: Run, info: TargetInfo) -> None:
    """Write `TASK`: what the logits mean."""
    unscaled = {"mean": [0.0] * len(info.mean), "std": [1.0] * len(info.std)}
    content = {"target_columns": run.task.target_columns, **info.to_dict(), **unscaled}
    (directory / TASK).write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Meaning:
    """What the logits of a classifier mean, where its directory does not say.

    Attributes:
        kind: `task.kind`.
        names: Of the outputs; None for ``LABEL_0`` and so on, as transformers calls them.
    """

    kind: str
    names: Sequence[str] | None = None


def has_meaning(source: Path, given: Meaning | None) -> bool:
    """Whether a classifier in this PEFT directory can be the head of a task."""
    return given is not None or (source / TASK).exists()


def to_ours(
    source: Path, tensors: Mapping[str, Tensor], hidden_size: int, given: Meaning | None
) -> tuple[dict[str, Tensor], TaskConfig, TargetInfo]:
    """The head in a PEFT directory.

    Args:
        source: The directory.
        tensors: Those of the classifier by their names.
        hidden_size: Of the base.
        given: What its logits mean; None for what the file `TASK` says.

    Returns:
        Tensors by our names, the section ``task``, and what predictions mean.

    Raises:
        UserError: The file is not whole, or the tensors are not such a head.
    """
    found = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in tensors.items()}
    columns, info = _stored(source) if given is None else _given(given, found)
    kind = "token" if info.per_residue else "sequence"
    h, k = hidden_size, info.num_outputs
    shapes = {"dense.weight": (h, h), "dense.bias": (h,), "out_proj.weight": (k, h), "out_proj.bias": (k,)}
    if kind == "token":
        shapes = {"weight": (k, h), "bias": (k,)}
    if found != shapes:
        raise UserError(
            f"{source}: {MODULE} has {found}, that of {_CLASSES[kind]} with {k} labels has {shapes}; leave "
            "it out with --drop"
        )
    ours = {our_name: tensors[theirs] for theirs, our_name in _names(kind).items()}
    return ours, TaskConfig(kind=info.kind, target_columns=columns, head="hf"), info


def _stored(source: Path) -> tuple[list[str], TargetInfo]:
    try:
        content = json.loads((source / TASK).read_text())
        return content.pop("target_columns"), TargetInfo.from_dict(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source / TASK}: not readable ({error}); leave {MODULE} out with --drop") from error


def _given(given: Meaning, found: Mapping[str, tuple[int, ...]]) -> tuple[list[str], TargetInfo]:
    (count, *_) = found.get("out_proj.bias") or found.get("bias") or (0,)
    names = list(given.names) if given.names is not None else [f"LABEL_{n}" for n in range(count)]
    numeric = given.kind in ("regression", "token_regression")
    scale = ([0.0] * count, [1.0] * count) if numeric else ([], [])
    columns = names if given.kind == "regression" else TaskConfig().target_columns
    return columns, TargetInfo(given.kind, names, [], *scale)


def _names(kind: str) -> dict[str, str]:
    """Their name -> ours."""
    return {
        f"{PREFIX}{theirs}{part}": f"{ours}{part}"
        for theirs, ours in (_SEQUENCE if kind == "sequence" else _TOKEN).items()
        for part in ("weight", "bias")
    }
