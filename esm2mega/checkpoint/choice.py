"""Chooses among the checkpoints of a run: which one a name means, which are the best, which are kept.

This module reads ``train_state.json`` of each, and nothing else; whether the other files are whole is for
`esm2mega.checkpoint.fallback`. Its entry ``best_metric`` names the measure
of the run, or is null if the run keeps no best; ``loop.evaluation`` is what was measured at its step, and
``loop.eval_proteins`` a hash of the proteins that it was measured with.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import CURE
from esm2mega.config.best_metric import VALID_LOSS, less_is_better
from esm2mega.config.hub import how_to_fetch
from esm2mega.config.run_name import FORMS, split_run
from esm2mega.config.schema import CheckpointConfig
from esm2mega.errors import DamagedError, UserError
from esm2mega.files import first_of
from esm2mega.report.decimals import four_decimals
from esm2mega.report.fold_dirs import refusal_of_folds

States = Mapping[Path, Mapping[str, Any]]
"""Maps the complete checkpoints of a run, oldest first, to the content of their ``train_state.json``."""

_RECIPE = "eval_recipe"
"""Names the entry of an evaluation that says how it was made; only equal ones are compared."""

_PROTEINS = "eval_proteins"
"""Names the entry of a state that says what was evaluated; only equal ones are compared."""

_BEST_METRIC = "best_metric"


@dataclass(frozen=True)
class Evaluated:
    """Holds a checkpoint and the value of the metric that says how good it is."""

    path: Path
    metric: str
    value: float

    @property
    def step(self) -> int:
        """Return the number of optimizer steps behind it."""
        return layout.step_of(self.path)

    def __str__(self) -> str:
        return f"by {self.metric} ({four_decimals(self.value)})"


@dataclass(frozen=True)
class Choice:
    """Holds the checkpoint that a name means.

    Attributes:
        path: Its ``step_XXXXXXXX`` directory.
        words: Which checkpoint of the run it is and why, in one line; None for one that was named itself.
        is_exact: Whether the name means this checkpoint alone; if not, and it is damaged, it means another.
    """

    path: Path
    words: str | None = None
    is_exact: bool = True


def choose_checkpoint(named: str | Path, resuming: bool = False, without: Sequence[Path] = ()) -> Choice:
    """Find the checkpoint that a name means.

    Of a fine-tuning, ``RUN`` means the best checkpoint; the last one if there is no best. Of a pretraining,
    and to resume any run, it means the last one. ``RUN@best``, ``RUN@last`` and ``RUN@step_N`` mean what they
    say. A path that exists as it is written is that path.

    Args:
        named: A ``step_XXXXXXXX`` directory, the directory of a run, or one of these forms.
        resuming: Whether training is to go on from it.
        without: Damaged checkpoints of the run, of which none is chosen.

    Raises:
        UserError: There is none, or the one named was not completed.
        DamagedError: Which one is best cannot be told, since a ``train_state.json`` is damaged.
    """
    text, which = split_run(named)
    path = Path(text)
    if layout.is_complete(path):
        if which is not None:
            raise UserError(f"{named}: {path} is a checkpoint, of which there is no @{which}; leave it out")
        return Choice(path)
    if not path.is_dir():
        cure = how_to_fetch(text) or f"give a step_XXXXXXXX directory or a run directory, or {FORMS}"
        raise UserError(f"{named}: no such checkpoint; {cure}")
    complete, _ = layout.find_checkpoints(path.parent if path.name == "checkpoints" else path)
    if not complete:
        raise refusal_of_folds(path) or _none_complete(path)
    complete = [path for path in complete if path not in without]
    if not complete:
        names = first_of([path.name for path in without])
        raise UserError(f"{named}: all of its checkpoints are damaged ({names}); {CURE}")
    if which is not None and which.startswith("step_"):
        return Choice(*_of_step(str(named), complete, int(which.removeprefix("step_"))))
    if resuming and which is None:
        return Choice(complete[-1], is_exact=False)
    states, damage = _states(complete)
    ranking, reason = _ranking(states)
    best, last = ranking[0] if ranking else None, complete[-1]
    if which == "best" and best is None:
        raise UserError(f"{named}: {reason}; use {text}@last or {text}@step_N")
    takes_best = which == "best" or (which is None and best is not None and _is_fine_tuned(states))
    if which == "best" and damage:
        cure = f"which checkpoint is the best cannot be told; use {text}@last or {text}@step_N"
        raise DamagedError(damage[0].path, damage[0].args[1], cure)
    chosen = best.path if takes_best and best is not None else last
    return Choice(chosen, _words(str(named), text, chosen, last, best, reason), which == "best")


def best_checkpoint(run_dir: str | Path) -> Evaluated | None:
    """Return the best checkpoint of a run; None if it keeps no best, or none of them was evaluated."""
    ranking, _ = _ranking(_states(layout.find_checkpoints(run_dir)[0])[0])
    return ranking[0] if ranking else None


def prune(run_dir: str | Path, settings: CheckpointConfig, written: Path) -> list[Path]:
    """Remove all checkpoints but the newest `keep_last` and the `keep_best` best ones.

    Incomplete directories older than the newest checkpoint are removed too, since nothing will read them. A
    checkpoint whose ``train_state.json`` cannot be read counts as none of these and stays where it is. Of one
    that was moved away and linked, the link is removed.

    Args:
        run_dir: Directory of the run.
        settings: How many are kept, at least the newest one; and by which metric.
        written: The checkpoint that was just written, which is kept in any case.

    Returns:
        The removed directories.
    """
    complete, incomplete = layout.find_checkpoints(run_dir)
    states, _ = _states(complete)
    best = best_first(states, settings.best_metric)[: settings.keep_best]
    keep = {written, *list(states)[-max(settings.keep_last, 1) :], *(found.path for found in best)}
    growing = layout.checkpoints_dir(run_dir).glob("step_*.partial")
    overtaken = [p for p in (*incomplete, *growing) if complete and p.name < complete[-1].name]
    removed = [p for p in states if p not in keep] + overtaken
    for path in removed:
        layout.remove(path)
    return removed


def best_first(states: States, metric: str) -> list[Evaluated]:
    """Order checkpoints by a metric, of equal ones the earlier first.

    Those without a value of it are left out, and those that were evaluated otherwise than the last one.
    """
    records = {path: _evaluation(state) for path, state in states.items()}
    found = {path: record for path, record in records.items() if _is_number(record.get(metric))}
    made = [(record.get(_RECIPE), record.get(_PROTEINS)) for record in found.values()]
    same = [
        Evaluated(path, metric, float(record[metric]))
        for (path, record), how in zip(found.items(), made, strict=True)
        if how == made[-1]
    ]
    sign = 1 if less_is_better(metric) else -1
    return sorted(same, key=lambda evaluated: (sign * evaluated.value, evaluated.step))


def _ranking(states: States) -> tuple[list[Evaluated], str]:
    """Return the checkpoints by the metric of the run, best first; and why, if there is none."""
    newest = next(reversed(list(states.values())), {})
    metric = newest.get(_BEST_METRIC, VALID_LOSS)  # version 0.1.0 knew no other
    if not isinstance(metric, str):
        return [], "it keeps no best (checkpoint.keep_best=0)"
    return best_first(states, metric), f"none of its checkpoints has a {metric}"


def _is_fine_tuned(states: States) -> bool:
    return any(state.get("task") is not None for state in states.values())


def _evaluation(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record of the evaluation at the step of a checkpoint, and what was evaluated."""
    loop = state.get("loop")
    record = loop.get("evaluation") if isinstance(loop, dict) else None
    if not isinstance(loop, dict) or not isinstance(record, dict):
        return {VALID_LOSS: state.get(VALID_LOSS)}  # version 0.1.0 kept the loss alone
    return {**record, _PROTEINS: loop.get(_PROTEINS)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _states(checkpoints: Sequence[Path]) -> tuple[dict[Path, Mapping[str, Any]], list[DamagedError]]:
    """Read what checkpoints say; return it and what is damaged. What is unreadable is left out, and said."""
    states: dict[Path, Mapping[str, Any]] = {}
    damage: list[DamagedError] = []
    for path in checkpoints:
        try:
            states[path] = layout.read_state(path)
        except UserError as error:
            if not layout.is_complete(path):
                continue  # its run has removed it meanwhile
            if isinstance(error, DamagedError):
                damage.append(error)
            _warn_once(
                f"{error.damage if isinstance(error, DamagedError) else error}; it counts as not evaluated"
            )
    return states, damage


@functools.cache  # every save of a run looks at the same old checkpoints
def _warn_once(line: str) -> None:
    print(f"esm2mega: {line}", file=sys.stderr, flush=True)


def _of_step(named: str, complete: Sequence[Path], step: int) -> tuple[Path, str]:
    for path in complete:
        if layout.step_of(path) == step:
            return path, f"{named}: {path}"
    there = first_of([str(layout.step_of(path)) for path in complete])
    raise UserError(f"{named}: the run has no complete checkpoint of step {step}; it has those of {there}")


def _words(named: str, run: str, chosen: Path, last: Path, best: Evaluated | None, reason: str) -> str:
    """Say which checkpoint was chosen, and name the best and the last if it is another one."""
    is_best, is_last = best is not None and chosen == best.path, chosen == last
    roles = [f"its best {best}"] * is_best + ["its last"] * is_last
    text = f"{named}: step {layout.step_of(chosen)}, {' and '.join(roles)}: {chosen}"
    if best is None:
        text += f"; {reason}"
    elif not is_best:
        text += f"; {run}@best is step {best.step}, {best}"
    return text if is_last else f"{text}; {run}@last is step {layout.step_of(last)}"


def _none_complete(path: Path) -> UserError:
    if (path / layout.MODEL).exists() or layout.is_checkpoint_name(path):
        return UserError(
            f"{path}: not a complete checkpoint: the file {layout.COMPLETE} is missing; "
            "use an earlier step_ directory"
        )
    return UserError(
        f"{path}: holds no complete checkpoint (no step_XXXXXXXX/{layout.COMPLETE}); give another directory"
    )
