"""Compares two runs of the same training by every number that either of them left behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.checkpoint.fallback import ALL_OF_IT
from esm2mega.checkpoint.layout import STATE, read_state, step_dir
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.report.log import CLOCK

KINDS = ("loss", "gradient norm", "gradient", "weight", "checkpoint", "state")
"""Lists the kinds of numbers that are compared.

These are losses (training and validation) and norms of the log; gradients and final weights on every process;
tensors of the last checkpoint, optimizer included; and its ``train_state.json``.
"""

EXPORT = "export"
"""Names the kind of numbers that a trial which converts its model has too."""

# For each kind of record, the keys that every one must hold, and the kind of their numbers. Whatever else an
# evaluation holds are further losses and metrics.
_LOGGED = {
    "train": {"loss": "loss", "grad_norm": "gradient norm", "lr": "state", "consumed_tokens": "state"},
    "eval": {"valid_loss": "loss"},
}
# These values differ between layouts, since another size of micro-batches needs another number of them.
_OF_THE_LAYOUT = ("data.consumed_packs", "data.identity.train.micro_batch_tokens")


@dataclass(frozen=True)
class Difference:
    """Says how far one number or tensor is from the reference.

    Attributes:
        kind: One of `KINDS`, or `EXPORT`.
        name: Name of the number or tensor.
        location: Step and process, as far as there are any.
        value: Largest absolute difference over the largest absolute value of the reference; infinite where
            one side lacks the number, and for anything not finite.
        step: Step of a number that every step has; None for others.
    """

    kind: str
    name: str
    location: str
    value: float
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{', ' if self.location else ''}{self.location}"


@dataclass(frozen=True)
class Outcome:
    """Reads what a run left behind.

    Attributes:
        out: Directory of ``rank0.pt`` and so on, see `esm2mega.prove.observe`.
        run_dir: Directory of the run.
        before: Number of steps of the run that other processes trained, before a resume.
        steps: Last step.
    """

    out: Path
    run_dir: Path
    before: int
    steps: int

    @cached_property
    def records(self) -> dict[tuple[str, int], dict[str, Any]]:
        lines = (self.run_dir / "log.jsonl").read_text().splitlines()
        return {(record["kind"], record["step"]): record for record in map(json.loads, lines)}

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        count = sum(1 for _ in self.out.glob("rank*.pt"))
        return [torch.load(self.out / f"rank{rank}.pt", weights_only=True) for rank in range(count)]

    @cached_property
    def checkpoint(self) -> dict[str, Tensor]:
        """Return the whole tensors, with main weights under ``main.`` even where they are the model's own."""
        directory = step_dir(self.run_dir, self.steps)
        ALL_OF_IT.check(directory)
        reader = TensorReader(directory)
        tensors = reader.read_many(reader.index)
        moved = {"optimizer.state.param.": "main.", "optimizer.state.fp32_param.": "main."}
        for name in list(tensors):
            for prefix, canonical in moved.items():
                if name.startswith(prefix):
                    tensors[canonical + name.removeprefix(prefix)] = tensors.pop(name)
        if not any(name.startswith("main.") for name in tensors):
            averages = [name for name in tensors if name.startswith("optimizer.state.exp_avg.")]
            for name in (name.removeprefix("optimizer.state.exp_avg.") for name in averages):
                tensors[f"main.{name}"] = tensors[name]
        return tensors

    @cached_property
    def state(self) -> dict[str, Any]:
        flat = dict(_flatten(read_state(step_dir(self.run_dir, self.steps))))
        return {name: value for name, value in flat.items() if name not in _OF_THE_LAYOUT}


def differences(reference: Outcome, trial: Outcome) -> list[Difference]:
    """Compare all numbers of `trial` with those of `reference`, which is an unbroken run of one process."""
    return [*run_differences(reference, trial), *_pieces(reference, trial)]


def run_differences(reference: Outcome, trial: Outcome) -> list[Difference]:
    """Compare what stands in the directories of the runs: logs, and the last checkpoints as whole tensors."""
    return [
        *_logs(reference, trial),
        *_tensors(reference.checkpoint, trial.checkpoint),
        *_states(reference.state, trial.state),
    ]


def without_metrics(found: Iterable[Difference]) -> list[Difference]:
    """Drop the metrics of evaluations, and keep their loss.

    Rounding moves ranks and counts not at all, or by whole steps.
    """
    return [x for x in found if x.kind != "loss" or x.name in ("loss", "valid_loss")]


def worst(found: Iterable[Difference]) -> Difference:
    """Return the largest of one or more differences; a value that is not finite is larger than any."""
    return max(found, key=lambda difference: _finite(difference.value))


