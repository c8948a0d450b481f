"""The device that a test runs on: CUDA under the marker `gpu`, and the CPU where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esm2mega.config.schema import ParallelConfig
from esm2mega.parallel.initialize import Ranks, process_groups


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A world of one process on the device that the test's parameter names."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if request.param == "cpu" and torch.cuda.is_available():
        # A process that has a GPU takes it: Megatron-Core is adapted to the CPU only where there is none.
        pytest.skip("this machine has a CUDA device, which the tests marked gpu run on")
    with process_groups(ParallelConfig(), seed=1) as ranks:
        assert ranks.device.type == request.param
        yield ranks
