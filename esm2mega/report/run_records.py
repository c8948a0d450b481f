"""Reads what a run has written that can be drawn: its log and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.config.renamed import REMOVED, current_key
from esm2mega.errors import UserError
from esm2mega.report.curves import Curve, TaskRun, downstream_curves, task_run
from esm2mega.report.log import DOWNSTREAM, EVAL, LOG_NAME, TEST, TRAIN, read_log

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class RunRecords:
    """Holds what a run has written that can be drawn.

    Attributes:
        train: Records of training steps.
        evaluations: Records of the validation split.
        downstream: What was measured of downstream tasks.
        task: What a fine-tuning measured; None for a pretraining.
        config: The configuration, as dotted key -> text.
    """

    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    downstream: dict[str, Curve]
    task: TaskRun | None
    config: dict[str, str]


def read_run(run_dir: str | Path) -> RunRecords:
    """Read the log of a run and, if there is one, its configuration.

    Raises:
        UserError: There is no log, or it has no training or evaluation record.
    """
    run_dir = Path(run_dir)
    log = run_dir / LOG_NAME
    records = read_log(log)
    train = [record for record in records if record.get("kind") == TRAIN]
    evaluations = [record for record in records if record.get("kind") == EVAL]
    if not train and not evaluations:
        raise UserError(
            f"{log} holds no training or evaluation record yet; plot again after train.log_every steps"
        )
    downstream = downstream_curves([record for record in records if record.get("kind") == DOWNSTREAM])
    config = read_config(run_dir)
    tests = [record for record in records if record.get("kind") == TEST]
    return RunRecords(
        train, evaluations, downstream, task_run(evaluations, tests, config.get("task.kind")), config
    )


def read_config(run_dir: Path) -> dict[str, str]:
    """Return the resolved configuration as dotted key -> text; empty when the run has none."""
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as YAML: {str(error).splitlines()[0]}") from None
    settings = _flatten(loaded) if isinstance(loaded, dict) else []
    return {current_key(key): value for key, value in settings if key not in REMOVED}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows
