"""The same training steps on CPU and GPU: how far gradients and weights are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from esm2mega_model import training
from gpu_lines import LINES, Line
from gpu_steps import micro_batches
from gpu_timing import Row
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.train.step import train_step

STEPS = 3


def parity(line: Line, folder: Path) -> Iterator[Row]:
    """Train a few steps, compare the first gradients and the last weights, and leave both for later lines.

    A distance is the L2 norm of the difference over that of the line that this one is compared with.

    Raises:
        SystemExit: That line left nothing in the folder.
    """
    gradients: dict[str, Tensor] = {}

    def keep_first(chunks: list[Any]) -> None:
        if not gradients:
            (model,) = unwrap_model(chunks)
            gradients.update({n: p.main_grad.detach().cpu().clone() for n, p in model.named_parameters()})

    with training(line.size, line.changes) as state:
        state.on_gradients = keep_first
        steps = [train_step(state, [batch]) for batch in micro_batches(line, STEPS)]
        (model,) = unwrap_model(state.model)
        weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        row = {
            "device": state.device.type,
            "precision": line.precision,
            "attention": model.config.packed_attention,
            "losses": ", ".join(f"{step.metrics['loss']:.6f}" for step in steps),
            "gradient norm": round(steps[0].grad_norm, 6),
        }
    if line.name in {other.reference for other in LINES}:
        torch.save({"gradients": gradients, "weights": weights}, folder / f"{line.name}.pt")
    if line.reference is not None:
        reference = folder / f"{line.reference}.pt"
        row |= {"compared with": line.reference, **compared(gradients, weights, reference)}
    yield row


def compared(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], reference: Path) -> Row:
    """Return the distances to what the line of `reference` left, and whether all bits are equal."""
    if not reference.exists():
        raise SystemExit(f"{reference} is missing: measure {reference.stem} first, with the same new --out")
    theirs = torch.load(reference)
    return {
        "gradients differ": f"{distance(gradients, theirs['gradients']):.1e}",
        "weights differ": f"{distance(weights, theirs['weights']):.1e}",
        "bits equal": all(
            torch.equal(mine[name], theirs[kind][name])
            for kind, mine in (("gradients", gradients), ("weights", weights))
            for name in theirs[kind]
        ),
    }


def distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference over the norm of `theirs`, all tensors taken together."""
    assert mine.keys() == theirs.keys()
    difference = sum(float((mine[n].double() - theirs[n].double()).square().sum()) for n in theirs)
    return (difference / sum(float(theirs[n].double().square().sum()) for n in theirs)) ** 0.5
