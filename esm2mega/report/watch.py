"""Follows a run from another terminal or machine: reads what the run writes, and never touches it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from esm2mega.config.split import CLUSTER, FOLD, RANDOM
from esm2mega.files import real_path
from esm2mega.report.fold_dirs import begun_folds
from esm2mega.report.log import CLOCK, DOWNSTREAM, EARLY_STOP, EVAL, LOG_NAME, TEST, TRAIN, scan_log
from esm2mega.report.progress import duration
from esm2mega.report.run_records import read_config

INCIDENTS_NAME = "incidents.jsonl"

_NOT_RESULTS = ("kind", "step", "eval_recipe", *CLOCK)
_QUIET_LAPS = 5
"""A run is silent when its last record is so many times as old as its longest recent pause."""


@dataclass(frozen=True)
class Look:
    """Holds what one look at a run has found in its files.

    Attributes:
        run_dir: Directory of the run.
        stamps: Size and time of the log and of the incidents.
        records: Records of the log.
        config: The configuration, as dotted key -> text.
    """

    run_dir: Path
    stamps: tuple[Any, ...]
    records: list[dict[str, Any]]
    config: dict[str, str]


def look(run_dir: str | Path) -> Look:
    """Read the files of a run.

    Raises:
        UserError: There is no log, or it is damaged.
    """
    run_dir = Path(run_dir)
    # Before the files are read: what is written meanwhile is seen by the next look.
    stamps = tuple(_stamp(run_dir / name) for name in (LOG_NAME, INCIDENTS_NAME))
    return Look(run_dir, stamps, scan_log(run_dir / LOG_NAME).records, read_config(run_dir))


def watch(run_dir: str | Path, every: float, say: Callable[[str], None]) -> None:
    """Say how a run stands whenever its files change, until its last step is done.

    A run that has not begun, such as a job that is queued, is waited for. For a cross-validation, the folds
    that are being trained are followed, until the last one has ended.

    Args:
        run_dir: Directory of the run, or of a cross-validation.
        every: Seconds between two looks at the files.
        say: Takes the lines of each report as one text.

    Raises:
        UserError: The log is damaged.
    """
    run_dir = Path(run_dir)
    seen: Any = None
    while True:
        now = datetime.now(timezone.utc)
        looks = [look(run) for run in _begun(run_dir)]
        state = [(each.stamps, _is_silent(each, now)) for each in looks]
        if state != seen:
            say("\n".join(_standing(run_dir, looks, now)))
            seen = state
        if _is_over(run_dir, looks, now):
            return
        time.sleep(every)


def _is_silent(found: Look, now: datetime) -> bool:
    return not is_finished(found, now) and _silence(found.records, now) is not None


def standing(run_dir: str | Path, now: datetime) -> list[str]:
    """Return lines on how a run stands, or the folds of a cross-validation that are being trained.

    Args:
        run_dir: Directory of the run, or of a cross-validation.
        now: The present time, with its zone.

    Raises:
        UserError: There is no log yet, or it is damaged.
    """
    run_dir = Path(run_dir)
    looks = [look(run) for run in _begun(run_dir) or [run_dir]]
    return _standing(run_dir, looks, now)


def _begun(run_dir: Path) -> list[Path]:
    """Return the run if it has a log, else its folds that have one, in their order."""
    if (run_dir / LOG_NAME).is_file():
        return [run_dir]
    return [fold for fold in begun_folds(run_dir) if (fold / LOG_NAME).is_file()]


def _standing(run_dir: Path, looks: Sequence[Look], now: datetime) -> list[str]:
    if not looks:
        return [f"{run_dir}: has no {LOG_NAME} yet; waiting for the run to begin"]
    # Several machines may train folds at the same time.
    shown = [each for each in looks if not is_finished(each, now)] or [looks[-1]]
    lines = [line for each in shown for line in status(each, now)]
    if looks[0].run_dir == run_dir:
        return lines
    done = sum(is_finished(each, now) for each in looks)
    return [f"{real_path(run_dir).name}: {done} of {_num_folds(looks)} folds are finished", *lines]


def _num_folds(looks: Sequence[Look]) -> int:
    """Return how many folds there are to be, by the configuration of the first one."""
    _, _, count = looks[0].config.get("data.split", "").partition("/")
    return _number(count) or len(looks)


def _is_over(run_dir: Path, looks: Sequence[Look], now: datetime) -> bool:
    if not looks or not all(is_finished(each, now) for each in looks):
        return False
    return looks[0].run_dir == run_dir or len(looks) >= _num_folds(looks)


def status(found: Look, now: datetime) -> list[str]:
    """Return lines on how a run stands: step, rate, time left, memory, last evaluation, incidents.

    Args:
        found: The run.
        now: The present time, with its zone.
    """
    records = found.records
    last = {record.get("kind"): record for record in records}
    lines = [_progress(found, last.get(TRAIN), now)]
    if (train := last.get(TRAIN)) is not None:
        lines.append("  training: " + _numbers(train, ("loss", "perplexity", "lr", "grad_norm")))
        lines.append("  machine: " + _machine(train))
    for kind, name in ((EVAL, "evaluation"), (TEST, "test"), (DOWNSTREAM, "downstream")):
        if (record := last.get(kind)) is not None:
            names = [key for key in record if key not in _NOT_RESULTS]
            lines.append(f"  {name} at step {record['step']:,}: {_numbers(record, names)}")
    return [*lines, *_incidents(found.run_dir)]


def is_finished(found: Look, now: datetime) -> bool:
    """Return whether the last step of a run is logged, with the evaluation and the test that follow it.

    Args:
        found: The run.
        now: The present time, with its zone.
    """
    config, records = found.config, found.records
    most = _number(config.get("train.max_steps"))
    # A run that goes on with fewer steps than it has done ends at once, beyond them.
    done = {record.get("kind") for record in records if most and record.get("step", 0) >= most}
    is_last = TRAIN in done and (EVAL in done or not _number(config.get("train.eval_every")))
    if not is_last and not _is_stopped_early(records):
        return False
    if is_last and config.get("downstream.tasks", "[]") != "[]" and DOWNSTREAM not in done:
        return _is_quiet(records, now)
    # The test of a fine-tuning names the step of the best weights.
    trained = max((n for n, record in enumerate(records) if record.get("kind") == TRAIN), default=0)
    if any(record.get("kind") == TEST for record in records[trained:]):
        return True
    split, split_by = config.get("data.split") or "", config.get("data.split_by") or RANDOM
    if config.get("data.test") or split.startswith(FOLD) or split.count("/") == 2:
        return False
    # A column of the table may name a test split or none: then its record may still come.
    is_column = split_by != RANDOM and not split_by.startswith(CLUSTER)
    return not is_column or _is_quiet(records, now)


def _is_quiet(records: Sequence[Mapping[str, Any]], now: datetime) -> bool:
    """Return whether no record has come for long; times are to the second, and logs may have none."""
    age = _age(records, now)
    return age is None or age > _QUIET_LAPS * max(_longest_pause(records), 1.0)


def _is_stopped_early(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether early stopping ended the run, which has not gone on from there since."""
    kinds = [record.get("kind") for record in records if record.get("kind") in (TRAIN, EARLY_STOP)]
    return kinds[-1:] == [EARLY_STOP]


