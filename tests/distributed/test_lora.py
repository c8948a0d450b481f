"""Adapters train the same at every layout, and their checkpoints load at any of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.prove.compare import Outcome
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import GROUPS, Trial
from tests.prove.short import short_and_whole

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


ROWS = GROUPS["lora"]
# TP2 PP2 of LoRA, and TP2 SP DP2 of DoRA.
LAYOUTS = (Layout(tp=2, pp=2, packed=3), Layout(tp=2, sp=True, dp=2))
SOME = [trial for trial in ROWS if len(trial.layouts) == 1 and trial.layouts[0] in LAYOUTS]


@short_and_whole(SOME, [trial for trial in ROWS if trial.label != "LoRA of some linears"])
def test_adapters_equal_those_of_one_process(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    assert len(trials) >= len(LAYOUTS)
    seen: dict[Trial, Outcome] = {}
    with runs():
        for verdict in list(prover.judge(trials)):
            assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
            assert verdict.largest.value <= 1e-10, f"{verdict.trial}: {verdict.largest}"
            reference = prover.reference(verdict.trial)
            assert isinstance(reference, Outcome)
            seen[verdict.trial] = reference
    # Equal numbers prove nothing unless every factor moves: A from the step after B.
    for reference in seen.values():
        (rank,) = reference.ranks
        last = rank["gradients"][-1]
        assert {name.rpartition(".")[2] for name in last} >= {"lora_A", "lora_B"}
        assert all("_lora." in name for name in last)
        assert all(values.abs().max() > 1e-9 for _, _, _, values in last.values())


@pytest.mark.slow
def test_random_layouts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(
        ["prove", "--lora", "--layouts", "random:2", "--seed", "3", "--json", str(tmp_path / "p.json")]
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count(", LoRA ") == 2 and "2 of 2 passed" in printed
