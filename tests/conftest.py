"""What every test of several processes shares."""

from __future__ import annotations

import pytest

from tests import warm


@pytest.fixture(autouse=True)
def _warm_processes(request: pytest.FixtureRequest) -> None:
    """Ranks and the processes of `esm2mega prove` are forked from the same process."""
    if request.node.get_closest_marker("distributed"):
        warm.prepare()
