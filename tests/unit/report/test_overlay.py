"""Runs over each other: which keys differ, whose numbers are whose, and what a loss is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.report.curves import loss_label
from esm2mega.report.log import JsonlLog
from esm2mega.report.overlay import _figure, differing_keys, final_numbers, plot_runs, unique_names
from esm2mega.report.run_records import read_run


def make(run: Path, lr: float, loss: float, recipe: str = "ab") -> Path:
    with JsonlLog(run / "log.jsonl") as log:
        for step in (10, 20):
            log.write(
                {"kind": "train", "step": step, "loss": loss + 1 / step, "lr": lr, "tokens_per_second": 9.0}
            )
        log.write({"kind": "eval", "step": 20, "valid_loss": loss, "eval_recipe": recipe})
    (run / "config.yaml").write_text(f"seed: 1\noptim:\n  lr: {lr}\nrun_dir: {run.name}\n")
    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path / "x" / "run", 1e-3, 2.5), make(tmp_path / "y" / "run", 2e-3, 2.25)


def test_keys_that_differ_and_numbers_stand_in_the_column_of_their_run(pair) -> None:
    runs = {str(n): read_run(run) for n, run in enumerate(pair)}
    assert differing_keys(runs) == {"optim.lr": ["0.001", "0.002"]}
    assert final_numbers(runs)["Validation loss"] == ["2.5000 nats at step 20", "2.2500 nats at step 20"]


def test_every_panel_has_a_line_for_each_run_with_its_own_values(pair) -> None:
    axes = _figure({"a": read_run(pair[0]), "b": read_run(pair[1])}).axes
    assert [line.get_label() for line in axes[0].lines] == ["a", "b"]
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[2.5], [2.25]]
    assert axes[0].get_title(loc="left") == "training: masked cross-entropy (nats per residue)"


def test_the_page_goes_where_it_is_told_and_nowhere_else(pair, tmp_path: Path, capsys) -> None:
    out = tmp_path / "page"
    assert main(["plot", *map(str, pair), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "report.png"), str(out / "report.html")]
    page = (out / "report.html").read_text()
    assert "x/run and y/run" in page and "<td>0.002</td>" in page
    assert "cannot be compared" not in page
    assert sorted(path.name for path in pair[0].iterdir()) == ["config.yaml", "log.jsonl"]


def test_the_page_of_one_run_may_go_elsewhere_too(pair, tmp_path: Path, capsys) -> None:
    out = tmp_path / "pages" / "x"
    assert main(["plot", str(pair[0]), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "report.png"), str(out / "report.html")]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.png"]
    assert sorted(path.name for path in pair[0].iterdir()) == ["config.yaml", "log.jsonl"]


def test_other_recipes_are_named(pair, tmp_path: Path) -> None:
    other = make(tmp_path / "z", 1e-3, 2.0, recipe="cd")
    plot_runs([pair[0], other], tmp_path / "page")
    assert "evaluation recipes differ" in (tmp_path / "page" / "report.html").read_text()


def test_refusals(pair, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="named twice"):
        plot_runs([pair[0], pair[0].parent / "." / "run"], tmp_path / "page")
    assert main(["plot", *map(str, pair)]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert unique_names(["/r/a", "/r/b"]) == ["a", "b"]
    assert unique_names(["/r/1/a", "/r/2/a"]) == ["1/a", "2/a"]


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, "masked cross-entropy (nats per residue)"),
        ({"task.kind": ""}, "masked cross-entropy (nats per residue)"),
        (
            {"task.kind": "regression", "task.loss": "mse", "task.scale_targets": "True"},
            "mean squared error (standard deviations of the training labels, squared)",
        ),
        (
            {"task.kind": "token_regression", "task.loss": "mse", "task.scale_targets": "False"},
            "mean squared error (units of the labels, squared)",
        ),
        (
            {"task.kind": "regression", "task.loss": "huber", "task.scale_targets": "True"},
            "Huber loss (standard deviations of the training labels)",
        ),
        ({"task.kind": "multilabel"}, "binary cross-entropy (nats per label)"),
        ({"task.kind": "contact"}, "binary cross-entropy (nats per pair of residues)"),
    ],
)
def test_a_loss_has_its_name_and_unit(config: dict[str, str], label: str) -> None:
    assert loss_label(config, is_task=bool(config.get("task.kind"))) == label


def test_a_fine_tuning_without_its_configuration_has_just_a_loss() -> None:
    assert loss_label({}, is_task=True) == "loss"
