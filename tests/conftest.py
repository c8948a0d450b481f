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
