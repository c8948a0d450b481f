"""What holds for all tests: where processes are forked from, the cache, signals, and garbage."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import signal
import tempfile

import pytest

from tests import warm

# Importing makes a million objects and hardly any garbage: searching them all again and again takes half the
# time of a collection of tests.
gc.disable()

# A shell has the jobs in its background ignore Ctrl-C, and processes hand that on; these tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_caches = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
_numbers = itertools.count()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ranks and the processes of `esm2mega prove` are forked from the same process; a cache for each test."""
    os.environ["XDG_CACHE_HOME"] = f"{_caches}/{next(_numbers)}"
    if item.get_closest_marker("distributed"):
        warm.prepare()
