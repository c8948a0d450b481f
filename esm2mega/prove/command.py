"""`prove` chooses trials, runs them, and reports how they ended as a table and as JSON."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch

from esm2mega.errors import UserError
from esm2mega.files import refuse_compressed, write_json
from esm2mega.prove.heads import CODE, HEADS
from esm2mega.prove.layouts import Layout, is_possible, random_layouts
from esm2mega.prove.prover import Prover, Verdict
from esm2mega.prove.trials import GROUPS, Trial, drawn_training, with_head, with_lora
from esm2mega.prove.workers import Serve
from esm2mega.report.progress import Progress
from esm2mega.version import __version__

PROCESSES = 4
"""Limits the processes by default, unless a trial needs more."""

_RANDOM = re.compile(r"random:([1-9]\d*)")

Say = Callable[[str], None]
print_line: Say = partial(print, flush=True)


def most_processes(trials: Sequence[Trial]) -> int:
    """Return how many processes may run at a time if nothing else is said."""
    return max([PROCESSES, *(trial.processes for trial in trials)])


def choose_trials(
    layouts: str, seed: int, processes: int, lora: bool = False, head: str | None = None
) -> list[Trial]:
    """Return the trials that ``--layouts`` names.

    Args:
        layouts: A name of `GROUPS`, several with commas, ``all``, or ``random:N``.
        seed: Seed of the random layouts.
        processes: Most processes of the random layouts.
        lora: Train adapters at these layouts.
        head: Fine-tune with this head at these layouts. Without `lora` and `head`, random trials also draw
            what they train.

    Raises:
        UserError: There is no such group or head, or the group trains something else.
    """
    plain = Trial(())
    template = plain if head is None else with_head(plain, head)
    template = with_lora(template) if lora else template
    is_random = _RANDOM.fullmatch(layouts) is not None
    trials = _named(layouts, seed, processes, template.training)
    if template == plain:
        rng = random.Random(seed)
        heads = [head for head in HEADS if head not in CODE] if importlib.util.find_spec("sklearn") else []
        return [drawn_training(t.layouts[0], rng, heads) for t in trials] if is_random else trials
    switch = " ".join([*["--lora"] * lora, *([] if head is None else [f"--head {head}"])])
    own = "lora" if head is None else "lora-heads" if lora else "heads"
    if layouts == own:
        return [trial for trial in trials if head is None or trial.label == template.label]
    if any(trial.settings for trial in trials):
        raise UserError(
            f"--layouts {layouts} and {switch} exclude each other; give --layouts {own}, ci, more or random:N"
        )
    return [replace(template, layouts=trial.layouts, precision=trial.precision) for trial in trials]


def _named(layouts: str, seed: int, processes: int, training: Sequence[str]) -> list[Trial]:
    if match := _RANDOM.fullmatch(layouts):
        return [Trial((layout,)) for layout in random_layouts(int(match[1]), seed, processes, training)]
    names = list(GROUPS) if layouts == "all" else layouts.split(",")
    for name in names:
        if name not in GROUPS:
            raise UserError(
                f"--layouts {layouts}: no group {name!r}; give {', '.join(GROUPS)}, all, or random:N"
            )
    return [trial for name in names for trial in GROUPS[name]]


def prove(
    trials: Sequence[Trial],
    seed: int,
    processes: int = PROCESSES,
    out: str | Path | None = None,
    shrink: bool = False,
    say: Say = print_line,
    serve: Serve | None = None,
) -> bool:
    """Run trials, print the table, and write `out`.

    Args:
        trials: The trials to run.
        seed: Seed of weights, data and masks.
        processes: Number of processes that may run at a time.
        out: JSON file for the result; None for none.
        shrink: Look for the smallest layout that fails as the failing ones do.
        say: Prints a line.
        serve: See `esm2mega.prove.workers.Workers`.

    Returns:
        Whether all trials passed.

    Raises:
        UserError: A layout is impossible, needs more processes than the limit, or is a trial in bf16 or fp16
            of one process, which is what such trials are measured by.
        MachineError: `out` cannot be written.
    """
    for trial in trials:
        for layout in trial.layouts:
            layout.check(trial.training)
        if trial.processes > processes:
            raise UserError(
                f"{trial}: needs {trial.processes} processes, --processes allows {processes}; raise it "
                "(there may be more processes than cores)"
            )
        if trial.is_half and trial.processes == 1:
            raise UserError(
                f"{trial}: {trial.precision} is measured by that of one process; give a larger layout"
            )
    if out is not None:
        refuse_compressed(Path(out))
    verdicts: dict[Trial, Verdict] = {}
    smallest: list[Verdict] = []

    def rows() -> list[Verdict]:
        return [verdicts[trial] for trial in trials if trial in verdicts]

    def write() -> None:
        if out is not None:
            _write(Path(out), seed, len(trials), rows(), smallest)

    write()
    try:
        with Prover(processes, seed, serve) as prover:
            with Progress(len(trials), "prove", "layout") as progress:
                for verdict in prover.judge(trials):
                    verdicts[verdict.trial] = verdict
                    progress.update(1)
            if shrink:
                for row in rows():
                    if not row.passed and not any(_explains(small, row) for small in smallest):
                        say(f"Looking for a smaller counterexample than {row.trial}")
                        smallest.append(shrunk(prover, row, processes))
    finally:
        for line in table(rows()):
            say(line)
        write()
    say("")
    failed = [row for row in rows() if not row.passed]
    for row in [*failed, *smallest]:
        say(f"{row.trial}: {row.error or f'differs most in {row.largest}'}")
        say(f"repeat: {row.trial.command(seed)}")
    say(f"{len(trials) - len(failed)} of {len(trials)} passed")
    return not failed


def row_named(name: str) -> Trial:
    """Return the trial of a group by its name in the table.

    Raises:
        UserError: No group has a trial of this name.
    """
    for trials in GROUPS.values():
        for trial in trials:
            if str(trial) == name:
                return trial
    raise UserError(f"--row {name}: no group has it; --layouts all prints all names")


def _explains(small: Verdict, row: Verdict) -> bool:
    """Return whether a failing row's layout has every setting of a counterexample, which then explains it."""
    plain, other = vars(Layout()), vars(row.trial.layouts[0])
    of_small = vars(small.trial.layouts[0])
    return all(other[axis] == value for axis, value in of_small.items() if value != plain[axis])


