"""Feeds optional trackers (TensorBoard, Weights & Biases) with the records of `log.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from esm2mega.config.schema import LoggingConfig
from esm2mega.errors import MachineError, UserError
from esm2mega.files import replacing


class Tracker(Protocol):
    """Receives the records of a run in a place outside the log of its run directory."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record of the log."""

    def close(self) -> None:
        """Hand over what is still buffered."""


class TensorBoardTracker:
    """Writes event files to `RUN_DIR/tensorboard`, with scalars like `train/loss` and `eval/valid_loss`."""

    def __init__(self, run_dir: str | Path, finished_steps: int = 0) -> None:
        """Open the event file; on resume TensorBoard hides the later events that an earlier process wrote."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _not_installed("tensorboard", "tensorboard") from None
        self._writer: Any = SummaryWriter(
            str(Path(run_dir, "tensorboard")), purge_step=finished_steps + 1 if finished_steps else None
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write every number of the record at the record's step."""
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Feeds one Weights & Biases run per run directory; a resumed run goes on in the same W&B run."""

    ID_FILE = "wandb_run_id.txt"

    def __init__(
        self, run_dir: str | Path, project: str | None, run_name: str | None, config: Mapping[str, Any]
    ) -> None:
        """Start or resume the W&B run whose id is kept in the run directory."""
        try:
            import wandb
        except ImportError:
            raise _not_installed("wandb", "wandb") from None
        id_file = Path(run_dir, self.ID_FILE)
        if id_file.exists():
            run_id = id_file.read_text().strip()
        else:
            import uuid

            run_id = uuid.uuid4().hex[:12]
            with replacing(id_file) as partial:
                partial.write_text(run_id + "\n")
        try:
            self._run: Any = wandb.init(
                project=project or "esm2mega",
                name=run_name or Path(run_dir).name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
            )
        except Exception as error:  # wandb raises its own family, network and login errors among them
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise MachineError(
                f"logging.wandb=true, but W&B did not start: {first_line}; "
                "log in with `wandb login`, set WANDB_MODE=offline, or set logging.wandb=false"
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Log every number of the record at the record's step."""
        self._run.log(dict(scalars(record)), step=int(record["step"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def open_trackers(
    settings: LoggingConfig, run_dir: str | Path, config: Mapping[str, Any], finished_steps: int = 0
) -> list[Tracker]:
    """Open the trackers that the configuration asks for, on the one rank that logs.

    Args:
        settings: The section `logging` of the configuration.
        run_dir: Directory of the run.
        config: The resolved configuration, nested or flat, shown beside the curves.
        finished_steps: The step that is resumed from; 0 for a new run.

    Raises:
        UserError: A tracker was asked for and its package is not installed.
    """
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(TensorBoardTracker(run_dir, finished_steps))
    if settings.wandb:
        trackers.append(WandbTracker(run_dir, settings.wandb_project, settings.wandb_run_name, config))
    return trackers


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record as (`kind/name`, value), but for the step, which is the axis."""
    kind = record.get("kind", "train")
    for name, value in record.items():
        if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            yield f"{kind}/{name}", float(value)


def _not_installed(key: str, package: str) -> UserError:
    return UserError(
        f"logging.{key}=true, but the package {package} is not installed; "
        f"pip install 'esm2mega[logging]' or set logging.{key}=false"
    )
