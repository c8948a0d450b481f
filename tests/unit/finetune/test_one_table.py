"""One table of variants, as people have it: cut, trained on, tested again, predicted, resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.finetune.api import train_model
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(6)
LETTERS = "LAGVSERTIDPKQNFYMHWC"
WILD = "".join(RNG.choice(list(LETTERS), 30))


def variants(count: int) -> list[tuple[str, float]]:
    found = {}
    while len(found) < count:
        place, letter = int(RNG.integers(30)), str(RNG.choice(list(LETTERS)))
        if WILD[place] != letter:
            found[f"{WILD[place]}{place + 1}{letter}"] = round(float(RNG.normal()), 3)
    return list(found.items())


ROWS = [*variants(40), ("WT", 0.0), (f"p.{WILD[4]}5del", -1.0)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one table in which numbers have decimal commas."""
    folder = tmp_path_factory.mktemp("one_table")
    lines = [f"{variant};{str(value).replace('.', ',')}" for variant, value in ROWS]
    (folder / "t.csv").write_text("mutant;target\n" + "\n".join(lines) + "\n")
    (folder / "wt.fasta").write_text(f">enzyme\n{WILD}\n")
    assert main(["finetune", *settings(folder)]) == 0
    return folder / "run"


def settings(folder: Path) -> list[str]:
    return [
        *SETTINGS,
        *("task.kind=regression", "task.bootstrap=0", "train.max_steps=2", "train.eval_every=2"),
        *(f"run_dir={folder / 'run'}", f"data.train={folder / 't.csv'}", "data.numbers=decimal_comma"),
        *(f"data.wild_type={folder / 'wt.fasta'}", "data.split=0.6/0.2/0.2"),
    ]


