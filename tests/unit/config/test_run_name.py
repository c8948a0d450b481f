"""Which names mean a checkpoint of a run, and which are paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.config.run_name import is_there, split_run


@pytest.mark.parametrize("which", ["best", "last", "step_7", "step_00000007"])
def test_a_run_and_what_is_meant_of_it(tmp_path: Path, which: str) -> None:
    for run in (tmp_path / "run", tmp_path / "a@best" / "b c"):
        named = f"{run}@{which}"
        assert split_run(named) == (str(run), which)
        assert not is_there(named)
        run.mkdir(parents=True)
        assert is_there(named)
        Path(named).mkdir()
        assert split_run(named) == split_run(Path(named)) == (named, None), "what exists is meant as it is"


@pytest.mark.parametrize(
    "text", ["run", "run@", "run@first", "run@step_", "run@step_x", "@best", "run@best/x"]
)
def test_other_names_are_paths(text: str) -> None:
    assert split_run(text) == (text, None)
    assert not is_there(text)
