"""What holds for all tests: where processes are forked from, the cache, signals, and garbage."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests import warm

# Importing makes a million objects and hardly any garbage: searching them all again and again takes half the
# time of a collection of tests.
gc.disable()

# A shell has the jobs in its background ignore Ctrl-C, and processes hand that on; these tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_caches = tempfile.mkdtemp()
_kernels = Path(_caches, "kernels")
_kernels.mkdir()
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
_numbers = itertools.count()


@pytest.hookimpl(tryfirst=True)  # before those marked as slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the parameters of a test that `some` does not choose."""
    groups: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some"):
            groups.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for group in groups.values():
        marker = group[0].get_closest_marker("some")
        assert marker is not None
        (count,) = marker.args
        chosen = {number * len(group) // count for number in range(count)}
        for number in set(range(len(group))) - chosen:
            group[number].add_marker("slow")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ranks and the processes of `esm2mega prove` are forked from the same process; a cache for each test.

    What the tests share of it are the compiled kernels.
    """
    cache = Path(_caches, str(next(_numbers)))
    os.environ["XDG_CACHE_HOME"] = str(cache)
    (cache / "esm2mega").mkdir(parents=True)
    (cache / "esm2mega/kernels").symlink_to(_kernels)
    if item.get_closest_marker("distributed"):
        warm.prepare()
