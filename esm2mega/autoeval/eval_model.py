"""Names the models of a suite, and fixes which weights are meant, however a run goes on meanwhile."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm2mega.config.presets import shape_of
from esm2mega.config.run_name import split_run
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, our_shapes
from esm2mega.errors import UserError
from esm2mega.infer.source import source_of
from esm2mega.lora.base import MERGE_THEM, read_with_base

RANDOM = "random weights"
"""Names the model that has learned nothing."""


@dataclass(frozen=True)
class EvalModel:
    """Describes one model of a suite.

    Attributes:
        name: Its short name in tables and files.
        checkpoint: The checkpoint as the user named it.
        path: The file or directory that is meant by that, from the root.
        weights_sha256: Checksum of its weights.
        parameters: Number of weights of the language model.
        step: The step of its training that wrote it; None in formats that do not say.
    """

    name: str
    checkpoint: str
    path: str
    weights_sha256: str
    parameters: int
    step: int | None

    @property
    def slug(self) -> str:
        """Return the name as a part of file names."""
        return slug_of(self.name)

    def described(self) -> dict[str, Any]:
        """Return what results say of the model."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


def open_models(checkpoints: Sequence[str], with_contact_head: bool) -> list[EvalModel]:
    """Open every checkpoint, in this process alone, and read all of its weights once for their checksum.

    Args:
        checkpoints: The checkpoints, as the user names them.
        with_contact_head: Whether each has to have a contact head.

    Raises:
        UserError: There is none of that name, it cannot be read, one is named twice, or has no contact head.
    """
    return [
        _open(checkpoint, name, with_contact_head)
        for checkpoint, name in zip(checkpoints, short_names(checkpoints), strict=True)
    ]


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """Return the shortest ends of the paths that tell all checkpoints apart, with what follows an ``@``.

    The ending ``.pt`` is left out where the names differ without it. `RANDOM` is taken already.

    Raises:
        UserError: A checkpoint is named twice.
    """
    split = [split_run(name) for name in checkpoints]
    # `.` and `..` name a folder only together with the current one.
    parts = [(Path(os.path.abspath(path)).parts[1:], f"@{which}" if which else "") for path, which in split]
    for length in range(1, max(len(path) for path, _ in parts) + 1):
        for ending in (".pt", ""):
            names = ["-".join(path[-length:]).removesuffix(ending) + which for path, which in parts]
            if len({slug_of(name) for name in (RANDOM, *names)}) == len(names) + 1:
                return names
    slugs = [slug_of(name) for name in (RANDOM, *names)]
    twice = next(number for number, slug in enumerate(slugs) if slug in slugs[:number])
    raise UserError(
        f"{checkpoints[twice - 1]}: is named twice, perhaps with other blanks; name each model once"
    )


def slug_of(name: str) -> str:
    """Return the name of a model as a part of file names."""
    return name.replace(" ", "-")


def _open(checkpoint: str, name: str, with_contact_head: bool) -> EvalModel:
    start = read_with_base(checkpoint, cure=MERGE_THEM)
    source = source_of(start)
    if with_contact_head and (source.contact_head is None or not source.contact_head[0].any()):
        raise UserError(
            f"{checkpoint}: has no contact head, which --mode zero-shot computes contacts with; train one "
            "with `esm2mega finetune` and task.head=attention_maps, or leave that mode out"
        )
    shapes = our_shapes(shape_of(start.run.model), start.run.model.max_positions)
    parameters = sum(
        math.prod(shape)
        for key, shape in shapes.items()
        if key != FREQUENCIES and not key.startswith(CONTACT_HEAD)
    )
    step = start.state.get("step") if start.is_own else None
    path = os.path.abspath(start.path)
    return EvalModel(name, checkpoint, path, source.checksum(), parameters, step or None)
