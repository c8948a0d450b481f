"""Every head fine-tunes to the same losses, gradients, weights and metrics as in one process, in fp64."""

from __future__ import annotations

import pytest

from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import GROUPS, HEADS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def test_heads_equal_one_process(prover: Prover) -> None:
    """One layout for each head, in turn; `esm2mega prove --layouts heads` has all combinations."""
    of_head = {name: [t for t in GROUPS["heads"] if t.label == f"head {name}"] for name in HEADS}
    trials = [rows[number % len(rows)] for number, rows in enumerate(of_head.values())]
    trials += [of_head["frozen"][2], of_head["attention_maps"][2], of_head["max"][-1], GROUPS["bf16"][-1]]
    # Head, loss and model of a user's own at every layout, and resumed.
    trials += [trial for trial in of_head["own"] if trial not in trials]
    assert all(of_head.values())
    for verdict in list(prover.judge(trials)):
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1e} in {verdict.largest}"
