"""Compares the directories of two runs of the same training; for trials outside the test suite."""

from __future__ import annotations

import warnings
from pathlib import Path

from esm2mega.prove.compare import Outcome, run_differences, worst
from tests.namespaces import TrialFailed

ROUNDING = 1e-10
"""Bounds what another layout may change in fp64, relative to the largest number of a tensor."""


def compare(reference: Path, trial: Path, steps: int, bound: float = 0.0) -> str:
    """Return in words how far logs, weights and optimizer of `trial` are from those of `reference`.

    Args:
        steps: Last step of both.
        bound: Largest difference that is allowed; 0 means bit for bit.

    Raises:
        TrialFailed: They are further apart, or a step is missing.
    """
    runs = [Outcome(run_dir, run_dir, 0, steps) for run_dir in (reference, trial)]
    for run in runs:
        trained = [step for kind, step in run.records if kind == "train"]
        if trained != list(range(1, steps + 1)):
            raise TrialFailed(f"{run.run_dir}: the log has the steps {trained}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
        found = worst(run_differences(*runs))
    if not found.value <= bound:
        raise TrialFailed(f"{trial.name}: {found} is {found.value:.1e} off, and {bound:.0e} is allowed")
    tensors = len(runs[0].checkpoint)
    how = "bit for bit equal to" if found.value == 0 else f"at most {found.value:.1e} off"
    return f"{steps} steps, {tensors} tensors: {how} the unbroken run"
