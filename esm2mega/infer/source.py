"""Reads configuration, weights and contact head of a model, whatever program wrote the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import ALL, ENCODER, TRAINED, TRAINED_ENCODER
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run
from esm2mega.convert.checksum import foreign_sha256, weights_sha256
from esm2mega.convert.formats.esm2mega import default_dtype, is_auxiliary
from esm2mega.convert.heads.contact_head import BIAS, WEIGHT, as_published, is_contact_head
from esm2mega.convert.into_model import fill_model
from esm2mega.convert.start_point import StartPoint, open_together
from esm2mega.errors import UserError
from esm2mega.lora.base import read_with_base, recorded_base
from esm2mega.lora.checkpoint import load_model


@dataclass(frozen=True)
class ModelSource:
    """Describes a checkpoint that can be loaded into a model of any layout.

    Attributes:
        path: File or directory that holds the weights.
        run: Configuration of the training; only the section of the model and the lengths matter.
        load: Fills this rank's chunks.
        auxiliary: Tensors beside the model, such as the contact head.
        checksum: Reads all weights, and returns their SHA-256, which is the same for every layout.
        has_lm_head: False for a fine-tuned model and for a bare encoder, which give no logits of residues.
    """

    path: Path
    run: Run
    load: Callable[[Sequence[Any]], object]
    auxiliary: dict[str, Tensor]
    checksum: Callable[[], str]
    has_lm_head: bool = True

    def check_lm_head(self) -> None:
        """Raise `UserError` unless the model gives logits of residues."""
        if not self.has_lm_head:
            raise UserError(
                f"{self.path}: has no head of masked language modelling, so it gives no logits and no scores "
                "of variants; use the model that it was fine-tuned from"
            )

    @property
    def contact_head(self) -> tuple[Tensor, float] | None:
        """Return the weight of each attention map, layer-major ``[L * n]``, and the bias; None if missing."""
        if WEIGHT not in self.auxiliary:
            return None
        return self.auxiliary[WEIGHT].flatten(), float(self.auxiliary[BIAS])


def open_model(path: str | Path, base: str | None = None, verify: bool = True) -> ModelSource:
    """Open a checkpoint, without reading weights yet; all ranks call this together, and rank 0 decides.

    Args:
        path: A checkpoint or a run, as for `esm2mega.checkpoint.choice.choose_checkpoint`; or a checkpoint in
            any format that `esm2mega convert` reads, such as a directory of Hugging Face.
        base: Where the weights under adapters are if they are no longer where they were in training.
        verify: Whether files of tensors are verified: `checkpoint.verify`.

    Raises:
        UserError: There is no checkpoint, or it cannot be read.
    """
    return source_of(open_together(lambda how: read_with_base(path, base, verification=how), verify))


def source_of(start: StartPoint) -> ModelSource:
    """Describe how a model is loaded from an open checkpoint.

    Args:
        start: Checkpoint in any format; one of adapters comes with its base.
    """
    if start.base is not None:
        return _of_adapters(start, start.base)
    return _of_own(start) if start.is_own else _of_foreign(start)


def _of_own(start: StartPoint) -> ModelSource:
    has_lm_head = start.head == "lm"
    return ModelSource(
        start.path,
        start.run,
        lambda chunks: load_weights(start.path, chunks, ALL if has_lm_head else ENCODER),
        start.auxiliary() | _trained_contact_head(start),
        lambda: weights_sha256(start.path),
        has_lm_head,
    )


def _trained_contact_head(start: StartPoint) -> dict[str, Tensor]:
    """Return a contact head that was fine-tuned, which replaces the one before; empty if there is none."""
    if not is_contact_head(start.task):
        return {}
    return as_published(TensorReader(start.path).read, shape_of(start.run.model).num_layers)


def _of_adapters(start: StartPoint, base: StartPoint) -> ModelSource:
    recorded = recorded_base(start)
    has_lm_head = start.head == "lm"
    return ModelSource(
        start.path,
        start.run,
        lambda chunks: load_model(start, start.run, chunks, TRAINED if has_lm_head else TRAINED_ENCODER),
        source_of(base).auxiliary | _trained_contact_head(start),
        lambda: hashlib.sha256(f"{recorded.sha256} {weights_sha256(start.path)}".encode()).hexdigest(),
        has_lm_head,
    )


def _of_foreign(start: StartPoint) -> ModelSource:
    # The large published models are stored in fp16, and computed in fp32 unless asked otherwise.
    weights = start.weights.cast(default_dtype(start.weights.description.dtype))
    is_beside = is_auxiliary(weights.description)
    has_lm_head = start.head == "lm"
    return ModelSource(
        start.path,
        start.run,
        lambda chunks: fill_model(weights, chunks, ALL if has_lm_head else ENCODER),
        {name: weights.read(name).clone() for name in weights.infos if is_beside(name)},
        lambda: foreign_sha256(weights),
        has_lm_head,
    )
