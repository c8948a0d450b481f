"""Every parallel layout trains the same model: the fixed dozen of the proof, and two layouts in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint.layout import step_dir
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.prove.compare import KINDS, Outcome
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover, Verdict
from esm2mega.prove.training import SAVED, STEPS
from esm2mega.prove.trials import GROUPS, Trial

pytestmark = pytest.mark.distributed

BF16 = (
    Trial((Layout(tp=2, sp=True, packed=3),), "bf16"),
    Trial((Layout(dp=2, packed=3, distributed_optimizer=True),), "bf16"),
)
TRIALS = (*GROUPS["ci"], *BF16)


@pytest.fixture(scope="module")
def verdicts(prover: Prover) -> dict[Trial, Verdict]:
    return {verdict.trial: verdict for verdict in prover.judge(TRIALS)}


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_equals_one_process(trial: Trial, verdicts: dict[Trial, Verdict]) -> None:
    verdict = verdicts[trial]
    assert verdict.error is None
    assert {difference.kind for difference in verdict.worst} == set(KINDS), "something was not compared"
    assert verdict.passed, f"{verdict.largest.value:.1e} in {verdict.largest}"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    return {name: reader.read(name) for name in reader.index if not name.startswith("optimizer.")}


def test_training_moves_everything_that_is_compared(prover: Prover, verdicts: dict[Trial, Verdict]) -> None:
    """Equal numbers prove nothing unless the steps make them."""
    reference = prover.reference(GROUPS["ci"][0])
    assert isinstance(reference, Outcome)
    (seen,) = reference.ranks
    gradients = [values for step in seen["gradients"] for _, _, _, values in step.values()]
    assert len(seen["gradients"]) == STEPS
    assert all(values.dtype == torch.float64 and values.abs().max() > 1e-8 for values in gradients)
    first, last = (tensors(step_dir(reference.run_dir, step)) for step in (SAVED, STEPS))
    assert [name for name, value in last.items() if torch.equal(value, first[name])] == ["rotary.inv_freq"]
    norms = [record["grad_norm"] for (kind, _), record in reference.records.items() if kind == "train"]
    assert min(norms) > 0.1, "clipping never acted"
    assert reference.state["loop.evaluations_without_improvement"] == 1
