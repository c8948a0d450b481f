"""Evaluation of labelled proteins: without labels the loss is null, and each loss names its recipe."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from esm2mega.finetune.evaluate import task_recipe
from esm2mega.finetune.losses import RegressionLossReduction, loss_of_task
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

KINDS = {
    "regression": ["task.target_columns=[number]"],
    "multilabel": ["task.target_columns=[a,b]"],
    "token_classification": ["task.target_columns=[letters]", "task.mask_column=mask"],
    "token_regression": ["task.target_columns=[numbers]"],
    "contact": ["task.target_columns=[atoms]"],
}
LORA = ["finetune.mode=lora", "lora.rank=2"]


def _table(path: Path, count: int, labelled: bool) -> Path:
    """Proteins with labels of every kind, or with all of them missing, masked or without coordinates."""
    rng = np.random.default_rng(count)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sequence", "number", "a", "b", "letters", "mask", "numbers", "atoms"])
        for number in range(count):
            length = 12 + number
            steps = rng.normal(size=(length, 3)).cumsum(axis=0).round(2).tolist()
            rows.writerow([
                "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length)),
                number if labelled else "",
                number % 2 if labelled else "",
                number % 3 // 2 if labelled else "",
                "".join(rng.choice(list("CEH"), length)),
                ("1" if labelled else "0") * length,
                " ".join(["0.5", "nan"][not labelled] for _ in range(length)),
                json.dumps(steps if labelled else [None] * length),
            ])  # fmt: skip
    return path


@pytest.mark.some(3)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_predict_is_null(
    finished: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """In the record of a test, in its line, and in `evaluate`; with LoRA for one kind."""
    train, nothing = _table(tmp_path / "train.csv", 6, True), _table(tmp_path / "nothing.csv", 3, False)
    settings = [*SETTINGS, f"task.kind={kind}", *KINDS[kind], f"data.train={train}", "train.max_steps=1"]
    if kind == "regression":
        settings += [*LORA, f"init_from={finished.run_dir}"]
    with pytest.raises(UserError, match="nothing.csv: every label of its 3 proteins is missing or masked"):
        train_model([*settings, f"run_dir={tmp_path / 'refused'}", f"data.valid={nothing}"])
    assert not (tmp_path / "refused").exists()

    run_dir, out = tmp_path / "run", tmp_path / "result.json"
    trained = train_model([*settings, f"run_dir={run_dir}", f"data.test={nothing}"])
    assert "step 1: test loss none: nothing to predict\n" in capfd.readouterr().err
    record = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])
    values = [value for name, value in record.items() if name.startswith("test_")]
    assert record["kind"] == "test" and len(values) > 3 and set(values) == {None}

    assert main(["evaluate", str(run_dir), "--data", str(nothing), "--out", str(out)]) == 0
    assert "loss: null\n" in capfd.readouterr().out
    found = json.loads(out.read_text())
    metrics = {name.removeprefix("test_") for name in record if name.startswith("test_")}
    assert {found[name] for name in metrics} == {None} and found["num_labels"] == 0
    assert not found["intervals"]
    assert found["eval_recipe"] == record["eval_recipe"] == trained.metrics["eval_recipe"]
    if kind != "regression":
        return
    # Several tables in one command, each with a result of its own.
    other, both = (
        tmp_path / "other.json",
        ["evaluate", str(run_dir), "--data", str(nothing), "--data", str(train)],
    )
    assert main([*both, "--out", str(out), "--out", str(other)]) == 0
    said = capfd.readouterr().out
    assert said.count("\nloss: ") == 2 and f"\n\ncheckpoint: {found['checkpoint']}\ndata: {train}\n" in said
    assert json.loads(out.read_text())["num_labels"] == 0 < json.loads(other.read_text())["num_labels"]
    for files, message in (
        ([out], "--out is given 1 times, --data 2 times; give a file for each, or none"),
        ([out, out], f"--out {out}: each result needs a file of its own"),
    ):
        assert main([*both, *(word for file in files for word in ("--out", str(file)))]) == 2
        assert message in capfd.readouterr().err


def test_a_part_without_labels_is_refused_too(tmp_path: Path) -> None:
    """Of 30 proteins one has a label, and an evaluation takes one pack of one or two proteins."""
    pairs = [("LAGV" * 10 + "ACDEFGHIKL"[i % 10] * (i // 10), float("nan")) for i in range(29)]
    valid = [*pairs, ("MKTL", 1.0)]
    settings = [*SETTINGS, f"run_dir={tmp_path}", "task.kind=regression", "train.eval_batches=1"]
    with pytest.raises(UserError, match=r"is missing or masked in train.eval_batches=1 packs, so"):
        train_model(
            [*settings, "train.micro_batch_tokens=64", "train.global_batch_tokens=64"],
            train=[("MKTLAG", 1.0), ("MKV", 2.0)],
            valid=valid,
        )


def test_the_recipe_is_what_the_loss_depends_on() -> None:
    task, data = TaskConfig(kind="regression"), DataConfig()
    info = TargetInfo("regression", ["target"], mean=[0.0], std=[1.0])

    def recipe(data: DataConfig = data, seed: int = 1, **changes: object) -> str:
        changed = replace(task, **changes)  # type: ignore[arg-type]
        return task_recipe(changed, data, seed, loss_of_task(changed, info))

    known = recipe()
    assert len(known) == 12 and recipe() == known
    assert recipe(seed=2) == recipe(dropout=0.5) == known == recipe(replace(data, mlm_probability=0.5))
    cropped = replace(data, too_long="crop")
    others = {
        recipe(loss="huber"),
        recipe(scale_targets=False),
        recipe(replace(data, max_seq_length=64)),
        recipe(replace(data, too_long="drop")),
        recipe(cropped),
        recipe(cropped, seed=2),
        recipe(replace(cropped, crop="start")),
        task_recipe(task, data, 1, type("Mine", (RegressionLossReduction,), {})()),
    }
    assert len(others | {known}) == 9
