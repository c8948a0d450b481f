"""Every head fine-tunes to the same losses, gradients, weights and metrics as in one process, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from esm2mega.prove.heads import HEADS
from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import GROUPS, Trial
from tests.prove.short import short_and_whole

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


OF_HEAD = {name: [t for t in GROUPS["heads"] if t.label == f"head {name}"] for name in HEADS}
IN_TURN = {name: rows[number % len(rows)] for number, (name, rows) in enumerate(OF_HEAD.items())}
# Few weights in a sharded optimizer, and head, loss and model of a user's own, both resumed; maps in bf16.
MORE = (OF_HEAD["max"][-1], OF_HEAD["own"][-1], GROUPS["bf16"][-1])
# At other layouts, and a user's own at all of them.
AGAIN = (OF_HEAD["frozen"][2], OF_HEAD["attention_maps"][2], *OF_HEAD["own"])


@short_and_whole(
    # Heads of proteins, of residues and of pairs, and a user's own, resumed.
    [*(IN_TURN[name] for name in ("attention", "targets", "attention_maps")), MORE[1]],
    dict.fromkeys([*IN_TURN.values(), *MORE, *AGAIN]),
)
def test_heads_equal_one_process(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    """One layout for each head, in turn; `esm2mega prove --layouts heads` has all combinations."""
    assert all(OF_HEAD.values())
    with runs():
        verdicts = list(prover.judge(trials))
    for verdict in verdicts:
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1e} in {verdict.largest}"