def test_the_test_split_of_the_run_is_a_table_to_evaluate_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (tested,) = [record for record in records if record["kind"] == "test"]
    out = tmp_path / "e.json"
    best = str(choose_checkpoint(run).path)
    assert main(["evaluate", best, "--data", str(run / "splits" / "test.csv"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["loss"] == tested["test_loss"] and found["spearman"] == tested["test_spearman"]
    ids = [example["id"] for example in found["predictions"]]
    assert len(ids) == 8 and set(ids) <= {variant for variant, _ in ROWS}


def test_variants_are_predicted_as_their_sequences(run: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("mutant\nWT\n")
    (tmp_path / "s.csv").write_text(f"id,sequence\nWT,{WILD}\n")
    values = []
    for name, *more in (("v", f"data.wild_type={run.parent / 'wt.fasta'}"), ("s",)):
        out = tmp_path / f"{name}.out.csv"
        assert main(["predict", str(run), str(tmp_path / f"{name}.csv"), "--out", str(out), *more]) == 0
        with out.open() as file:
            values.append(list(csv.DictReader(file)))
    assert values[0] == values[1] and values[0][0]["id"] == "WT"


def test_a_resumed_run_with_another_split_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (run / "splits").iterdir()}
    longer = [text for text in settings(run.parent) if not text.startswith("train.max_steps")]
    assert main(["finetune", *longer, "train.max_steps=4", "data.split_seed=1"]) == 2
    assert "was trained on other labels than data.train holds now" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "splits").iterdir()} == before


def test_proteins_of_a_program_are_cut_too(tmp_path: Path) -> None:
    proteins = [("".join(RNG.choice(list(LETTERS), 12)), float(i)) for i in range(20)]
    given = [
        *SETTINGS,
        *("task.kind=regression", "train.max_steps=1", "train.eval_every=1", f"run_dir={tmp_path / 'run'}"),
    ]
    train_model([*given, "data.split=0.5/0.25/0.25"], train=proteins)
    counts = [
        len((tmp_path / "run" / "splits" / f"{split}.csv").read_text().splitlines()) - 1
        for split in ("train", "valid", "test")
    ]
    assert counts == [10, 5, 5]
    with pytest.raises(UserError, match="cut data.train into all splits, and valid is given too"):
        train_model([*given, "data.split=0.5/0.5"], train=proteins, valid=proteins[:2])


def test_a_limit_holds_for_every_split_and_for_evaluations_that_ask_for_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text for text in settings(run.parent) if not text.startswith("run_dir")]
    assert main(["finetune", *given, f"run_dir={tmp_path / 'run'}", "data.limit=5"]) == 0
    said = capsys.readouterr().err
    for split, total in (("train", 25), ("valid", 9), ("test", 8)):
        assert f"the first 5 of {total} proteins of data.{split} are taken (data.limit=5)" in said
        written = (tmp_path / "run" / "splits" / f"{split}.csv").read_text().splitlines()
        assert written[1:] == (run / "splits" / f"{split}.csv").read_text().splitlines()[1:6]
    counts = []
    for words in ([], ["data.limit=5"]):
        out = tmp_path / "e.json"
        table = str(run / "splits" / "test.csv")
        assert main(["evaluate", str(tmp_path / "run"), "--data", table, "--out", str(out), *words]) == 0
        counts.append(json.loads(out.read_text())["num_sequences"])
        out.unlink()
    assert counts == [8, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.split=0.8/0.1"], "data.split=0.8/0.1 adds up to 0.9; the shares must add up to 1"),
        (["data.split=80"], "data.split=80 must be shares above 0"),
        (["data.split=1/0"], "data.split=1/0 must be shares above 0"),
        (["data.split=0.8/0.2", "data.valid=x.csv"], "cuts data.train into all splits, and data.valid=x.csv"),
        (["data.split_by=cluster:0.5"], "data.split_by=cluster:0.5 needs the shares of the splits"),
        (["data.split=0.8/0.2", "data.split_by=cluster:50"], "the identity behind cluster: must be above 0"),
        (["data.split=0.8/0.2", "data.split_by=cluster:x"], "the identity behind cluster: must be above 0"),
        (["data.split=0.8/0.2", "data.split_by=family"], "t.csv: no column 'family' among mutant, target"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text for text in settings(run.parent) if not text.startswith(("data.split", "run_dir"))]
    assert main(["finetune", *given, f"run_dir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_pretraining_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKT\n")
    given = [*SETTINGS, f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'a.fasta'}"]
    assert main(["pretrain", *given, "data.split=0.8/0.2"]) == 2
    assert "and this is a pretraining; set data.split=null" in capsys.readouterr().err


def test_masks_of_a_file_stand_beside_the_splits(tmp_path: Path) -> None:
    """The split of the run is evaluated as in the run, also when the file is gone."""
    sequences = ["".join(RNG.choice(list(LETTERS), n)) for n in RNG.integers(8, 30, 12)]
    states = ["".join("HEC"[ord(letter) % 3] for letter in s) for s in sequences]
    rows = [f"p{n},{s},{x}" for n, (s, x) in enumerate(zip(sequences, states, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(["id,sequence,target", *rows]) + "\n")
    masks = ["".join(RNG.choice(["0", "1"], len(s))) for s in sequences]
    (tmp_path / "m.fasta").write_text("".join(f">p{n}\n{mask}\n" for n, mask in enumerate(masks)))
    words = ["task.kind=token_classification", "task.bootstrap=0", "train.max_steps=2", "train.eval_every=2"]
    words += [f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 't.csv'}", "data.split=0.6/0.2/0.2"]
    assert main(["finetune", *SETTINGS, *words, f"task.mask_file={tmp_path / 'm.fasta'}"]) == 0
    (tmp_path / "m.fasta").unlink()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (tested,) = [record for record in records if record["kind"] == "test"]
    table, out = tmp_path / "run" / "splits" / "test.csv", tmp_path / "e.json"
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(table), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["loss"] == tested["test_loss"]
    ids = [row["id"] for row in csv.DictReader(table.open())]
    assert found["num_labels"] == sum(masks[int(name[1:])].count("1") for name in ids)
