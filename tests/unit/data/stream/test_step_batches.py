"""A batch of a step is taken when it is asked for, once, and not earlier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from esm2mega.data.stream.step_batches import StepBatches


def test_batches_are_taken_one_by_one_and_kept() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    items = source()
    batches = StepBatches(items, 3)
    assert (len(batches), taken) == (3, [])
    assert (batches[0], batches[:1], taken) == (0, [0], [0])
    for number, batch in enumerate(batches):
        assert batch == number and taken == list(range(number + 1))
    assert list(batches) == [0, 1, 2] == batches[:]
    assert (batches[-1], batches[5:], sum(batches)) == (2, [], 3)
    with pytest.raises(IndexError):
        batches[3]
    # What follows is left to the next step.
    assert next(items) == 3
