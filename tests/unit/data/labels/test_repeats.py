"""Repeated proteins are counted, and those with other labels named with both places."""

from __future__ import annotations

from typing import Any

import pytest

from esm2mega.config.schema import TaskConfig
from esm2mega.data.labels.dataset import proteins_of_pairs

NAN = float("nan")


def note(count: int, total: int, first: tuple[int, int], others: int, other: tuple[int, int] | None) -> str:
    text = (
        f"{count} of {total} proteins of train repeat the sequence of an earlier one, "
        f"first train[{first[0]}] as train[{first[1]}]; "
    )
    if other is None:
        return text + "their labels agree"
    return text + f"{others} of them have other labels, first train[{other[0]}] as train[{other[1]}]"


@pytest.mark.parametrize(
    ("task", "pairs", "expected"),
    [
        (TaskConfig("regression"), [("MK", 1.0), ("ML", 2.0)], None),
        (
            TaskConfig("regression"),
            [("MK", 1.0), ("ML", 2.0), ("mk", 1.0), ("ML", 2.5), ("MK", 3.0)],
            note(3, 5, (2, 0), 2, (3, 1)),
        ),
        (
            TaskConfig("regression", ["a", "b"]),
            [("MK", [1.0, NAN]), ("ML", [2.0, 1.0]), ("MK", [1.0, NAN])],
            note(1, 3, (2, 0), 0, None),
        ),
        (
            TaskConfig("regression"),
            [("MK", 1.0), ("ML", 2.0), ("MK", NAN)],
            note(1, 3, (2, 0), 1, (2, 0)),
        ),
        (
            TaskConfig("classification"),
            [("MK", "a"), ("MK", "b")],
            note(1, 2, (1, 0), 1, (1, 0)),
        ),
        (
            TaskConfig("token_classification"),
            [("MK", "ab"), ("MKL", "abb"), ("MK", "ab"), ("MKL", "aba")],
            note(2, 4, (2, 0), 1, (3, 1)),
        ),
        (
            TaskConfig("multilabel"),
            [("MK", "a;b"), ("ML", "a"), ("MK", "b;a")],
            note(1, 3, (2, 0), 0, None),
        ),
    ],
)
def test_repeats_are_counted(task: TaskConfig, pairs: list[tuple[str, Any]], expected: str | None) -> None:
    found, _ = proteins_of_pairs(pairs, task, None, "train")
    notes = [note for note in found.notes if "repeat" in note]
    assert notes == ([] if expected is None else [expected])
