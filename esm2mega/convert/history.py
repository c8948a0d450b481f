"""Gathers what is known of how a model was trained, for its model card; nothing is guessed.

The log of its run is read beside the checkpoint; it may have been moved since, and then counts as not known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.config.load import run_from_text
from esm2mega.config.resolved import resolved_text
from esm2mega.config.schema import Run
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.files import content_sha256
from esm2mega.report.log import EVAL, LOG_NAME, TEST, scan_log
from esm2mega.report.results.suite import MALFORMED, no_results, read_suite

TRAINING = "training"
"""Names the entry of ``origin`` in ``train_state.json`` with the training of the source."""

NOT_WRITTEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading a training raises that no run has written."""

_AS_THEY_ARE = ("version", "step", "samples", "tokens")
_NO_METRIC = ("kind", "step", "time", "eval_recipe")


@dataclass(frozen=True)
class DataSet:
    """Describes proteins of a training.

    Attributes:
        use: What they were for: ``train``, ``valid`` or ``test``.
        name: Name of the file or store, without the folders that hold it.
        proteins, residues: Their numbers; None in checkpoints of earlier versions.
        sources: Name and SHA-256 of each file that a token store was made from.
    """

    use: str
    name: str
    proteins: int | None = None
    residues: int | None = None
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Score:
    """Holds what a benchmark measured: a headline metric with its 95 % interval."""

    task: str
    mode: str
    metric: str
    value: float
    low: float | None
    high: float | None
    proteins: int | None


@dataclass(frozen=True)
class History:
    """Holds what is known of a training.

    Attributes:
        run: Its configuration.
        version: Version of this package that trained.
        step: Its last step.
        samples, tokens: Consumed so far.
        info: Meaning of the outputs of a head, with the number of labels of each.
        data: Its proteins.
        metrics: What was measured with these weights, by the split.
        adapters: How adapters of it are held: ``merged``, or ``beside`` the weights; None without adapters.
    """

    run: Run
    version: str
    step: int
    samples: int
    tokens: int
    info: TargetInfo | None = None
    data: Sequence[DataSet] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    adapters: str | None = None


def history_of(checkpoint: Path) -> History | None:
    """Return what is known of the training that wrote a checkpoint of this package; None if no training did.

    A checkpoint that was converted, or merged with adapters, holds the history of its source. Of the files
    that a checkpoint names none is opened, since it may come from elsewhere.

    Raises:
        UserError: What it holds of its training is not what this package writes.
    """
    run, state = layout.read_config(checkpoint), layout.read_state(checkpoint)
    try:
        return _history(checkpoint, run, state)
    except NOT_WRITTEN as error:
        raise UserError(f"{checkpoint / layout.STATE}: {malformed(error)}") from error


def malformed(error: Exception) -> str:
    """Say that what a checkpoint holds of its training cannot be read."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"what it says of the training is not what esm2mega writes ({reason}); take another checkpoint"


def _history(checkpoint: Path, run: Run, state: Mapping[str, Any]) -> History | None:
    data, origin = state.get("data"), state.get("origin")
    if isinstance(data, Mapping):
        return History(
            run,
            str(state["esm2mega_version"]),
            state["step"],
            data["consumed_samples"],
            data["consumed_tokens"],
            None if run.task.kind is None else TargetInfo.from_dict(state["task"]),
            list(_data_sets(run, state)),
            _metrics(checkpoint, state),
            "beside" if "base" in state else None,
        )
    if isinstance(origin, Mapping) and (record := origin.get(TRAINING)) is not None:
        return _from_record(record, checkpoint / layout.STATE)
    return None


def as_record(history: History) -> dict[str, Any]:
    """Return a history as JSON, which a converted or merged checkpoint holds as ``origin.training``."""
    return {
        **{name: getattr(history, name) for name in _AS_THEY_ARE},
        "config": resolved_text(history.run),
        "task": None if history.info is None else history.info.to_dict(),
        "data": [dataclasses.asdict(one) for one in history.data],
        "metrics": history.metrics,
        "adapters": history.adapters,
    }


def _from_record(record: Mapping[str, Any], where: Path) -> History:
    return History(
        run_from_text(record["config"], where),
        **{name: record[name] for name in _AS_THEY_ARE},
        info=None if record["task"] is None else TargetInfo.from_dict(record["task"]),
        data=[DataSet(**{**one, "sources": _pairs(one["sources"])}) for one in record["data"]],
        metrics={split: dict(numbers) for split, numbers in record["metrics"].items()},
        adapters=record["adapters"],
    )


def _pairs(sources: Iterable[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(sha256)) for name, sha256 in sources)


def _data_sets(run: Run, state: Mapping[str, Any]) -> Iterator[DataSet]:
    if (noted := state.get(layout.DATA_SETS)) is not None:
        for one in noted:
            sources = _pairs(one.get("sources", ()))
            yield DataSet(one["use"], one["name"], one["proteins"], one["residues"], sources)
        return
    # A checkpoint of an earlier version names its data and no more.
    named = [("train", path) for path in run.data.train_paths()]
    named += [(use, path) for use in ("valid", "test") if (path := getattr(run.data, use)) is not None]
    for use, path in named:
        yield DataSet(use, Path(path).name or str(path))


def _metrics(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what the run's log says of the weights of this step; the last record of each kind counts."""
    found: dict[str, dict[str, float]] = {}
    if (valid_loss := state.get("valid_loss")) is not None:
        found["valid"] = {"valid_loss": float(valid_loss)}
    log = checkpoint.parent.parent / LOG_NAME
    if checkpoint.parent.name != "checkpoints" or not log.is_file():
        return found
    try:
        records = scan_log(log).records
    except UserError:
        return found
    for record in records:
        kind = {EVAL: "valid", TEST: "test"}.get(str(record.get("kind")))
        if kind is None or record.get("step") != state["step"]:
            continue
        numbers = {
            str(name): float(value)
            for name, value in record.items()
            if name not in _NO_METRIC and isinstance(value, int | float) and math.isfinite(value)
        }
        found[kind] = numbers
    return found


def benchmark_scores(folder: Path, weights_sha256: str) -> list[Score]:
    """Return what a suite of `esm2mega autoeval` measured of a model.

    Args:
        folder: Folder of the suite's results.
        weights_sha256: Checksum of the model's weights.

    Raises:
        UserError: There are no results, or none of these weights.
    """
    suite = read_suite(folder)
    try:
        names = [m["name"] for m in suite.results["models"] if m["weights_sha256"] == weights_sha256]
        if not names:
            raise UserError(
                f"--results {folder}: none of its models has the weights of this one (sha256 "
                f"{weights_sha256[:12]}…); run `esm2mega autoeval` with this checkpoint, or leave it out"
            )
        return [
            Score(
                str(task["task"]),
                str(row["mode"]),
                str(row.get("metric", task["metric"])),
                float(row["value"]),
                None if row["low"] is None else float(row["low"]),
                None if row["high"] is None else float(row["high"]),
                (task.get("num_proteins") or {}).get("test"),
            )
            for task in suite.results["tasks"]
            for row in task["rows"]
            if row["row"] == "model" and row["model"] == names[0] and row["value"] is not None
        ]
    except MALFORMED as error:
        raise no_results(folder, error) from None


def file_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by its name."""
    return {path.name: content_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
