"""Proteins in one pack, long ones and short ones, are the same whether one process has them or several."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.distributed import context_checks
from tests.distributed.context_checks import NAMES, PLACES, computed
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("dtype", "size", "bound"),
    # In fp32 with the kernel of this machine, whose sums are the same, and products of fewer rows.
    [
        ("fp64", 4, 1e-12),
        pytest.param("fp32", 4, 2e-5, marks=pytest.mark.slow),
        pytest.param("fp64", 3, 1e-12, marks=pytest.mark.slow),
    ],
)
def test_a_pack_in_parts_equals_the_whole(tmp_path: Path, dtype: str, size: int, bound: float) -> None:
    whole = {at: computed(dtype, 1, "auto", at) for at in PLACES}
    program = ["-m", context_checks.__name__, str(tmp_path / "found"), dtype, str(size)]
    run_ranks(program, size, tmp_path / "output", timeout=240)
    for rank in range(size):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        for exchange, (at, expected) in itertools.product(NAMES, whole.items()):
            parts = found[f"{exchange} {at}"]
            assert parts.keys() == expected.keys()
            for name, tensor in expected.items():
                difference = (parts[name] - tensor).abs().max() / tensor.abs().max()
                assert difference < bound, f"rank {rank}, {exchange}, {at}, {name}: {difference:.2g}"
