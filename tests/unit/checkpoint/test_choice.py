"""Which checkpoint of a run a name means, which is the best, and which may go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import best_checkpoint, choose_checkpoint, prune
from esm2mega.config.schema import CheckpointConfig
from esm2mega.errors import UserError
from tests.unit.conftest import TinyRun

TUNED = {"task": {"kind": "regression"}}


def _checkpoint(
    run_dir: Path, step: int, loss: float | None = None, complete: bool = True, **more: Any
) -> Path:
    """A checkpoint without tensors and configuration; `more` is the rest of its state."""
    directory = layout.step_dir(run_dir, step)
    directory.mkdir(parents=True)
    evaluation = None if loss is None else {"valid_loss": loss, "valid_r2": -1 / loss, "eval_recipe": "a"}
    state = {"step": step, "best_metric": "valid_loss", "loop": {"evaluation": evaluation}, **more}
    layout.write_state(directory, state)
    if complete:
        (directory / layout.COMPLETE).write_text("")
    return directory


def _left(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in layout.checkpoints_dir(run_dir).iterdir())


def _settings(keep_last: int, keep_best: int, best_metric: str = "valid_loss") -> CheckpointConfig:
    return CheckpointConfig(keep_last=keep_last, keep_best=keep_best, best_metric=best_metric)


def _chosen(named: str | Path, **given: bool) -> tuple[int, str | None]:
    choice = choose_checkpoint(named, **given)
    return layout.step_of(choice.path), choice.words


def test_of_a_fine_tuning_the_best_is_meant(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, None), (40, 2.5)):
        _checkpoint(tmp_path, step, loss, **TUNED)
    _checkpoint(tmp_path, 50, 1.0, complete=False, **TUNED)
    best, last = (layout.step_dir(tmp_path, step) for step in (20, 40))
    said = f"step 20, its best by valid_loss (2.0000): {best}; {tmp_path}@last is step 40"
    assert _chosen(tmp_path) == (20, f"{tmp_path}: {said}")
    assert _chosen(f"{tmp_path}@best") == (20, f"{tmp_path}@best: {said}")
    assert _chosen(tmp_path / "checkpoints")[0] == 20
    said = f"step 40, its last: {last}; {tmp_path}@best is step 20, by valid_loss (2.0000)"
    assert _chosen(f"{tmp_path}@last") == (40, f"{tmp_path}@last: {said}")
    for form in ("step_30", "step_00000030"):
        named = f"{tmp_path}@{form}"
        assert _chosen(named) == (30, f"{named}: {layout.step_dir(tmp_path, 30)}")
    assert _chosen(tmp_path, resuming=True) == (40, None)
    assert _chosen(f"{tmp_path}@best", resuming=True)[0] == 20
    assert _chosen(best) == _chosen(str(best)) == (20, None)


def test_of_a_pretraining_the_last_is_meant_and_the_best_named(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10, 2.0)
    last = _checkpoint(tmp_path, 20, 2.5)
    said = f"{tmp_path}: step 20, its last: {last}; {tmp_path}@best is step 10, by valid_loss (2.0000)"
    assert _chosen(tmp_path) == (20, said)
    last = _checkpoint(tmp_path, 30, 1.5)
    assert _chosen(tmp_path) == (
        30,
        f"{tmp_path}: step 30, its best by valid_loss (1.5000) and its last: {last}",
    )


@pytest.mark.parametrize("state", [TUNED, {}])
def test_without_a_best_the_last_is_meant(tmp_path: Path, state: dict[str, Any]) -> None:
    kept_none, unevaluated = tmp_path / "kept_none", tmp_path / "unevaluated"
    for step in (10, 20):
        _checkpoint(kept_none, step, float(step), **state, best_metric=None)
        _checkpoint(unevaluated, step, **state)
    for run_dir, reason in (
        (kept_none, "it keeps no best (checkpoint.keep_best=0)"),
        (unevaluated, "none of its checkpoints has a valid_loss"),
    ):
        last = layout.step_dir(run_dir, 20)
        assert best_checkpoint(run_dir) is None
        assert _chosen(run_dir) == (20, f"{run_dir}: step 20, its last: {last}; {reason}")
        with pytest.raises(UserError) as error:
            choose_checkpoint(f"{run_dir}@best")
        assert str(error.value) == f"{run_dir}@best: {reason}; use {run_dir}@last or {run_dir}@step_N"


def test_the_metric_of_the_run_decides(tmp_path: Path) -> None:
    """Of a run that changed it, the present one; both were evaluated throughout."""
    for step, loss in ((10, 0.5), (20, 2.0), (30, 1.0)):
        _checkpoint(tmp_path, step, loss, **TUNED, best_metric="valid_loss" if step < 30 else "valid_r2")
    best = best_checkpoint(tmp_path)
    assert best is not None and (best.step, best.metric, best.value) == (20, "valid_r2", -0.5)


def test_only_equal_evaluations_are_compared(tmp_path: Path) -> None:
    """Those of one recipe, on the same proteins."""
    evaluations = ((10, 1.0, "a", "p"), (15, 1.0, "b", "q"), (20, 3.0, "b", "p"), (30, 2.0, "b", "p"))
    for step, loss, recipe, proteins in (*evaluations, (40, 2.5, "b", "p")):
        loop = {"evaluation": {"valid_loss": loss, "eval_recipe": recipe}, "eval_proteins": proteins}
        _checkpoint(tmp_path, step, **TUNED, loop=loop)
    assert _chosen(tmp_path)[0] == 30


def test_states_of_an_earlier_version_are_compared(tmp_path: Path) -> None:
    for step, loss in ((10, 2.0), (20, 3.0), (30, None)):
        directory = _checkpoint(tmp_path, step)
        layout.write_state(
            directory, {"step": step, "valid_loss": loss, **TUNED, "loop": {"valid_loss": loss}}
        )
    assert _chosen(tmp_path)[0] == 10
    layout.write_state(directory, {"step": 30, "valid_loss": 1.0, "loop": None})
    assert _chosen(tmp_path)[0] == 30


def test_a_path_that_exists_is_meant_as_it_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _checkpoint(run, 10, 1.0, **TUNED)
    _checkpoint(run, 20, 2.0, **TUNED)
    assert _chosen(f"{run}@last")[0] == 20
    other = _checkpoint(tmp_path / "run@last", 5, 1.0, **TUNED)
    assert choose_checkpoint(f"{run}@last").path == other
    assert choose_checkpoint(f"{run}@last@last").path == other


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    incomplete = _checkpoint(tmp_path / "none", 20, complete=False)
    checkpoint = _checkpoint(tmp_path / "run", 10)
    _checkpoint(tmp_path / "run", 20)
    (tmp_path / "folds" / "fold_1" / "checkpoints").mkdir(parents=True)
    for named, message in (
        (incomplete, f"{incomplete}: not a complete checkpoint: the file COMPLETE is missing"),
        (
            tmp_path / "folds",
            f"{tmp_path}/folds: is the directory of a cross-validation, .* such as {tmp_path}/folds/fold_1",
        ),
        (tmp_path / "none", f"{tmp_path / 'none'}: holds no complete checkpoint"),
        (f"{tmp_path}@best", f"{tmp_path}: holds no complete checkpoint"),
        (
            tmp_path / "absent",
            "absent: no such checkpoint; give a step_XXXXXXXX directory or a run directory, or ",
        ),
        (tmp_path / "absent@best", "absent@best: no such checkpoint"),
        (tmp_path / "run@first", "run@first: no such checkpoint; .* or RUN@best, RUN@last or RUN@step_N"),
        (
            tmp_path / "run@step_3",
            "run@step_3: the run has no complete checkpoint of step 3; it has those of 10, 20",
        ),
        (f"{checkpoint}@best", "is a checkpoint, of which there is no @best; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            choose_checkpoint(named)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ((1, 0), [50]),
        ((2, 0), [40, 50]),
        ((1, 1), [20, 50]),
        ((2, 2), [10, 20, 40, 50]),
        ((1, 2, "valid_r2"), [10, 40, 50]),
    ],
)
def test_prune_keeps_newest_and_best(tmp_path: Path, settings: tuple[Any, ...], kept: list[int]) -> None:
    for step, loss in ((10, 2.5), (20, 2.0), (30, None), (40, 3.0), (50, None)):
        newest = _checkpoint(tmp_path, step, loss)
    removed = prune(tmp_path, _settings(*settings), newest)
    assert _left(tmp_path) == kept
    assert {layout.step_of(path) for path in removed} == {10, 20, 30, 40, 50} - set(kept)


def test_prune_never_removes_the_newest(tmp_path: Path) -> None:
    newest = _checkpoint(tmp_path, 10)
    assert prune(tmp_path, _settings(0, 0), newest) == []
    assert layout.is_complete(newest)


def test_prune_never_removes_what_was_just_written(tmp_path: Path) -> None:
    written = _checkpoint(tmp_path, 10, 9.0)
    for step in (20, 30):
        _checkpoint(tmp_path, step, 1.0)
    prune(tmp_path, _settings(1, 0), written)
    assert _left(tmp_path) == [10, 30]


def test_prune_neither_counts_nor_removes_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, loss in ((10, 2.0), (20, 3.0), (30, 1.0), (40, None)):
        newest = _checkpoint(tmp_path, step, loss)
    damaged = layout.step_dir(tmp_path, 30) / "train_state.json"
    damaged.write_text("{")
    for _ in range(2):
        prune(tmp_path, _settings(2, 1), newest)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "said once, however often a run saves"
    assert str(damaged) in said and "not evaluated" in said
    assert _left(tmp_path) == [10, 20, 30, 40], "two newest and the best, beside the damaged one"


def test_prune_removes_the_link_to_a_checkpoint_that_was_moved_away(tmp_path: Path) -> None:
    run_dir, away = tmp_path / "run", tmp_path / "away"
    for step in (10, 20, 30):
        newest = _checkpoint(run_dir, step)
    old = layout.step_dir(run_dir, 10)
    old.rename(away)
    old.symlink_to(away)
    assert prune(run_dir, _settings(1, 0), newest) == [old, layout.step_dir(run_dir, 20)]
    assert _left(run_dir) == [30] and layout.is_complete(away)


def test_a_removal_that_is_killed_leaves_an_incomplete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, newest = _checkpoint(tmp_path, 10), _checkpoint(tmp_path, 20)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layout.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, _settings(1, 0), newest)
    assert layout.find_checkpoints(tmp_path) == ([newest], [old])


def test_prune_removes_incomplete_ones_that_were_overtaken(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10, complete=False)
    newest = _checkpoint(tmp_path, 20)
    _checkpoint(tmp_path, 30, complete=False)
    prune(tmp_path, _settings(1, 1), newest)
    assert _left(tmp_path) == [20, 30]


def test_a_copied_run_is_found_where_it_lies(finished: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "copy")
    assert choose_checkpoint(tmp_path / "copy").path == layout.step_dir(tmp_path / "copy", 4)
