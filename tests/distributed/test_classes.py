"""Loss, head, model, configuration and transform of a user's own, in two processes and in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import classes_checks
from tests.ranks import run_ranks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = pytest.mark.distributed


def test_the_flow_at_dp_tp_and_pp_is_that_of_one_process(tmp_path: Path) -> None:
    """Trained at DP 2, adapted from there at TP 2 with sequence parallelism, predicted from there at PP 2."""
    program = ["-m", "tests.distributed.classes_checks", str(tmp_path / "two")]
    run_ranks(program, 2, tmp_path / "output")
    classes_checks.main(tmp_path / "one", split=False)
    one, two = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("one", "two"))
    for found, expected in zip(two["losses"], one["losses"], strict=True):
        # fp64, four updates.
        assert found == pytest.approx(expected, rel=1e-10)
    assert one["losses"][0] != one["losses"][1] and np.std(one["predicted"]) > 1e-5
    np.testing.assert_allclose(two["predicted"], one["predicted"], rtol=1e-10, atol=0)
