"""Homes, number and time are expanded in paths, in nothing else, and not where a run would be lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esm2mega.config.keys import known_keys
from esm2mega.config.load import load_run
from esm2mega.config.paths import expanded, is_expanded
from esm2mega.config.schema import Run, choices, flatten
from esm2mega.errors import UserError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


def loaded(*words: str) -> Run:
    return load_run(None, ["model.size=tiny", *words])


def test_home_and_number_in_every_path_and_in_no_other_text() -> None:
    text = "~/x_{version}"
    keys = [key for key, kind in known_keys().items() if kind in (str, str | None) or key == "data.train"]
    open_keys = [key for key in keys if key not in choices(Run()) and key in flatten(Run())]
    run = loaded(*(f"{key}={text}" for key in open_keys), f"task.target_columns=['{text}']")
    before, after = flatten(run), flatten(expanded(run))
    assert all(before[key] == text for key in open_keys), "loading alone expands nothing"
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {
        *("run_dir", "init_from", "data.train", "data.valid", "data.test", "data.cache_dir"),
        *("checkpoint.resume", "task.label_file", "task.mask_file", "data.wild_type"),
    }
    assert {after[key] for key in changed} == {"/home/me/x_0"}


def test_a_run_goes_on_in_the_newest_directory_or_begins_the_next(tmp_path: Path) -> None:
    form = f"run_dir={tmp_path}/a{{version}}/r{{version}}5"
    assert expanded(loaded(form)).run_dir == f"{tmp_path}/a0/r05"
    for name in ("a0", "a2", "a10", "a011", "ab", "b77", "a12x"):
        (tmp_path / name).mkdir()
    assert expanded(loaded(form)).run_dir == f"{tmp_path}/a10/r105"
    never = expanded(loaded(form, "checkpoint.resume=never", "data.cache_dir=cache_{version}"))
    assert (never.run_dir, never.data.cache_dir) == (f"{tmp_path}/a11/r115", "cache_11")
    (tmp_path / "x3.y3").mkdir()
    (tmp_path / "x7.y6").mkdir()
    assert expanded(loaded(f"run_dir={tmp_path}/x{{version}}.y{{version}}")).run_dir == f"{tmp_path}/x3.y3"
    with pytest.raises(UserError, match=r"data.valid=v_\{version\}: .* put \{version\} into run_dir"):
        expanded(loaded("data.valid=v_{version}"))


def test_one_time_for_all_paths() -> None:
    run = loaded(
        "run_dir=runs/{time}", "checkpoint.resume=never", "data.cache_dir=${run_dir}/c", "data.train=[~/a, b]"
    )
    done = expanded(run)
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", done.run_dir)
    assert done.data.cache_dir == f"{done.run_dir}/c" and done.data.train == ["/home/me/a", "b"]
    assert run.run_dir == "runs/{time}" and is_expanded(done) and not is_expanded(run)


@pytest.mark.parametrize(
    "word", ["run_dir=a/~/b", "run_dir=a/{date}", "logging.wandb_run_name=~/{time}", "data.train=./~x"]
)
def test_what_is_no_placeholder_stays(word: str) -> None:
    run = loaded(word)
    assert is_expanded(run) and expanded(run) == run


def test_a_time_that_no_resume_could_find_is_refused() -> None:
    with pytest.raises(UserError, match="set checkpoint.resume=never, or name one"):
        expanded(loaded("run_dir={time}/x"))


def test_an_unknown_user_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.valid=~nobody_there/x: no home directory of ~nobody_there"):
        expanded(loaded("data.valid=~nobody_there/x"))
