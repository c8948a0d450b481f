"""Names the directories of a cross-validation, and reads its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esm2mega.errors import UserError
from esm2mega.files import parse_json

PREDICTIONS, SUMMARY = "folds.csv", "folds.json"
"""Name, in the directory of a cross-validation, the predictions of all folds and the metrics over them."""

_FOLD = "fold_"

CURE = "run `esm2mega finetune --folds` again, which keeps finished folds"
"""Says what to do about a damaged file of a cross-validation."""


def fold_dirs(folder: str | Path) -> list[Path]:
    """Return the runs of all folds where `folder` is that of a cross-validation; empty if it is not.

    Raises:
        UserError: The summary of the folds is damaged.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        return []
    return [fold_dir(folder, number) for number in range(1, int(read_summary(path)["folds"]) + 1)]


def fold_dir(folder: str | Path, number: int) -> Path:
    """Return the directory of the run of a fold, counted from 1."""
    return Path(folder) / f"{_FOLD}{number}"


def begun_folds(folder: str | Path) -> list[Path]:
    """Return the directories of the folds that have one, in the order of their numbers."""
    numbers = [path.name.removeprefix(_FOLD) for path in Path(folder).glob(f"{_FOLD}*")]
    return [fold_dir(folder, number) for number in sorted(int(text) for text in numbers if text.isdecimal())]


def refusal_of_folds(path: Path) -> UserError | None:
    """Return the error for a cross-validation in the place of one model; None if a path is none."""
    first = fold_dir(path, 1)
    if not first.is_dir():
        return None
    return UserError(
        f"{path}: is the directory of a cross-validation, with a model for each fold; name one of them, "
        f"such as {first}"
    )


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary that `finetune --folds` wrote; raise UserError if it is damaged."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not _is_summary(found):
        raise UserError(f"{path}: is damaged; {CURE}")
    return dict(found)


def _is_summary(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(metrics := found.get("metrics"), dict):
        return False
    count = found.get("folds")
    return (
        isinstance(count, int)
        and count > 0
        and all(
            isinstance(each, dict)
            and isinstance(values := each.get("values"), list)
            and all(_is_number_or_none(value) for value in (each.get("mean"), each.get("std"), *values))
            for each in metrics.values()
        )
    )


def _is_number_or_none(value: object) -> bool:
    return value is None or isinstance(value, (int, float))
