"""The prefetch thread: order, one item ahead, errors reach the consumer, close ends the thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from esm2mega.data.prefetch import Prefetcher


def test_items_arrive_in_order_and_end() -> None:
    ahead = Prefetcher(iter(range(100)))
    assert list(ahead) == list(range(100))
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


def test_exactly_one_item_is_built_ahead() -> None:
    built: list[int] = []
    progress = threading.Condition()

    def items() -> Iterator[int]:
        for number in range(10):
            with progress:
                built.append(number)
                progress.notify_all()
            yield number

    ahead = Prefetcher(items())
    for taken in range(1, 6):
        assert next(ahead) == taken - 1
        with progress:
            assert progress.wait_for(lambda taken=taken: len(built) > taken, timeout=10)  # type: ignore[misc]
    ahead.close()
    assert built == list(range(6))  # five taken, one ahead, no more


def test_an_error_reaches_the_consumer_in_its_place_and_again() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    ahead = Prefetcher(items())
    assert next(ahead) == 1
    for _ in range(3):
        with pytest.raises(OSError, match="disk gone"):
            next(ahead)
    ahead.close()


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = Prefetcher(iter(range(100)))
    assert next(ahead) == 0
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ahead)
