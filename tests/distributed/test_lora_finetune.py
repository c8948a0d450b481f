"""Adapters trained with a head: the same at every layout, through a kill, and in predictions."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.prove.compare import Outcome
from esm2mega.prove.heads import ADAPTABLE, HEADS
from esm2mega.prove.layouts import Layout
from esm2mega.prove.prover import Prover
from esm2mega.prove.trials import GROUPS, Trial
from tests.checkpoints import full_tensors
from tests.distributed.runs import SETTINGS, kill_after_step_5, train
from tests.prove.short import packed, short_and_whole
from tests.ranks import run_ranks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


OF_HEAD = {
    head: [trial for trial in GROUPS["lora-heads"] if trial.label.startswith(f"head {head},")][:4]
    for head in ADAPTABLE
}
IN_TURN = {head: rows[number % len(rows)] for number, (head, rows) in enumerate(OF_HEAD.items())}
# Groups of parameters that differ between stages, and a resume: of heads for whole proteins.
MORE = [trial for trial in GROUPS["lora-heads"] if trial.processes == 4 or len(trial.layouts) == 2]
# Adapters in the last stage alone, which the distributed optimizer cannot have.
LAST = ("finetune.mode=lora", "lora.rank=3", "lora.target_modules=['*.4.*.linear_q']")
BARE = Trial((Layout(pp=2, packed=2),), "fp64", (*HEADS["mlp"], *LAST), "last stage", continues=True)
REFUSED = replace(BARE, layouts=(Layout(pp=2, dp=2, packed=3, distributed_optimizer=True),))


def check(prover: Prover, trials: list[Trial]) -> None:
    for verdict in list(prover.judge(trials)):
        if verdict.trial == REFUSED:
            assert "leaves a pipeline stage without weights to train" in str(verdict.error)
            continue
        assert verdict.error is None, f"{verdict.trial}: {verdict.error}"
        assert verdict.passed, f"{verdict.trial}: {verdict.largest.value:.1e} in {verdict.largest}"
        reference = prover.reference(verdict.trial)
        assert isinstance(reference, Outcome)
        (rank,) = reference.ranks
        last = rank["gradients"][-1]
        # Equal numbers prove nothing unless both factors and the head have gradients, and nothing else.
        assert {name.rpartition(".")[2] for name in last if "_lora." in name} == {"lora_A", "lora_B"}
        assert any(name.startswith("head.") for name in last)
        assert all("_lora." in name or name.startswith("head.") for name in last)
        # Attention maps of the last layer follow from its q and k alone.
        read = ("linear_q_", "linear_k_") if "attention_maps" in str(verdict.trial) else ("_lora.",)
        adapted = [name for name in last if "_lora." in name and any(part in name for part in read)]
        assert adapted and all(last[name][3].abs().max() > 1e-9 for name in adapted)


@short_and_whole(
    # One head for residues and one for pairs.
    [*(IN_TURN[head] for head in ("targets", "product")), MORE[0]],
    [*IN_TURN.values(), *MORE, BARE, REFUSED],
)
def test_adapters_and_heads_equal_one_process(
    prover: Prover, runs: Callable[[], AbstractContextManager[None]], trials: list[Trial]
) -> None:
    """One layout for each head, in turn; `esm2mega prove --layouts lora-heads` has all combinations."""
    # One layout is impossible for the regression on attention maps.
    assert all(len(rows) >= 3 for rows in OF_HEAD.values()) and len(MORE) == 2
    with runs():
        check(prover, trials)


@pytest.mark.slow
def test_adapters_below_attention_maps_equal_one_process(prover: Prover) -> None:
    """In all steps: weights of the maps and factors B start at zero, so that factors A move late."""
    check(prover, [packed(IN_TURN["attention_maps"])])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A pretrained model in fp64."""
    settings = {"model.precision": "fp64", "train.max_steps": 2}
    return train(tmp_path_factory.mktemp("base") / "run", store, settings).run_dir


def _table(path: Path) -> Path:
    rng = np.random.default_rng(5)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "target"])
        for length in rng.integers(20, 250, 40):
            sequence = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length))
            writer.writerow([sequence, sequence.count("K") / length])
    return path


def _killed_and_whole(base: Path, folder: Path, *settings: str) -> Path:
    """Directory of a training that was killed behind its first checkpoint and resumed.

    It must end as the unbroken one, bit for bit.
    """
    table, run_dir = _table(folder / "train.csv"), folder / "run"
    arguments = ["-m", "esm2mega", "finetune", f"init_from={base}", f"data.train={table}", *SETTINGS]
    arguments += ["task.kind=regression", "train.max_steps=15", "checkpoint.save_every=5"]
    arguments += ["checkpoint.keep_last=9", *settings]
    run_ranks([*arguments, f"run_dir={folder / 'whole'}"], 1, folder / "unbroken")
    kill_after_step_5([*arguments, f"run_dir={run_dir}"], run_dir, folder / "killed", seconds=240)
    last = "step_00000015"
    assert not (run_dir / "checkpoints" / last).exists(), "the run was too fast to be killed between"
    run_ranks([*arguments, f"run_dir={run_dir}"], 1, folder / "resumed")
    expected = full_tensors(folder / "whole" / "checkpoints" / last)
    actual = full_tensors(run_dir / "checkpoints" / last)
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []
    return run_dir


ADAPTED = ("finetune.mode=lora", "lora.rank=4", "lora.dropout=0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ADAPTED, id="adapters", marks=pytest.mark.slow),
        pytest.param(("finetune.mode=frozen",), id="frozen"),
    ],
)
def test_a_killed_run_in_bf16_goes_on_bit_for_bit(
    base: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Weights that are trained have main weights in fp32 beside them, frozen ones have none."""
    run_dir = _killed_and_whole(base, tmp_path, "model.precision=bf16", *settings)
    saved = full_tensors(run_dir / "checkpoints" / "step_00000015")
    kinds = {value.dtype for name, value in saved.items() if not name.startswith("optimizer.")}
    # The frequencies of the rotary positions are in fp32.
    assert torch.bfloat16 in kinds and kinds <= {torch.bfloat16, torch.float32}
    assert any("fp32_param" in name for name in saved)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_predicts_at_another_layout(base: Path, tmp_path: Path) -> None:
    run_dir = _killed_and_whole(base, tmp_path, "model.precision=fp64", *ADAPTED)
    table = tmp_path / "train.csv"
    found = []
    for name, size, layout in (
        ("one", 1, []),
        ("two", 2, ["parallel.tensor_model_parallel_size=2"]),
        ("four", 4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
    ):
        out = tmp_path / f"{name}.csv"
        words = ["-m", "esm2mega", "predict", str(run_dir), str(table), "--out", str(out), *layout]
        run_ranks(words, size, tmp_path / name)
        found.append(np.array([float(row["target"]) for row in csv.DictReader(out.open())]))
    assert len(found[0]) == 40 and found[0].std() > 1e-6
    for values in found[1:]:
        assert np.abs(values - found[0]).max() < 1e-10 * np.abs(found[0]).max()