def _logs(reference: Outcome, trial: Outcome) -> Iterator[Difference]:
    if reference.records.keys() != trial.records.keys():
        yield Difference("state", "records of log.jsonl", "", float("inf"))
        return
    for (record, step), expected in reference.records.items():
        actual = trial.records[record, step]
        names = dict(_LOGGED[record])
        if record == "eval":
            others = (expected.keys() | actual.keys()) - names.keys() - {"kind", "step", *CLOCK}
            names |= dict.fromkeys(sorted(others), "loss")
        for name, kind in names.items():
            known = name in expected and name in actual
            value = _relative(actual[name], expected[name]) if known else float("inf")
            yield Difference(kind, name, f"step {step}", value, step)


def _pieces(reference: Outcome, trial: Outcome) -> Iterator[Difference]:
    """Compare gradients and weights of every process; together their pieces must cover every tensor."""
    (whole,) = reference.ranks
    steps = range(trial.before, reference.steps)
    if any(len(seen["gradients"]) != len(steps) for seen in trial.ranks):
        yield Difference("gradient", "of every step", f"not {len(steps)} steps on each process", float("inf"))
        return
    for index, step in enumerate(steps):
        parts = [seen["gradients"][index] for seen in trial.ranks]
        yield from _kind("gradient", whole["gradients"][step], parts, trial, step + 1)
    yield from _kind("weight", whole["weights"], [seen["weights"] for seen in trial.ranks], trial)


def _kind(
    kind: str, whole: dict[str, Any], parts: list[dict[str, Any]], trial: Outcome, step: int | None = None
) -> Iterator[Difference]:
    location = "" if step is None else f"step {step}, "
    covered = {name: torch.zeros(shape, dtype=torch.bool) for name, (_, shape, _, _) in whole.items()}
    for rank, (seen, pieces) in enumerate(zip(trial.ranks, parts, strict=True)):
        for name, (dimension, shape, begin, values) in pieces.items():
            where = f"{location}rank {rank}"
            # Gradients are summed in fp32 even in bf16 training: in another dtype they have lost precision.
            if name not in whole or (kind == "gradient" and values.dtype != whole[name][3].dtype):
                yield Difference(kind, name, where, float("inf"), step)
                continue
            expected = whole[name][3].view(whole[name][1])
            mine, mark = expected, covered[name]
            if dimension >= 0:
                mine = mine.chunk(seen["tp_size"], dimension)[seen["tp_rank"]]
                mark = mark.chunk(seen["tp_size"], dimension)[seen["tp_rank"]]
            if mine.shape != shape:
                yield Difference(kind, name, where, float("inf"), step)
                continue
            share = slice(begin, begin + values.numel())
            # The slice is flattened as a copy, since a share of it has no shape of its own.
            flat = mark.flatten()
            flat[share] = True
            mark.copy_(flat.view(shape))
            yield Difference(kind, name, where, distance(values, mine.flatten()[share], expected), step)
    for name, mark in covered.items():
        if not mark.all():
            yield Difference(kind, name, f"{location}not whole on all processes together", float("inf"), step)


def _tensors(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> Iterator[Difference]:
    for name in expected.keys() | actual.keys():
        known = name in expected and name in actual and expected[name].shape == actual[name].shape
        value = distance(actual[name], expected[name], expected[name]) if known else float("inf")
        yield Difference("checkpoint", name, "", value)


def _states(expected: dict[str, Any], actual: dict[str, Any]) -> Iterator[Difference]:
    for name in expected.keys() | actual.keys():
        value = float("inf")
        if name in expected and name in actual:
            value = _relative(actual[name], expected[name])
        # The state repeats evaluations of the log; the best of them are those of the lowest loss.
        kind, known = "state", name
        if name == "valid_loss" or name == "loop.best_value" or name.startswith("loop.ranking."):
            kind, known = "loss", "valid_loss"
        elif name.startswith("loop.evaluation."):
            kind, known = "loss", name.removeprefix("loop.evaluation.")
        yield Difference(kind, known, STATE, value)


def _relative(actual: Any, expected: Any) -> float:
    if actual == expected:
        return 0.0
    if not isinstance(actual, float) or not isinstance(expected, float) or expected == 0:
        return float("inf")
    return _finite(abs(actual - expected) / abs(expected))


def distance(actual: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Divide the largest difference of two slices by the largest value of the tensor they are cut from."""
    gap = float((actual.double() - expected.double()).abs().max())
    return 0.0 if gap == 0 else _finite(gap / (float(whole.double().abs().max()) or float("nan")))


def _finite(value: float) -> float:
    return value if value < float("inf") else float("inf")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flatten(inner, f"{prefix}.{name}" if prefix else name)
