"""The same training steps on CPU and GPU: how far gradients and weights are apart; and twice on one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_lines import LINES, Line
from gpu_steps import micro_batches
from gpu_timing import Row
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.benchmark.ours import training
from esm2mega.train.step import train_step

STEPS = 3


def parity(line: Line, folder: Path) -> Iterator[Row]:
    """Train a few steps, compare the first gradients and the last weights, and leave both for later lines.

    A distance is the L2 norm of the difference over that of the line that this one is compared with.

    Raises:
        SystemExit: That line left nothing in the folder.
    """
    gradients, weights, row = trained(line)
    if line.name in {other.reference for other in LINES}:
        torch.save({"gradients": gradients, "weights": weights}, folder / f"{line.name}.pt")
    if line.reference is not None:
        reference = folder / f"{line.reference}.pt"
        row |= {"compared with": line.reference, **compared(gradients, weights, reference)}
    yield row


def twice(line: Line, folder: Path) -> Iterator[Row]:
    """Train the same steps twice under PyTorch's deterministic algorithms, which promise equal bits.

    Raises:
        SystemExit: Bits differ.
    """
    # cuBLAS reads it when it makes its first workspace.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        gradients, weights, row = trained(line)
        again, weights_again, _ = trained(line)
    finally:
        torch.use_deterministic_algorithms(False)
    if not (same_bits(gradients, again) and same_bits(weights, weights_again)):
        raise SystemExit(f"{line.name}: the same steps twice have different bits")
    yield {**row, "bits equal": True}


def trained(line: Line) -> tuple[dict[str, Tensor], dict[str, Tensor], Row]:
    """Train a few steps, and return the first gradients, the last weights, and what the steps report."""
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
    return gradients, weights, row


def compared(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], reference: Path) -> Row:
    """Return the distances to what the line of `reference` left, and whether all bits are equal."""
    if not reference.exists():
        raise SystemExit(f"{reference} is missing: measure {reference.stem} first, with the same new --out")
    theirs = torch.load(reference)
    return {
        "gradients differ": f"{distance(gradients, theirs['gradients']):.1e}",
        "weights differ": f"{distance(weights, theirs['weights']):.1e}",
        "bits equal": same_bits(gradients, theirs["gradients"]) and same_bits(weights, theirs["weights"]),
    }


def same_bits(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether all tensors are equal."""
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference over the norm of `theirs`, all tensors taken together."""
    assert mine.keys() == theirs.keys()
    difference = sum(float((mine[n].double() - theirs[n].double()).square().sum()) for n in theirs)
    return (difference / sum(float(theirs[n].double().square().sum()) for n in theirs)) ** 0.5
