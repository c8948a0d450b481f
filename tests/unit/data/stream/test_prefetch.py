"""Prefetching, in a thread and in processes: order, errors reach the consumer, close ends all."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from esm2mega.data.stream.prefetch import Prefetcher, ProcessPrefetcher
from esm2mega.errors import MachineError, UserError


def test_items_arrive_in_order_and_end() -> None:
    ahead = Prefetcher(iter(range(100)))
    assert list(ahead) == list(range(100))
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_exactly_so_many_items_are_built_ahead(depth: int) -> None:
    built: list[int] = []
    progress = threading.Condition()

    def items() -> Iterator[int]:
        for number in range(10):
            with progress:
                built.append(number)
                progress.notify_all()
            yield number

    ahead = Prefetcher(items(), depth)
    for taken in range(1, 6):
        assert next(ahead) == taken - 1
        with progress:
            assert progress.wait_for(lambda taken=taken: len(built) >= taken + depth, timeout=10)  # type: ignore[misc]
    ahead.close()
    assert built == list(range(5 + depth))  # five taken, `depth` ahead, no more


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


def test_what_a_thread_takes_from_ends_after_it() -> None:
    """As the processes whose arrays a thread makes tensors of."""
    processes = ProcessPrefetcher(functools.partial(numbers_of, last=10**9), 1)
    ahead = Prefetcher(map(str, processes), 2, processes.close)
    assert next(ahead) == "0"
    children = [child for child in multiprocessing.active_children() if "esm2mega-data" in child.name]
    ahead.close()
    assert [child.exitcode for child in children] == [-signal.SIGKILL]
    failing = Prefetcher(map(str, ProcessPrefetcher(die, 1)))
    assert next(failing) == "0"
    with pytest.raises(MachineError, match="data worker 0 of 1 died"):
        next(failing)
    failing.close()


def numbers_of(worker: int, last: int) -> Iterator[int]:
    """Every second number below `last`."""
    yield from range(worker, last, 2)


def fail(worker: int) -> Iterator[int]:
    yield worker
    if worker == 1:
        raise UserError("store is gone")


def fail_at_once(worker: int) -> Iterator[int]:
    raise UserError(f"worker {worker} has no store")


def die(worker: int) -> Iterator[int]:
    yield worker
    os._exit(3)


def test_items_of_processes_arrive_in_turn_and_end() -> None:
    ahead = ProcessPrefetcher(functools.partial(numbers_of, last=20), 2)
    assert list(ahead) == list(range(20))
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


def test_an_error_of_a_process_reaches_the_consumer_in_its_place() -> None:
    ahead = ProcessPrefetcher(fail, 2)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(StopIteration):  # worker 0 ends first
        next(ahead)
    ahead.close()
    ahead = ProcessPrefetcher(fail_at_once, 1)
    for _ in range(2):
        with pytest.raises(UserError, match="worker 0 has no store"):
            next(ahead)
    ahead.close()


def test_a_dead_process_is_said_so() -> None:
    ahead = ProcessPrefetcher(die, 1)
    assert next(ahead) == 0
    with pytest.raises(MachineError, match=r"data worker 0 of 1 died \(exit code 3\)"):
        next(ahead)
    ahead.close()


def test_signals_to_stop_pass_the_processes_by_and_close_ends_them() -> None:
    ahead = ProcessPrefetcher(functools.partial(numbers_of, last=10**9), 2)
    assert next(ahead) == 0
    processes = [child for child in multiprocessing.active_children() if "esm2mega-data" in child.name]
    assert len(processes) == 2
    for process in processes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid or 0, number)
    assert list(itertools.islice(ahead, 100_000)) == list(range(1, 100_001))  # more than the pipes hold
    ahead.close()
    ahead.close()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    with pytest.raises(StopIteration):
        next(ahead)


def test_processes_do_not_outlive_a_consumer_that_forgets_them() -> None:
    script = (
        "from tests.unit.data.stream.test_prefetch import *\n"
        "if __name__ == '__main__':\n"
        "    ahead = ProcessPrefetcher(functools.partial(numbers_of, last=10**9), 1)\n"
        "    print(next(ahead))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")