def _progress(found: Look, train: Mapping[str, Any] | None, now: datetime) -> str:
    """Return the line on the step, the time left, and how old the last record is."""
    name, records = real_path(found.run_dir).name, found.records
    if train is None:
        return f"{name}: no training record yet"
    step, most = train["step"], _number(found.config.get("train.max_steps"))
    parts = [
        f"{name}: step {step:,}" if not most else f"{name}: step {step:,} of {most:,} ({step / most:.0%})"
    ]
    lap = train.get("step_time")
    is_early = _is_stopped_early(records)
    is_over = is_early or bool(most and step >= most)
    if is_early:
        parts.append("stopped early")
    elif most and lap and step < most:
        parts.append(f"{duration((most - step) * lap)} left")
    if (age := _age(records, now)) is not None:
        parts.append(f"last record {duration(age)} ago")
        if (laps := _silence(records, now)) is not None and not is_over:
            parts.append(f"no record for {laps:.0f} times its longest recent pause; it may be stuck")
    return ", ".join(parts)


def _machine(train: Mapping[str, Any]) -> str:
    words = []
    if (rate := train.get("tokens_per_second")) is not None:
        words.append(f"{rate:,.0f} residues/s")
    if (lap := train.get("step_time")) is not None:
        words.append(f"{lap:.3g} s a step")
    if (memory := train.get("memory_gb")) is not None:
        words.append(f"{memory:.2f} GB")
    return ", ".join(words)


def _numbers(record: Mapping[str, Any], names: Sequence[str]) -> str:
    found = [(name, record[name]) for name in names if name in record]
    return ", ".join(
        f"{name} {'not defined' if value is None else f'{value:.4g}'}"
        for name, value in found
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    )


def _incidents(run_dir: Path) -> list[str]:
    path = run_dir / INCIDENTS_NAME
    if not path.exists():
        return []
    records = scan_log(path).records
    if not records:
        return []
    last = records[-1]
    return [
        f"  incidents: {len(records):,}, the last at step {last.get('step')}, {last.get('time')}; see {path}"
    ]


def _age(records: Sequence[Mapping[str, Any]], now: datetime) -> float | None:
    times = _times(records)
    return max(0.0, (now - times[-1]).total_seconds()) if times else None


def _silence(records: Sequence[Mapping[str, Any]], now: datetime) -> float | None:
    """Return how many times the longest of the last ten pauses the present one is; None if that is usual."""
    age, longest = _age(records, now), _longest_pause(records)
    return age / longest if age and longest and age > _QUIET_LAPS * longest else None


def _longest_pause(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the longest of the last ten pauses in seconds: evaluations and checkpoints take their time."""
    times = _times(records)[-11:]
    return max(((after - before).total_seconds() for before, after in pairwise(times)), default=0.0)


def _times(records: Sequence[Mapping[str, Any]]) -> list[datetime]:
    """Return the times of the records that have one; logs of earlier versions have none."""
    found = []
    for record in records:
        try:
            time_of = datetime.fromisoformat(str(record.get("time")))
        except ValueError:
            continue
        found.append(time_of if time_of.tzinfo else time_of.replace(tzinfo=timezone.utc))
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
