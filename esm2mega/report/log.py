"""Writes and reads `log.jsonl`: one JSON object per line, readable while the run goes on.

Each record is one `write` that is handed to the operating system at once, so a killed process loses nothing.
The file is synced to the disk at every evaluation record, at least every `SYNC_SECONDS` seconds of writing,
and by `sync()`, so a power cut loses only the last seconds. The readers drop and count a record that was cut
short by either.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from esm2mega.errors import MachineError, UserError
from esm2mega.files import parse_json, replacing

TRAIN = "train"
EVAL = "eval"
TEST = "test"
DOWNSTREAM = "downstream"
EARLY_STOP = "early_stop"
_KINDS = (TRAIN, EVAL, TEST, DOWNSTREAM, EARLY_STOP)
LOG_NAME = "log.jsonl"
SYNC_SECONDS = 5.0
CLOCK = ("time", "tokens_per_second", "step_time", "memory_gb")
"""Names the fields of a record that tell the time or measure the machine, and differ between equal runs."""

_MOST_STEPS = 2**53
"""A step is drawn as a float, which has every whole number up to this one."""

_CURE = "free space there or choose another run_dir"

logger = logging.getLogger(__name__)


class LogContents(NamedTuple):
    """Holds the records of a log, and says whether its last line was cut short."""

    records: list[dict[str, Any]]
    dropped_lines: int
    """Is 1 if a half-written last line was left out, and 0 if not."""


class JsonlLog:
    """Appends records to a log; opening it repairs a half-written last line that a killed run left."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` for appending, creating it and its directory when absent."""
        self.path = Path(path)
        self._descriptor = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                # A new record must never be glued to the fragment of an old one.
                contents = scan_log(self.path)
                if contents.dropped_lines:
                    _warn_dropped(self.path)
                    self._replace(contents.records)
            self._open()
        except OSError as error:
            raise _failed(self.path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Numpy and torch scalars become numbers; NaN and infinities become null, since JSON has neither.
        """
        line = _to_line(record).encode()
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):  # a full disk may take a part; the rest then raises
                os.write(self._descriptor, line[written:])
            now = time.monotonic()
            if record.get("kind") == EVAL or now - self._synced_at >= SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise _failed(self.path, error) from error

    def sync(self) -> None:
        """Force everything written so far to the disk."""
        os.fsync(self._descriptor)
        self._synced_at = time.monotonic()

    @staticmethod
    def set_aside(path: str | Path) -> Path | None:
        """Rename a log that holds anything to the next free of ``log.jsonl.1``, ``log.jsonl.2`` and so on.

        A run that starts anew calls this before it opens its log, so that no earlier one is lost.

        Returns:
            The new name; None when there was nothing to keep.
        """
        path = Path(path)
        try:
            if not path.exists() or not path.stat().st_size:
                return None
            names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            free = next(name for name in names if not name.exists())
            path.rename(free)
        except OSError as error:
            raise _failed(path, error) from error
        return free

    def truncate_after(self, step: int) -> int:
        """Drop the records of steps beyond `step`, as a resume from the checkpoint of `step` must.

        The file is replaced in one rename: a kill at any moment leaves the old or the new log. Records
        without a step stay. What was written behind a dropped record is dropped too: the record of a test may
        name an earlier step, that of the best weights. Only what was measured downstream belongs
        to the step that it names, wherever it stands.

        Returns:
            The number of records dropped.
        """
        records = scan_log(self.path).records
        steps = [record.get("step") for record in records]
        end = next((n for n, other in enumerate(steps) if other is not None and other > step), len(steps))
        kept = [
            record
            for n, (record, other) in enumerate(zip(records, steps, strict=True))
            if n < end or other is None or (record.get("kind") == DOWNSTREAM and other <= step)
        ]
        if len(kept) < len(records):
            try:
                os.close(self._descriptor)
                self._replace(kept)
                self._open()
            except OSError as error:
                raise _failed(self.path, error) from error
        return len(records) - len(kept)

    def close(self) -> None:
        """Sync and close; closing twice is harmless."""
        if self._descriptor >= 0:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> JsonlLog:
        """Return the open log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the log."""
        self.close()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._synced_at = time.monotonic()

    def _replace(self, records: list[dict[str, Any]]) -> None:
        with replacing(self.path, _CURE, durable=True) as partial:
            partial.write_text("".join(map(_to_line, records)), encoding="utf-8")


def utc_now() -> str:
    """Return the time as records have it: ISO 8601 to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _failed(path: Path, error: OSError) -> MachineError:
    return MachineError(f"cannot write the log {path}: {error.strerror or error}; {_CURE}")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a log in order; a half-written last line is left out with a warning.

    Raises:
        UserError: There is no such file, or a line other than the last is not a JSON object.
    """
    contents = scan_log(path)
    if contents.dropped_lines:
        _warn_dropped(path)
    return contents.records


def scan_log(path: str | Path) -> LogContents:
    """Read a log, and report a half-written last line in the result and not as a warning.

    Raises:
        UserError: The file cannot be read, or a line other than the last is no record.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"no log at {path}; give the run_dir of a run that has started") from None
    except OSError as error:
        raise UserError(f"cannot read the log {path}: {error.strerror}") from None
    *lines, rest = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}:{number}: not a JSON object; the log was edited or damaged: remove this line"
            )
        if (key := _odd_key(record)) is not None:
            raise UserError(
                f"{path}:{number}: its {key!r} is not what a run writes; the log was edited or damaged: "
                "remove this line"
            )
        records.append(record)
    return LogContents(records, dropped_lines=int(bool(rest)))


def _odd_key(record: Mapping[str, Any]) -> str | None:
    """Return the key of a record whose value no run has written; None if there is none."""
    step = record.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= _MOST_STEPS
    if not is_step and ("step" in record or record.get("kind") in _KINDS):
        return "step"
    texts = (key for key in ("kind", "eval_recipe") if not isinstance(record.get(key), (str, type(None))))
    return next(texts, None)


def _warn_dropped(path: str | Path) -> None:
    logger.warning("%s: dropped 1 half-written last line (the run was killed while writing it)", path)


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Turn numpy and torch scalars into Python numbers and non-finite ones into None, nested ones too."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
