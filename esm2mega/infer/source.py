"""Where a model comes from: its configuration, weights and contact head, whatever wrote the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.auxiliary import read_auxiliary
from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import ALL, ENCODER, TRAINED, TRAINED_ENCODER
from esm2mega.checkpoint.tensors import TensorReader, combined_sha256, tensor_sha256
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import Run
from esm2mega.convert.formats.esm2mega import default_dtype, is_auxiliary, run_of
from esm2mega.convert.formats.registry import detect, open_weights
from esm2mega.convert.heads.contact_head import BIAS, WEIGHT, as_published, is_regression
from esm2mega.convert.into_model import fill_model
from esm2mega.errors import UserError
from esm2mega.lora.base import find_base, needs_base, recorded_base
from esm2mega.lora.checkpoint import load_model


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint that can be loaded into a model of any layout.

    Attributes:
        path: What holds the weights.
        run: Configuration that they were made with; only the model's section and the lengths matter.
        load: Fills this rank's chunks.
        auxiliary: Tensors beside the model, such as the contact head.
        checksum: SHA-256 over all weights, the same for every layout; reads all of them.
        has_lm_head: False of a fine-tuned model and of a bare encoder, which give no logits of residues.
    """

    path: Path
    run: Run
    load: Callable[[Sequence[Any]], object]
    auxiliary: dict[str, Tensor]
    checksum: Callable[[], str]
    has_lm_head: bool = True

    def check_lm_head(self) -> None:
        """Raise `UserError` unless there are logits of residues."""
        if not self.has_lm_head:
            raise UserError(
                f"{self.path}: has no head of masked language modelling, so it gives no logits and no scores "
                "of variants; use the model that it was fine-tuned from"
            )

    @property
    def contact_head(self) -> tuple[Tensor, float] | None:
        """Weight of each attention map, layer-major ``[L * n]``, and the bias; None if the model has none."""
        if WEIGHT not in self.auxiliary:
            return None
        return self.auxiliary[WEIGHT].flatten(), float(self.auxiliary[BIAS])


def open_model(path: str | Path) -> ModelSource:
    """Open a checkpoint, without reading weights yet.

    Args:
        path: A ``step_XXXXXXXX`` directory, a run directory for its newest one, or anything in a format that
            `esm2mega convert` reads, such as a directory of Hugging Face or a file of fair-esm.

    Raises:
        UserError: It is none, or cannot be read.
    """
    path = Path(path)
    if path.exists() and detect(path) != "esm2mega":
        return _open_foreign(path)
    checkpoint = layout.resolve_checkpoint(path)
    if needs_base(checkpoint):
        return _open_adapted(checkpoint)
    run = layout.read_config(checkpoint)
    has_lm_head = run.task.kind is None
    return ModelSource(
        checkpoint,
        run,
        lambda chunks: load_weights(checkpoint, chunks, ALL if has_lm_head else ENCODER),
        read_auxiliary(checkpoint) | _trained_contact_head(checkpoint, run),
        lambda: weights_sha256(checkpoint),
        has_lm_head,
    )


def _trained_contact_head(checkpoint: Path, run: Run) -> dict[str, Tensor]:
    """That of a fine-tuning of it, which then takes the place of the one before."""
    if not is_regression(run.task):
        return {}
    return as_published(TensorReader(checkpoint).read, shape_of(run.model).num_layers)


def _open_adapted(checkpoint: Path) -> ModelSource:
    run = layout.read_config(checkpoint)
    base = recorded_base(checkpoint)
    has_lm_head = run.task.kind is None
    return ModelSource(
        checkpoint,
        run,
        lambda chunks: load_model(checkpoint, run, chunks, TRAINED if has_lm_head else TRAINED_ENCODER),
        open_model(find_base(checkpoint, run)).auxiliary | _trained_contact_head(checkpoint, run),
        lambda: hashlib.sha256(f"{base.sha256} {weights_sha256(checkpoint)}".encode()).hexdigest(),
        has_lm_head,
    )


def _open_foreign(path: Path) -> ModelSource:
    weights = open_weights(path)
    # The large published models are stored in fp16, in which nothing is computed.
    weights = weights.cast(default_dtype(weights.description.dtype))
    kept = is_auxiliary(weights.description)
    has_lm_head = weights.description.head == "lm"
    return ModelSource(
        path,
        run_of(weights.description),
        lambda chunks: fill_model(weights, chunks, ALL if has_lm_head else ENCODER),
        {name: weights.read(name).clone() for name in weights.infos if kept(name)},
        lambda: combined_sha256(
            (name, tensor_sha256(weights.read(name))) for name in weights.infos if not kept(name)
        ),
        has_lm_head,
    )


def weights_sha256(checkpoint: Path) -> str:
    """The checksum that `esm2mega inspect` prints as ``weights sha256``."""
    reader = TensorReader(checkpoint)
    names = (name for name in reader.index if not name.startswith("optimizer."))
    return combined_sha256((name, tensor_sha256(reader.read(name))) for name in names)