def shrunk(prover: Prover, failed: Verdict, processes: int) -> Verdict:
    """Return a failing trial whose every simplification passes, found by trying one after the other."""
    while True:
        for layout in failed.trial.layouts[0].simpler():
            if layout.processes > processes or layout == layout.reference:
                continue
            if is_possible(layout, failed.trial.training):
                trial = replace(failed.trial, layouts=(layout,))
                (verdict,) = prover.judge([trial])
                if not verdict.passed:
                    failed = verdict
                    break
        else:
            return failed


def table(rows: Sequence[Verdict]) -> Iterator[str]:
    """Yield the lines of the table: one per trial, under a header."""
    cells = [("layout", "processes", "difference", "bound", "largest in", "verdict")]
    for row in rows:
        number = "{:.1e}" if row.trial.precision == "fp64" else "{:.1f} x"
        difference, location = ("-", row.error or "") if row.error else ("", "")
        if row.error is None:
            difference, location = number.format(row.largest.value), str(row.largest)
        cells.append(
            (
                str(row.trial),
                str(row.trial.processes),
                difference,
                number.replace(".1", ".0").format(row.bound),
                location if len(location) < 90 else f"{location[:87]}...",
                "equal" if row.passed else "FAILED" if row.error else "DIFFERENT",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _write(out: Path, seed: int, count: int, rows: Sequence[Verdict], smallest: Sequence[Verdict]) -> None:
    content = {
        "esm2mega": __version__,
        "megatron_core": megatron.core.__version__,
        "torch": torch.__version__,
        "seed": seed,
        "complete": len(rows) == count,
        "passed": len(rows) == count and all(row.passed for row in rows),
        "rows": [_row(row, seed) for row in rows],
        "counterexamples": [_row(row, seed) for row in smallest],
    }
    write_json(out, content, "choose another --json")


def _row(row: Verdict, seed: int) -> dict[str, Any]:
    """Collect everything about one trial; an infinite difference is null, since JSON has no infinity."""
    worst = {
        found.kind: {
            "value": found.value if found.value < float("inf") else None,
            "name": found.name,
            "place": found.location,
        }
        for found in row.worst
    }
    return {
        "trial": str(row.trial),
        "layouts": [asdict(layout) for layout in row.trial.layouts],
        "precision": row.trial.precision,
        "settings": list(row.trial.settings),
        "processes": row.trial.processes,
        "passed": row.passed,
        "bound": row.bound,
        "worst": worst,
        "error": row.error,
        "command": row.trial.command(seed),
    }
