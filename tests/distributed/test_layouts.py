"""Every parallel layout trains the same model: the fixed dozen of the proof, and two layouts in bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint.layout import step_dir
from esm2mega.cli.app import main
from esm2mega.prove.command import row_named
from esm2mega.prove.compare import EXPORT, KINDS, Outcome
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover
from esm2mega.prove.training import SAVED, STEPS
from esm2mega.prove.trials import GROUPS, Trial
from tests.checkpoints import full_weights
from tests.prove.short import short_and_whole

# Each test proves all its layouts at once.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


# Every axis.
HARDEST = ["TP2 PP2 SP, 3 per pack", "TP2 DP2 SP DO, 2 per pack"]


@pytest.mark.parametrize(
    "names", [HARDEST, pytest.param([*map(str, GROUPS["ci"])], marks=pytest.mark.slow)], ids=["some", "dozen"]
)
def test_fixed_dozen_equals_one_process(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "proof.json"
    monkeypatch.setitem(GROUPS, "ci", tuple(trial for trial in GROUPS["ci"] if str(trial) in names))
    code = main(["prove", "--layouts", "ci", "--json", str(out)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    count = len(names)
    assert printed.count(" equal\n") == count and f"{count} of {count} passed" in printed
    for row in json.loads(out.read_text())["rows"]:
        assert set(row["worst"]) == set(KINDS), f"{row['trial']}: something was not compared"
        assert max(found["value"] for found in row["worst"].values()) <= 1e-10, row["trial"]


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_as_one_process(prover: Prover) -> None:
    trials = (
        Trial((Layout(tp=2, sp=True, packed=3),), "bf16"),
        Trial((Layout(dp=2, packed=3, distributed_optimizer=True),), "bf16"),
    )
    for verdict in list(prover.judge(trials)):
        assert verdict.error is None
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1f} in {verdict.largest}"
        # It is another arithmetic, not the same numbers.
        assert verdict.largest.value > 0.1


@pytest.mark.slow
def test_fp16_is_as_near_to_fp32_as_one_process(prover: Prover) -> None:
    """With the loss scale, also through a pipeline and a resume; in one process: unit/train/test_fp16.py."""
    for verdict in list(prover.judge(GROUPS["fp16"])):
        assert verdict.error is None
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1f} in {verdict.largest}"
        assert verdict.largest.value > 0.1


LARGE = [trial for trial in GROUPS["families"] if trial.processes == 4]


@short_and_whole([LARGE[0], GROUPS["exports"][0]], [*LARGE, GROUPS["exports"][0]])
def test_model_families_equal_one_process(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    """TAPE's post-LN and ProteinLM's pre-LN, with their learned positions, over tensors and stages; and one
    of them in the files of ProteinLM, and back.
    """
    families = {setting for trial in trials for setting in trial.settings if "family" in setting}
    assert len(families) == 2
    with runs():
        verdicts = list(prover.judge(trials))
    for verdict in verdicts:
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert {x.kind for x in verdict.worst} == {*KINDS, *([EXPORT] if verdict.trial.through else [])}
        assert verdict.largest.value <= 1e-10, f"{verdict.trial}: {verdict.largest}"


DROPPING = [row_named(name) for name in ("TP2 PP2 SP, 3 per pack, pre-LN, dropout", "TP2 -> DP2 DO, dropout")]


@short_and_whole(DROPPING[:1], DROPPING)
def test_dropout_equals_one_process(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    """Over tensors, stages and parts of the sequence, and after a resume at another layout."""
    with runs():
        verdicts = list(prover.judge(trials))
    for verdict in verdicts:
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert verdict.largest.value <= 1e-10, f"{verdict.trial}: {verdict.largest}"


def test_training_moves_everything_that_is_compared(prover: Prover) -> None:
    """Equal numbers prove nothing unless the steps make them."""
    trial = Trial((Layout(packed=6),))
    (verdict,) = prover.judge([trial])
    assert verdict.passed
    reference = prover.reference(trial)
    assert isinstance(reference, Outcome)
    (seen,) = reference.ranks
    first, last = (full_weights(step_dir(reference.run_dir, step)) for step in (SAVED, STEPS))
    records, state = reference.records, reference.state
    gradients = [values for step in seen["gradients"] for _, _, _, values in step.values()]
    assert len(seen["gradients"]) == STEPS
    assert all(values.dtype == torch.float64 and values.abs().max() > 1e-8 for values in gradients)
    assert [name for name, value in last.items() if torch.equal(value, first[name])] == ["rotary.inv_freq"]
    norms = [record["grad_norm"] for (kind, _), record in records.items() if kind == "train"]
    assert min(norms) > 0.1, "clipping never acted"
    assert state["loop.evaluations_without_improvement"] == 1
