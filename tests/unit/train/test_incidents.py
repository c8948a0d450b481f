"""What training makes of packs, labels and rates that give no finite numbers, in one process."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import TrainStream
from esm2mega.errors import MachineError
from esm2mega.finetune.run import finetune
from esm2mega.train import loop as loop_module
from esm2mega.train.pretrain import pretrain
from esm2mega.train.sound import all_finite
from esm2mega.train.step import StepResult, train_step
from tests.broken_protein import broken, write_proteins
from tests.checkpoints import full_tensors
from tests.unit.runs import CPU, packed_batch, tiny_run, train_state


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 random proteins, of which p30 alone has pyrrolysines."""
    folder = tmp_path_factory.mktemp("incidents")
    write_proteins(folder / "all.fasta")
    prepare_fasta([folder / "all.fasta"], folder / "data")
    return folder / "data" / "train"


def _train(store: Path, run_dir: Path, *changes: str) -> None:
    steps = ("train.max_steps=12", "checkpoint.save_every=3", "checkpoint.keep_last=9", "data.pack_window=40")
    pretrain(tiny_run(f"data.train={store}", *steps, *changes, run_dir=run_dir))


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]


def _last(run_dir: Path, step: int = 12) -> dict[str, torch.Tensor]:
    return full_tensors(layout.step_dir(run_dir, step))


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_skipped_pack_stays_skipped_when_the_run_is_resumed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the process dies before it saves again, and the fault does not come a second time."""
    with broken("infinite"):
        _train(store, tmp_path / "whole", "train.on_nonfinite=rollback")
    (record,) = _records(tmp_path / "whole")
    calls = 0

    def interrupted(*given: Any) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == record["step"] + 2:
            raise KeyboardInterrupt
        return train_step(*given)

    monkeypatch.setattr(loop_module, "train_step", interrupted)
    with broken("infinite"), pytest.raises(KeyboardInterrupt):
        _train(store, tmp_path / "died", "train.on_nonfinite=rollback")
    monkeypatch.undo()
    _train(store, tmp_path / "died", "train.on_nonfinite=rollback")
    assert _same(_last(tmp_path / "died"), _last(tmp_path / "whole"))
    state = layout.read_state(layout.step_dir(tmp_path / "died", 12))
    assert state["incidents"]["skipped_packs"] == [record["packs"][0]["pack"]]


def test_a_run_without_checkpoint_goes_back_to_its_start(store: Path, tmp_path: Path) -> None:
    """The log then has each step once, and nothing is set aside."""
    for mode, changes in (("infinite", ("train.on_nonfinite=rollback",)), ("absent", ())):
        with broken(mode):
            _train(store, tmp_path / mode, "checkpoint.save_every=0", *changes)
    assert _same(_last(tmp_path / "infinite"), _last(tmp_path / "absent"))
    log = [json.loads(line) for line in (tmp_path / "infinite" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(1, 13))
    assert len(_records(tmp_path / "infinite")) == 1
    assert not list((tmp_path / "infinite").glob("*.jsonl.1"))


def test_adapters_follow_the_same_policy(store: Path, tmp_path: Path) -> None:
    _train(store, tmp_path / "base", "train.max_steps=1")
    lora = (f"init_from={tmp_path / 'base'}", "lora.rank=3", "lora.dropout=0.1")
    for mode, changes in (("infinite", ("train.on_nonfinite=rollback",)), ("absent", ())):
        with broken(mode):
            _train(store, tmp_path / mode, *lora, *changes)
    assert _same(_last(tmp_path / "infinite"), _last(tmp_path / "absent"))


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_fine_tuning_skips(store: Path, tmp_path: Path, mode: str) -> None:
    _train(store, tmp_path / "base", "train.max_steps=1")
    data = TokenStore(store)
    rows = [f"{i},{'O' * 9 if i == 7 else 'MKT'}{'AG' * i},{i / 3}\n" for i in range(16)]
    assert len(data) == 60
    (tmp_path / "labels.csv").write_text("id,sequence,target\n" + "".join(rows))
    task = ("task.kind=regression", f"finetune.mode={mode}", f"init_from={tmp_path / 'base'}")
    run = tiny_run(
        f"data.train={tmp_path / 'labels.csv'}",
        *(*task, "train.on_nonfinite=skip", "checkpoint.save_every=1", "checkpoint.keep_last=9"),
        run_dir=tmp_path / "run",
    )
    with broken("infinite"):
        finetune(run)
    bad = [record["step"] for record in _records(tmp_path / "run")]
    assert bad and len(bad) < 4
    for record in _records(tmp_path / "run"):
        (pack,) = record["packs"]
        assert "7" in pack["proteins"]
    before, behind = (
        (_last(tmp_path / "run", step) for step in (bad[0] - 1, bad[0])) if bad[0] > 1 else ({}, {})
    )
    assert _same(before, behind)


@pytest.mark.some(4)
@pytest.mark.parametrize("rate", ["1e30", "1e160"])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("in_background", [False, True], ids=["at_once", "in_background"])
def test_weights_that_an_update_has_ruined_are_not_saved(
    store: Path, tmp_path: Path, policy: str, rate: str, in_background: bool
) -> None:
    """The rate of the first step is 0, and the second step still has a finite loss."""
    precision = "fp64" if rate == "1e160" else "fp32"
    changes = ("schedule.warmup_steps=1", "checkpoint.save_every=1", f"model.precision={precision}")
    changes = (*changes, f"checkpoint.async_save={str(in_background).lower()}")
    with pytest.raises(MachineError, match="step 2: weights or optimizer are not finite, or give no finite"):
        _train(store, tmp_path, f"optim.lr={rate}", f"train.on_nonfinite={policy}", *changes)
    assert [path.name for path in layout.checkpoints_dir(tmp_path).iterdir()] == ["step_00000001"]
    assert len(_records(tmp_path)) == (3 if policy == "rollback" else 1)


def test_a_number_that_is_none_is_found_in_weights_and_moments(world: None) -> None:
    state = train_state(tiny_run("model.precision=fp32"))
    train_step(state, [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9})])
    held: Sequence[torch.Tensor] = [
        next(state.model[0].parameters()),
        next(iter(state.optimizer.chained_optimizers[0].optimizer.state.values()))["exp_avg_sq"],
    ]
    assert all_finite(state.model, state.optimizer, CPU)
    for tensor in held:
        for value in (math.nan, math.inf, -math.inf):
            kept = tensor.detach().flatten()[3].clone()
            tensor.detach().view(-1)[3] = value
            assert not all_finite(state.model, state.optimizer, CPU)
            tensor.detach().view(-1)[3] = kept
    assert all_finite(state.model, state.optimizer, CPU)


def test_a_fresh_start_keeps_the_incidents_of_another(store: Path, tmp_path: Path) -> None:
    with broken("infinite"), pytest.raises(MachineError):
        _train(store, tmp_path, "checkpoint.save_every=0")
    first = (tmp_path / "incidents.jsonl").read_text()
    with broken("infinite"):
        _train(store, tmp_path, "checkpoint.save_every=0", "train.on_nonfinite=skip")
    assert (tmp_path / "incidents.jsonl.1").read_text() == first
    assert len(_records(tmp_path)) == 1
    shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_packs_are_padding_and_count(store: Path, workers: int) -> None:
    run = tiny_run(f"data.workers={workers}")
    spec = BatchSpec(run.data, 128, run.seed)
    with (
        TrainStream([TokenStore(store)], spec, 0, 2) as whole,
        TrainStream([TokenStore(store)], spec, 0, 2) as part,
    ):
        part.skip([2, 5])
        for number in range(4):
            expected, found = next(whole), next(part)
            assert whole.state == part.state
            if number == 1:  # packs 2 and 3 are the second ones of the ranks
                assert found.num_tokens == 0 and not len(found.labels)
            else:
                assert torch.equal(expected.input_ids, found.input_ids)
