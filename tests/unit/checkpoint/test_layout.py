"""Which directory is a checkpoint, and what it says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega import files
from esm2mega.checkpoint import layout
from esm2mega.errors import DamagedError, MachineError, UserError
from esm2mega.vocabulary import TOKENIZER_HASH
from tests.unit.runs import tiny_run


def _checkpoint(run_dir: Path, step: int, valid_loss: float | None = None, complete: bool = True) -> Path:
    """A checkpoint without tensors."""
    directory = layout.step_dir(run_dir, step)
    partial = layout.partial_dir(directory)
    (partial / layout.MODEL).mkdir(parents=True)
    layout.write_description(partial, tiny_run(run_dir=run_dir), {"step": step, "valid_loss": valid_loss})
    if complete:
        layout.complete(partial, directory)
    else:
        partial.rename(directory)
    return directory


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def _left(run_dir: Path) -> list[str]:
    return sorted(path.name for path in layout.checkpoints_dir(run_dir).iterdir())


def test_names(tmp_path: Path) -> None:
    assert layout.step_dir(tmp_path, 42) == tmp_path / "checkpoints" / "step_00000042"
    assert layout.partial_dir(layout.step_dir(tmp_path, 42)).name == "step_00000042.partial"


def test_complete_gives_the_name_last(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path, 3)
    assert layout.is_complete(directory)
    assert _left(tmp_path) == ["step_00000003"]


def test_complete_replaces_what_has_the_name(tmp_path: Path) -> None:
    """A directory of that step without COMPLETE, left by a crash on a file system without atomic renames."""
    stale = layout.step_dir(tmp_path, 3)
    stale.mkdir(parents=True)
    (stale / "stale").write_text("")
    directory = _checkpoint(tmp_path, 3)
    assert layout.is_complete(directory)
    assert not (directory / "stale").exists()


def test_find_sorts_and_separates(tmp_path: Path) -> None:
    for step in (100, 20):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 60, complete=False)
    for other in ("step_00000007.partial", "step_7", "best"):
        (layout.checkpoints_dir(tmp_path) / other).mkdir()
    complete, incomplete = layout.find_checkpoints(tmp_path)
    assert _names(complete) == ["step_00000020", "step_00000100"]
    assert _names(incomplete) == ["step_00000060"]
    assert layout.find_checkpoints(tmp_path / "absent") == ([], [])


def test_state_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = _checkpoint(tmp_path, 10, None)
    layout.write_state(checkpoint, {"step": 10, "valid_loss": 2.0})
    assert layout.read_state(checkpoint)["valid_loss"] == 2.0

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(MachineError, match="train_state.json: cannot be written: No space left"):
        layout.write_state(checkpoint, {"step": 10, "valid_loss": 3.0})
    assert layout.read_state(checkpoint)["valid_loss"] == 2.0
    assert not list(checkpoint.glob(".*"))


def test_state_and_configuration_come_back(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, 10, 2.5)
    state = layout.read_state(checkpoint)
    assert (state["step"], state["valid_loss"], state["format_version"]) == (10, 2.5, 1)
    assert layout.read_config(checkpoint) == tiny_run(run_dir=tmp_path)
    assert TOKENIZER_HASH in (checkpoint / "config.yaml").read_text()


def test_state_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _checkpoint(tmp_path, 10) / "train_state.json"
    with monkeypatch.context() as later:
        later.setattr(layout, "FORMAT_VERSION", 2)
        layout.write_state(path.parent, {"step": 10})
    with pytest.raises(UserError, match=r"train_state.json: format version 2, this esm2mega reads 1"):
        layout.read_state(path.parent)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", pytest.param("[" * 99999, id="deep")])
def test_damaged_state_is_refused(tmp_path: Path, content: str) -> None:
    path = _checkpoint(tmp_path, 10) / "train_state.json"
    path.write_text(content)
    with pytest.raises(DamagedError, match="train_state.json: is damaged"):
        layout.read_state(path.parent)
    path.unlink()
    with pytest.raises(DamagedError, match="train_state.json: is missing; use another checkpoint"):
        layout.read_state(path.parent)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10) / "config.yaml"
    path.write_text(path.read_text().replace(TOKENIZER_HASH, "another"))
    with pytest.raises(
        UserError, match=f"made with another tokenizer .another.; this version has {TOKENIZER_HASH}"
    ):
        layout.read_config(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        *("", "a: [", "just words", "tokenizer: words", "- 1", "tokenizer: {hash: 2026-99-99}", "é: 1"),
        pytest.param("a: " + "[" * 900 + "]" * 900, id="deep"),
    ],
)
def test_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    path = _checkpoint(tmp_path, 10) / "config.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as error:
        layout.read_config(path.parent)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
