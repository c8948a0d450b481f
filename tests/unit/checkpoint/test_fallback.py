"""Which names take an older checkpoint for a damaged one, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import read_digests, unreadable
from esm2mega.checkpoint.fallback import Verification, choose_good, set_aside, share_of
from esm2mega.errors import DamagedError, MachineError, UserError
from tests.checkpoints import put_state
from tests.unit.checkpoint.test_digests import flip
from tests.unit.conftest import TinyRun


@pytest.fixture
def run_dir(finished: TinyRun, tmp_path: Path) -> Path:
    """A run with steps 2 and 4; of step 4 the tensors are damaged."""
    copy = tmp_path / "run"
    shutil.copytree(finished.run_dir, copy)
    flip(layout.step_dir(copy, 4) / "model" / "__0_0.distcp", 5000, 3)
    return copy


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["{}", "{}@last", "{}/checkpoints"])
@pytest.mark.parametrize("resuming", [False, True])
def test_the_newest_is_replaced_by_an_older_one(
    run_dir: Path, form: str, resuming: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run_dir)
    choice = choose_good(form.format(run_dir), resuming)
    assert choice.path == layout.step_dir(run_dir, 2)
    damaged = layout.step_dir(run_dir, 4) / "model" / "__0_0.distcp"
    reason = "is damaged: its SHA-256 is not that of digests.json"
    assert capsys.readouterr().err == f"esm2mega: {damaged}: {reason}; step_00000004 is passed over\n"
    assert files_of(run_dir) == before


@pytest.mark.parametrize("form", ["{}@step_4", "{}/checkpoints/step_00000004"])
def test_a_checkpoint_that_is_named_exactly_is_refused(run_dir: Path, form: str) -> None:
    with pytest.raises(DamagedError, match="__0_0.distcp: is damaged: .*; use another checkpoint, or copy"):
        choose_good(form.format(run_dir))


def test_so_is_the_best(run_dir: Path) -> None:
    """The newest is the best one here; a damaged record of another one leaves open which is."""
    assert choose_good(f"{run_dir}@step_2").path == layout.step_dir(run_dir, 2)
    state = layout.step_dir(run_dir, 2) / "train_state.json"
    flip(state, state.read_bytes().index(b'"step"') + 1)
    with pytest.raises(DamagedError, match=r"the best cannot be told; use .*@last or .*@step_N"):
        choose_good(f"{run_dir}@best")


def test_none_is_left(run_dir: Path) -> None:
    flip(layout.step_dir(run_dir, 2) / "config.yaml")
    with pytest.raises(
        UserError, match=r"all of its checkpoints are damaged \(step_00000004, step_00000002\)"
    ):
        choose_good(run_dir)


def test_an_error_of_reading_is_no_reason_to_take_another(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> str:
        raise unreadable(path, OSError(116, "Stale file handle"))

    monkeypatch.setattr("esm2mega.checkpoint.digests.content_sha256", stale)
    with pytest.raises(MachineError, match="Stale file handle"):
        choose_good(run_dir)


def test_large_files_can_be_left_to_all_ranks(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later, newest = Verification(with_large=False), layout.step_dir(run_dir, 4)
    assert choose_good(run_dir, verification=later).path == newest
    share_of(newest, 1, 2)  # the only file falls to rank 0
    with pytest.raises(DamagedError) as caught:
        share_of(newest, 0, 2)
    known = Verification(False, {newest: caught.value})
    assert choose_good(run_dir, verification=known).path == layout.step_dir(run_dir, 2)
    assert "step_00000004 is passed over" in capsys.readouterr().err
    # A file that was cut short is noticed without reading it.
    path = newest / "model" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert choose_good(run_dir, verification=later).path == layout.step_dir(run_dir, 2)


def test_an_earlier_version_is_said_to_be_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = layout.step_dir(run_dir, 4)
    (old / "digests.json").unlink()
    (old / "COMPLETE").write_text("")
    for _ in range(2):
        assert choose_good(f"{run_dir}@step_4").path == old
    said = "esm2mega: {}: of an earlier version, which wrote no digests; its files are not verified\n"
    assert capsys.readouterr().err == said.format(old)


def test_names_of_what_is_set_aside(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, error = layout.checkpoints_dir(run_dir), DamagedError("file", "is damaged", "copy it")
    set_aside(folder / "step_00000004", error)
    assert capsys.readouterr().err.endswith(f"step_00000004 is now {folder / 'step_00000004.damaged'}\n")
    for number in (1, 2):
        shutil.copytree(folder / "step_00000002", folder / "step_00000004")
        set_aside(folder / "step_00000004", error)
        assert (folder / f"step_00000004.damaged.{number}" / "COMPLETE").is_file()
    assert layout.find_checkpoints(run_dir) == ([folder / "step_00000002"], [])
    assert len(layout.find_set_aside(run_dir)) == 3


def test_a_run_that_means_its_best_means_the_next_best(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a fine-tuning, whose ``RUN`` is its best checkpoint; here that of step 4, the better of two."""
    steps = [layout.step_dir(run_dir, step) for step in (2, 4)]
    flip(steps[1] / "model" / "__0_0.distcp", 5000, 3)  # as it was
    for path in steps:
        put_state(path, {**layout.read_state(path), "task": {}})
    assert choose_good(run_dir).path == steps[1]
    flip(steps[1] / "model" / "__0_0.distcp", 6000)
    assert choose_good(run_dir).path == steps[0]
    assert "step_00000004 is passed over\n" in capsys.readouterr().err
    flip(steps[1] / "train_state.json", 40)
    assert choose_good(run_dir).path == steps[0], "without its record"
    with pytest.raises(DamagedError):
        choose_good(f"{run_dir}@best")


def test_what_its_run_removes_meanwhile_is_not_called_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = layout.step_dir(run_dir, 4)
    check = Verification.check

    def pruned(self: Verification, checkpoint: Path) -> None:
        if checkpoint == newest:
            layout.remove(newest)
        check(self, checkpoint)

    monkeypatch.setattr(Verification, "check", pruned)
    assert choose_good(run_dir).path == layout.step_dir(run_dir, 2)
    assert "passed over" not in capsys.readouterr().err
    with pytest.raises(DamagedError, match=r"is not there any more; .* removed .*; start this command again"):
        read_digests(newest)


@pytest.mark.parametrize("entry", ["esm2mega_version", "data", "step"])
def test_a_record_without_an_entry_is_damaged(run_dir: Path, entry: str) -> None:
    """As one flipped bit in its name makes it, where an earlier version wrote no checksum of it."""
    path = layout.step_dir(run_dir, 2)
    state = json.loads((path / "train_state.json").read_text())
    del state[entry], state["sha256"]
    (path / "train_state.json").write_text(json.dumps(state))
    (path / "digests.json").unlink()
    (path / "COMPLETE").write_text("")
    with pytest.raises(DamagedError, match=f"train_state.json: is damaged: it has no entry '{entry}'"):
        choose_good(path)
