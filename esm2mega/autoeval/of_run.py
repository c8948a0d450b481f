"""Finds the checkpoints of a run among the models of a suite, by their weights."""

from __future__ import annotations

import sys
from pathlib import Path

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import best_checkpoint
from esm2mega.errors import DamagedError, UserError
from esm2mega.infer.source import source_of
from esm2mega.lora.base import MERGE_THEM, read_with_base
from esm2mega.report.plot import Benchmarks
from esm2mega.report.results.suite import MALFORMED, no_results, read_suite


def benchmarks_of_run(run_dir: str | Path, results: str | Path) -> Benchmarks:
    """Return what a suite measured of the checkpoints of a run.

    A model of the suite is a checkpoint of the run if it has the same step and the same weights, whose
    checksum is computed; names and paths prove nothing.

    Args:
        run_dir: Directory of the run.
        results: Folder that `esm2mega autoeval` wrote.

    Raises:
        UserError: There are no results, or none of a checkpoint that the run still has.
    """
    suite = read_suite(results)
    try:
        measured = [(m["name"], m["weights_sha256"], m.get("step")) for m in suite.results["models"]]
    except MALFORMED as error:
        raise no_results(results, error) from None
    steps = {step for _, _, step in measured}
    names: dict[Path, str] = {}
    for path in layout.find_checkpoints(run_dir)[0]:
        if (
            step := layout.step_of(path) or None
        ) not in steps:  # a suite has no step for one before the first
            continue
        try:
            checksum = source_of(read_with_base(path, cure=MERGE_THEM)).checksum()
        except DamagedError as error:
            print(f"esm2mega: {error}; this checkpoint is passed over", file=sys.stderr)
            continue
        for name, weights, of_step in measured:
            if (weights, of_step) == (checksum, step):
                names[path] = name
    if not names:
        raise UserError(
            f"--results {results}: none of its models has the step and the weights of a checkpoint in "
            f"{run_dir}; run `esm2mega autoeval` with {run_dir}, or leave it out"
        )
    best = best_checkpoint(run_dir)
    is_best = best is not None and best.path in names
    chosen = best.path if best is not None and is_best else max(names, key=layout.step_of)
    return Benchmarks(suite.of_models(set(names.values())), names[chosen], layout.step_of(chosen), is_best)
