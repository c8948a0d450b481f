"""Where a start takes its state from. Training itself is tested in tests/distributed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.tensors import TensorReader
from esm2mega.config.load import run_from_yaml
from esm2mega.data.store import TokenStore
from esm2mega.errors import UserError
from esm2mega.train.pretrain import find_resume, pretrain
from tests.unit.conftest import TinyRun
from tests.unit.runs import tiny_run


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint)
    return {name: reader.read(name) for name in reader.index if not name.startswith("optimizer.")}


def test_init_from_starts_with_the_weights_and_a_fresh_optimizer(finished: TinyRun, tmp_path: Path) -> None:
    """One step at a rate of almost 0 leaves the weights where they were."""
    changes = (
        f"init_from={finished.run_dir}",
        f"data.train={finished.train}",
        "train.max_steps=1",
        "optim.lr=1e-300",
    )
    loop = pretrain(tiny_run(*changes, "seed=5", run_dir=tmp_path))
    assert loop.step == 1
    expected, actual = _weights(layout.step_dir(finished.run_dir, 4)), _weights(layout.step_dir(tmp_path, 1))
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_resume_goes_on_where_the_run_stopped(finished: TinyRun, tmp_path: Path) -> None:
    """Back at step 2, the run ends as it did without a break, bit by bit."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(layout.step_dir(tmp_path / "run", 4))
    changes = ("train.eval_every=2", "checkpoint.save_every=2", f"data.valid={finished.valid}")
    pretrain(tiny_run(f"data.train={finished.train}", *changes, run_dir=tmp_path / "run"))
    expected, actual = (
        _weights(layout.step_dir(finished.run_dir, 4)),
        _weights(layout.step_dir(tmp_path / "run", 4)),
    )
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_epochs_take_every_protein_so_often(finished: TinyRun, tmp_path: Path) -> None:
    """Workers and padded batches included; the last step is filled up with packs that contribute nothing."""
    changes = (
        f"data.train={finished.train}",
        "train.max_epochs=3",
        "data.packing=bucket",
        "data.workers=1",
        "schedule.name=linear",
    )
    loop = pretrain(tiny_run(*changes, run_dir=tmp_path))
    state = layout.read_state(layout.step_dir(tmp_path, loop.step))
    assert state["data"]["consumed_samples"] == 3 * len(TokenStore(finished.train))
    packs = state["data"]["consumed_packs"]
    assert loop.step == -(-packs // 2) > 4  # two packs a step
    saved = run_from_yaml(tmp_path / "config.yaml")
    assert (saved.train.max_steps, saved.schedule.decay_steps) == (loop.step, loop.step * 9 // 10)
    with pytest.raises(UserError, match="train.max_epochs=4 differs from 3 of the checkpoint"):
        pretrain(tiny_run(*changes, "train.max_epochs=4", run_dir=tmp_path))


def test_two_stores_are_mixed(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = f"data.train=[{finished.train}, {finished.valid}]"
    pretrain(tiny_run(stores, "data.weights=[3, 1]", "train.max_steps=2", run_dir=tmp_path))
    said = capsys.readouterr().err
    assert f"data     45 sequences of {finished.train}, 75.00% of the samples" in said
    assert f"data     15 sequences of {finished.valid}, 25.00% of the samples" in said
    with pytest.raises(UserError, match=r"data.weights=\[32768, 32768\] differs from \[49152, 16384\]"):
        pretrain(tiny_run(stores, "data.weights=[1, 1]", "train.max_steps=3", run_dir=tmp_path))


def test_find_resume(finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert find_resume(tiny_run(run_dir=run_dir)) is None
    assert find_resume(tiny_run("checkpoint.resume=never", run_dir=run_dir)) is None
    shutil.copytree(finished.run_dir, run_dir)
    assert find_resume(tiny_run(run_dir=run_dir)) == layout.step_dir(run_dir, 4)
    assert capsys.readouterr().err == ""
    (layout.step_dir(run_dir, 4) / "COMPLETE").unlink()
    assert find_resume(tiny_run(run_dir=run_dir)) == layout.step_dir(run_dir, 2)
    assert (
        capsys.readouterr().err == f"esm2mega: ignoring {layout.step_dir(run_dir, 4)}: it has no COMPLETE\n"
    )
    named = layout.step_dir(finished.run_dir, 4)
    assert find_resume(tiny_run(f"checkpoint.resume={named}", run_dir=tmp_path / "new")) == named


def test_a_fresh_start_does_not_overwrite(finished: TinyRun) -> None:
    with pytest.raises(UserError, match="resume=never, but .* holds checkpoints up to step_00000004"):
        find_resume(tiny_run("checkpoint.resume=never", run_dir=finished.run_dir))


def test_another_shape_is_refused(finished: TinyRun) -> None:
    with pytest.raises(
        UserError, match="holds a model of .*num_layers=2.* the configuration says .*num_layers=3"
    ):
        find_resume(tiny_run("model.num_layers=3", run_dir=finished.run_dir))


def test_training_data_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train is not set"):
        pretrain(tiny_run(run_dir=tmp_path))
