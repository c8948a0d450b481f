"""What cannot be compared is refused in one line, with a cure that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.autoeval.compare import compare
from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from esm2mega.finetune.code_option import load_code
from esm2mega.train.pretrain import pretrain
from tests.infer_models import random_proteins
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS, tiny_run

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

PAIRS = [
    (text, text.count("K") + len(text) / 10) for text in random_proteins([9, 20, 31, 12, 18, 25, 40, 33])
]


def _tuned(folder: Path, name: str, *overrides: str) -> str:
    settings = [
        *SETTINGS,
        f"run_dir={folder / name}",
        "train.max_steps=1",
        "task.kind=regression",
        *overrides,
    ]
    return str(train_model(settings, train=PAIRS).checkpoint)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fine-tuned in one step each, in ways that differ."""
    folder = tmp_path_factory.mktemp("tuned")
    return {
        "plain": _tuned(folder, "plain"),
        "huber": _tuned(folder, "huber", "task.loss=huber"),
        "renamed": _tuned(folder, "renamed", "task.target_columns=[other]"),
    }


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "table.csv"
    path.write_text("sequence,target,other\n" + "".join(f"{text},{y},{y}\n" for text, y in PAIRS))
    return str(path)


def test_recipes_that_differ_are_refused_with_what_differs(
    finished: TinyRun, tuned: dict[str, str], table: str, tmp_path: Path
) -> None:
    """The cure is tried too."""
    shorter = tiny_run(
        f"data.train={finished.train}",
        "data.max_seq_length=32",
        "train.max_steps=1",
        run_dir=tmp_path / "shorter",
    )
    pretrain(shorter)
    sides = (str(finished.run_dir), str(shorter.run_dir))
    with pytest.raises(
        UserError, match=r"max_seq_length 64 and 32\); give data.max_seq_length=N or"
    ) as caught:
        compare(sides, str(finished.valid))
    assert "\n" not in str(caught.value)
    found = compare(sides, str(finished.valid), overrides=["data.max_seq_length=64"])
    assert found is not None and found["differences"]["loss"]["difference"] != 0.0

    sides = (tuned["plain"], tuned["huber"])
    with pytest.raises(UserError, match=r"loss mse and huber\); give the keys of task and data that differ"):
        compare(sides, table)
    found = compare(sides, table, overrides=["task.loss=mse", "task.bootstrap=5"])
    assert found is not None and list(found["differences"])[:2] == ["loss", "mse"]


def test_what_is_not_alike_is_refused(finished: TinyRun, tuned: dict[str, str], table: str) -> None:
    language = str(finished.run_dir)
    for sides in ((tuned["plain"], language), (language, tuned["plain"])):
        with pytest.raises(UserError, match="has the head of a task, .* is a language model; compare like"):
            compare(sides, table)
    with pytest.raises(UserError, match=r"different things \(regression of target; regression of other\)"):
        compare((tuned["plain"], tuned["renamed"]), table)
    columns = ["task.target_columns=[target]", "task.bootstrap=5"]
    assert compare((tuned["plain"], tuned["renamed"]), table, overrides=columns) is not None
    with pytest.raises(
        UserError, match="task.bootstrap=0 leaves no interval of metrics; give task.bootstrap="
    ):
        compare((tuned["plain"], tuned["huber"]), table, overrides=["task.bootstrap=0"])


def test_names_that_make_no_sense_are_one_line(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, data = str(finished.run_dir), ["--data", str(finished.valid)]
    for words, message in (
        ([f"{run},{run}@last", run], "step_00000004: is named twice on one side"),
        ([f"{run},", run], "a name is empty; give runs as RUN,RUN"),
        ([run, run, run], f"{run}: is an unexpected third argument; join the runs of one side by commas"),
        ([run, str(tmp_path / "absent")], "absent: no such checkpoint"),
        ([run, run, "--per-protein"], "--per-protein is written to a file; name it by --out FILE.json"),
        ([run, run, "--out", str(tmp_path)], "is a directory"),
        ([run, run, "--code", "tests.own_code:MeanHead"], "no checkpoint has a head of your own code"),
    ):
        assert main(["compare", *words, *data]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("esm2mega: error: ")


def test_a_path_with_a_comma_is_one_name(finished: TinyRun, tmp_path: Path) -> None:
    link = tmp_path / "a,b"
    link.symlink_to(finished.run_dir)
    found = compare((str(link), f"{link}@step_2"), str(finished.valid))
    assert found is not None and [len(found[side]) for side in "ab"] == [1, 1]


def test_each_gets_the_code_that_it_was_trained_with(
    tuned: dict[str, str], table: str, tmp_path: Path
) -> None:
    """A head of one alone is no hindrance; a loss of one alone is another recipe."""
    settings = [*SETTINGS, "train.max_steps=1", "task.kind=regression", "task.bootstrap=5"]
    code = load_code(["tests.own_code:MeanHead"])
    own = train_model([*settings, f"run_dir={tmp_path / 'own'}"], train=PAIRS, make_head=code.make_head)
    sides = (tuned["plain"], str(own.checkpoint))
    few = ["task.bootstrap=5"]
    with pytest.raises(UserError, match="give it as --code tests.own_code:MeanHead"):
        compare(sides, table, overrides=few)
    found = compare(sides, table, overrides=few, code=code)
    assert found is not None and "loss" in found["differences"]
    code = load_code(["tests.own_code:AbsoluteLoss"])
    absolute = train_model([*settings, f"run_dir={tmp_path / 'absolute'}"], train=PAIRS, loss=code.loss)
    with pytest.raises(UserError, match=r"class RegressionLossReduction and AbsoluteLoss"):
        compare((tuned["plain"], str(absolute.checkpoint)), table, overrides=few, code=code)
    path = str(absolute.checkpoint)
    found = compare((path, path), table, overrides=few, code=code)
    assert found is not None and found["differences"]["loss"]["difference"] == 0.0


def test_losses_in_other_units_are_left_out(tuned: dict[str, str], table: str, tmp_path: Path) -> None:
    """Targets are scaled by the labels of each training; metrics are in units of the labels."""
    scaled = [(sequence, 3 * value) for sequence, value in PAIRS]
    settings = [*SETTINGS, f"run_dir={tmp_path / 'run'}", "train.max_steps=1", "task.kind=regression"]
    other = str(train_model(settings, train=scaled).checkpoint)
    found: Any = compare((tuned["plain"], other), table, overrides=["task.bootstrap=20"])
    assert "loss" not in found["differences"] and "mse" in found["differences"]
    assert found["notes"] == [
        "the losses are in different units, which follow from the labels of each training"
    ]
    assert np.isfinite(found["b"][0]["loss"])
