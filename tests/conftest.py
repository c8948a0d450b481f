"""What holds for all tests: where processes are forked from, and when memory is searched for garbage."""

from __future__ import annotations

import gc

import pytest

from tests import warm

# Importing makes a million objects and hardly any garbage: searching them all again and again takes half the
# time of a collection of tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ranks and the processes of `esm2mega prove` are forked from the same process."""
    if item.get_closest_marker("distributed"):
        warm.prepare()
