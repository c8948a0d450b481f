"""A run that saves in the background leaves what one leaves that saves at once, and nothing else."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esm2mega.checkpoint import layout, saver
from esm2mega.checkpoint.digests import read_digests
from esm2mega.train.pretrain import pretrain
from tests.unit.conftest import TinyRun


def _tensors(checkpoint: Path) -> dict[str, Any]:
    entries = read_digests(checkpoint)
    assert entries is not None
    return {name: entry for name, entry in entries.items() if name.endswith((".distcp", "common.pt"))}


def test_a_run_saved_in_the_background_equals_one_saved_at_once(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a kill left is gone, and the last line names the last and the best checkpoint."""
    remains = tmp_path / "run" / "checkpoints" / "step_00000003.partial" / "model"
    remains.mkdir(parents=True)
    threads: list[str] = []
    work = saver._work

    def noting(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        work(*arguments)

    monkeypatch.setattr(saver, "_work", noting)
    settings = replace(finished.run.checkpoint, async_save=True)
    pretrain(replace(finished.run, run_dir=str(tmp_path / "run"), checkpoint=settings))
    assert threads == ["esm2mega-save"] * 2
    assert not any(thread.name == "esm2mega-save" for thread in threading.enumerate())
    names = sorted(path.name for path in layout.checkpoints_dir(finished.run_dir).iterdir())
    assert sorted(path.name for path in layout.checkpoints_dir(tmp_path / "run").iterdir()) == names
    for step in (2, 4):
        found, expected = (layout.step_dir(run_dir, step) for run_dir in (tmp_path / "run", finished.run_dir))
        assert len(_tensors(expected)) >= 1
        assert _tensors(found) == _tensors(expected)
        states = [layout.read_state(path) for path in (found, expected)]
        assert states[0] == states[1]
    assert f"done: step 4, checkpoint {layout.step_dir(tmp_path / 'run', 4)}" in capsys.readouterr().err
