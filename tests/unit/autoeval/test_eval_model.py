"""Short names of models, which are names of folders too."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.autoeval.eval_model import RANDOM, short_names, slug_of
from esm2mega.errors import UserError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        # No two of them share a folder, nor one with the random weights.
        (["runs/mine"], ["mine"]),
        (["runs/mine@step_4", "runs/mine@best", "runs/mine"], ["mine@step_4", "mine@best", "mine"]),
        (["a/run", "b/run", "b/other"], ["a-run", "b-run", "b-other"]),
        (["a/esm2.pt", "b/esm3.pt"], ["esm2", "esm3"]),
        (["esm2.pt", "esm2"], ["esm2.pt", "esm2"]),
        (["runs/random-weights", "runs/mine"], ["runs-random-weights", "runs-mine"]),
        ([".", "../other"], ["here", "other"]),
    ],
)
def test_names(given: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = short_names(given)
    assert found == names
    assert len({slug_of(name) for name in [RANDOM, *found]}) == len(found) + 1


@pytest.mark.parametrize("given", [["a", "b", "a"], ["x/a", "y", "./x/a"], ["x/a b", "y", "x/a-b"]])
def test_a_checkpoint_named_twice(given: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        short_names(given)
    assert str(caught.value).startswith(f"{given[-1]}: is named twice")
