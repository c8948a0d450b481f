"""Files that version 0.1.0 wrote are read, resumed and finished, with the numbers that it got from them.

It masked validation by the keys and the seed of training and the number of the protein, behind a random crop.
Losses of validation are compared with these masks in place of today's recipe. That the recipe gives other
numbers, and that this is said, is tested beside it.

How they were made stands beside them, in ``tests/fixtures/written_by_0.1/README.md``.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from esm2mega.batch import PackedBatch
from esm2mega.checkpoint.layout import read_config
from esm2mega.cli.app import main
from esm2mega.config.schema import EvalConfig
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import SplitPacks, build_batch
from esm2mega.data.stream.packing import Pack
from esm2mega.data.stream.recipe import masks_recipe
from esm2mega.train import evaluate, pretrain
from esm2mega.vocabulary import encode_residues

FIXTURES = Path(__file__).parents[2] / "fixtures" / "written_by_0.1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
# In fp64, or stored as fp32; other CPUs add in another order.
TOLERANCE = 1e-6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the current directory: the paths in them are relative."""
    copy = tmp_path / "copy"
    shutil.copytree(FIXTURES, copy)
    monkeypatch.chdir(copy)
    return copy


class MasksOfThen(SplitPacks[PackedBatch]):
    """Evaluation as in version 0.1.0; takes and ignores the recipe."""

    def __init__(self, store: TokenStore, spec: BatchSpec, masks: EvalConfig, *share: int) -> None:
        super().__init__(store, spec, *share)
        self._store = store

    def _build(self, pack: Pack) -> PackedBatch:
        return build_batch([self._store], self._spec, pack)


@pytest.fixture
def masks_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluate, pretrain):
        monkeypatch.setattr(module, "EvalPacks", MasksOfThen)


def _run(*words: str) -> None:
    assert main(words) == 0


def _close(expected: Any) -> Any:
    return pytest.approx(expected, rel=0, abs=TOLERANCE)


def test_old_keys_of_a_checkpoint_have_their_meaning(folder: Path) -> None:
    text = (folder / "pretrained/checkpoints/step_00000002/config.yaml").read_text()
    assert "  long: chunk" in text and "  pack_tokens: 128" in text
    infer = read_config(folder / "pretrained/checkpoints/step_00000002").infer
    assert (infer.too_long, infer.micro_batch_tokens) == ("chunk", 128)


def test_a_store_holds_the_proteins_of_its_file(folder: Path) -> None:
    lines = (folder / "proteins.fasta").read_text().split()
    proteins = {name[1:]: sequence for name, sequence in zip(lines[::2], lines[1::2], strict=True)}
    stores = [TokenStore(folder / "store" / split) for split in ("train", "valid")]
    for store in stores:
        store.verify()
    stored = {store.id(i): store.residues(i).tolist() for store in stores for i in range(len(store))}
    assert stored == {name: encode_residues(sequence).tolist() for name, sequence in proteins.items()}


@pytest.mark.parametrize(
    ("command", "run"), [("pretrain", "pretrained"), ("pretrain", "adapter"), ("finetune", "finetuned")]
)
def test_a_run_goes_on_with_the_same_losses(
    folder: Path, masks_of_then: None, capfd: pytest.CaptureFixture[str], command: str, run: str
) -> None:
    _run(command, "--config", f"{run}/config.yaml")
    assert (
        "in place of that of an earlier version: best and early stopping start anew" in capfd.readouterr().err
    )
    records = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
    losses = {
        f"{record['kind']} {record['step']}": record.get("loss", record.get("valid_loss"))
        for record in records
    }
    assert losses == _close(EXPECTED["losses"][run])


@pytest.mark.parametrize(
    ("run", "data"), [("pretrained", "store/valid"), ("adapter", "store/valid"), ("finetuned", "valid.csv")]
)
def test_evaluate_gives_the_same_numbers(folder: Path, masks_of_then: None, run: str, data: str) -> None:
    _run("evaluate", run, "--data", data, "--out", "numbers.json")
    expected = EXPECTED["evaluate"][run]
    numbers = json.loads((folder / "numbers.json").read_text())
    assert {name: numbers[name] for name in expected} == _close(expected)


@pytest.mark.parametrize("run", ["pretrained", "adapter"])
def test_evaluate_has_a_recipe_of_its_own_now(folder: Path, run: str) -> None:
    """Another number, which names its recipe, though the checkpoint's configuration has no section eval."""
    assert "eval:" not in (folder / run / "config.yaml").read_text()
    _run("evaluate", run, "--data", "store/valid", "--out", "numbers.json")
    numbers, before = json.loads((folder / "numbers.json").read_text()), EXPECTED["evaluate"][run]
    assert numbers["eval_recipe"] == masks_recipe(EvalConfig(), 64)
    assert numbers["num_labels"] != before["num_labels"]
    # The model is nearly random: other residues have another loss, which is near.
    assert 0 < abs(numbers["loss"] - before["loss"]) < 0.1


def test_predict_gives_the_same_values(folder: Path) -> None:
    _run("predict", "finetuned", "valid.csv", "--out", "predictions.csv")
    with (folder / "predictions.csv").open(newline="") as file:
        values = {row["id"]: float(row["target"]) for row in csv.DictReader(file)}
    assert values == _close(EXPECTED["predictions"])


def test_an_unfinished_embedding_is_finished(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["embed", "pretrained", "proteins.fasta", "--out", "embeddings.h5", "--include", "pooled"]
    words += ["--layers", "0,-1", "--max-seq-length", "48", "--pack-tokens", "128", "--resume"]
    assert main([*words, "--too-long", "crop"]) == 2
    assert "begun with other settings: too_long was 'chunk' and is 'crop'" in capfd.readouterr().err
    _run(*words, "--too-long", "chunk")
    with h5py.File(folder / "embeddings.h5") as file:
        for name, rows in EXPECTED["embeddings"].items():
            found = {number: file[name][int(number)].tolist() for number in rows}
            assert found.keys() == rows.keys()
            for number, row in rows.items():
                assert found[number] == _close(row), (name, number)
    # The finished file has the noted settings of its first start, and still counts as the same.
    capfd.readouterr()
    _run(*words, "--too-long", "chunk")
    assert "embeddings.h5 is complete" in capfd.readouterr().out
