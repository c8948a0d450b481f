"""Shortens a run to a trial: two steps, one evaluation, one checkpoint, and nothing of it is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from esm2mega.config.schema import LoggingConfig, Run
from esm2mega.errors import StoppedBySignal
from esm2mega.parallel.errors import on_one_rank

_STEPS = 2
KEYS = (
    *("train.max_steps", "train.eval_every", "train.early_stopping.patience"),
    *("schedule.warmup_steps", "schedule.decay_steps"),
)
"""Lists the keys that a trial sets, which nothing else chooses then."""


def done(evaluates: bool) -> str:
    """Return the last line of a trial that has gone well; without validation data nothing is evaluated."""
    tried = "two steps, an evaluation" if evaluates else "two steps (and no evaluation without data.valid)"
    return f"fast-dev-run: {tried} and a checkpoint succeeded; nothing is kept"


_PACKS = 2
"""Is the number of packs of the evaluation."""


@contextmanager
def trial_of(run: Run) -> Iterator[Run]:
    """Give a shortened run in a directory beside the real one, which is removed at the end.

    All ranks call this together. Data, model, layout and batch are those of the run. The test split is read
    and not evaluated, see `is_trial` of the commands; no tracker is told, and no checkpoint is resumed.

    Args:
        run: The run that is tried out.

    Raises:
        StoppedBySignal: A signal came or the time was up; unlike in a run, nothing is saved.
    """
    parent = _existing(Path(run.run_dir).absolute())
    folder = on_one_rank(lambda: tempfile.mkdtemp(prefix="fast_dev_run_", dir=parent))
    train = replace(
        run.train,
        max_steps=_STEPS,
        max_epochs=None,
        eval_every=0,
        eval_batches=_PACKS,
        log_every=1,
        early_stopping=replace(run.train.early_stopping, patience=0),
    )
    try:
        yield replace(
            run,
            run_dir=str(Path(folder) / "run"),
            train=train,
            schedule=replace(run.schedule, warmup_steps=0, decay_steps=_STEPS),
            checkpoint=replace(run.checkpoint, save_every=0, resume="never", async_save=False),
            logging=LoggingConfig(samples=run.logging.samples),
            downstream=replace(run.downstream, tasks=[]),
        )
    except StoppedBySignal as error:
        rest = " before the trial was over (--fast-dev-run); nothing of it is kept, start the command again"
        raise StoppedBySignal(error.reason, rest) from None
    finally:
        # Without a word to the other ranks, which may have ended after an error.
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)


def _existing(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    return next(above for above in path.parents if above.is_dir())
