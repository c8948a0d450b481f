"""`autoeval` on contacts: a folder of the user's own, and TAPE's, in every mode; the numbers done by hand."""

from __future__ import annotations

import csv
import json
import math
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.autoeval.contacts import counts_of_maps
from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.errors import UserError
from esm2mega.finetune.contact_metrics import NAMES
from tests.infer_models import Reference, make_reference, random_proteins, write_fasta

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install esm2mega[hdf5]")
lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed: pip install esm2mega[tape]")

SEQUENCES = random_proteins([41, 23, 60, 35, 52])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that differ in their contact heads, and coordinates in both forms."""
    folder = tmp_path_factory.mktemp("contacts")
    reference = make_reference(folder)
    regression = reference.model.esm.contact_head.regression
    first = regression.weight.detach().clone()
    for name, weight in (("other", first.flip(1)), ("zeros", torch.zeros_like(first))):
        regression.weight.data.copy_(weight)
        reference.model.save_pretrained(folder / name)
    regression.weight.data.copy_(first)
    rng = np.random.default_rng(4)
    atoms = {f"p{n}": np.cumsum(rng.normal(size=(len(s), 3)) * 2.2, axis=0) for n, s in enumerate(SEQUENCES)}
    own = folder / "contacts"
    own.mkdir()
    write_fasta(own / "proteins.fasta", dict(zip(atoms, SEQUENCES, strict=True)))
    for (name, places), sequence in zip(atoms.items(), SEQUENCES, strict=True):
        with (own / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["residue", "x", "y", "z"])
            known = [("", "", "") if n == 7 else row for n, row in enumerate(places.round(3).tolist())]
            table.writerows([letter, *row] for letter, row in zip(sequence, known, strict=True))
    write_proteinnet(folder / "tape" / "proteinnet", list(zip(SEQUENCES, atoms.values(), strict=True)))
    return folder


def write_proteinnet(folder: Path, proteins: Sequence[tuple[str, np.ndarray]]) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        with (
            lmdb.open(str(folder / f"proteinnet_{split}.lmdb"), map_size=1 << 22) as environment,
            environment.begin(write=True) as transaction,
        ):
            for number, (sequence, atoms) in enumerate(proteins):
                mask = np.arange(len(sequence)) != 7
                record = {"primary": sequence, "id": f"p{number}", "tertiary": atoms, "valid_mask": mask}
                transaction.put(str(number).encode(), pickle.dumps(record))
            transaction.put(b"num_examples", pickle.dumps(len(proteins)))


def evaluate(folder: Path, out: str, *words: str) -> dict[str, Any]:
    assert main(["autoeval", *words, "--out", str(folder / out)]) == 0
    return json.loads((folder / out / "results.json").read_text())


def labelled(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Sequences, and where residues touch: 1, 0, and -1 where that is not known, ``[L, L]``."""
    for number, sequence in enumerate(SEQUENCES):
        rows = list(csv.DictReader((folder / "contacts" / f"p{number}.csv").open()))
        atoms = np.array([[float(row[axis] or "nan") for axis in "xyz"] for row in rows])
        apart = np.sqrt(((atoms[:, None] - atoms[None]) ** 2).sum(axis=-1))
        yield sequence, np.where(np.isnan(apart), -1, apart < 8.0)


def precision(scores: np.ndarray, touch: np.ndarray, nearest: int, part: int) -> float:
    """Share of contacts among the L / part likeliest pairs, at least `nearest` apart."""
    length = len(touch)
    pairs = [
        (-scores[i, j], i, j) for i in range(length) for j in range(i + nearest, length) if touch[i, j] >= 0
    ]
    chosen = sorted(pairs)[: length // part]
    return sum(touch[i, j] for _, i, j in chosen) / (length // part) if pairs else math.nan


def test_contacts_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(folder / "hf"), str(folder / "other")]
    words = [*models, "--tasks", "contacts", "--mode", "zero-shot", "--source", str(folder)]
    found = evaluate(folder, "own", *words)
    (task,) = found["tasks"]
    assert (task["task"], task["kind"], task["metric"]) == ("contacts", "contact", "p_at_L5")
    assert task["num_proteins"] == {"test": 5} and task["leakage"] is None
    first, second, nearest = task["rows"]
    from transformers import EsmForMaskedLM

    for row in (first, second):
        hugging_face = EsmForMaskedLM.from_pretrained(folder / row["model"], attn_implementation="eager")
        reference = Reference(hugging_face.eval(), folder, folder)
        maps = [reference.contacts(sequence).numpy() for sequence in SEQUENCES]
        for name, least, part in (("p_at_L5", 6, 5), ("long_p_at_L", 24, 1), ("p_at_L2", 6, 2)):
            each = [precision(m, t, least, part) for m, (_, t) in zip(maps, labelled(folder), strict=True)]
            assert row["metrics"][name] == pytest.approx(np.nanmean(each), abs=1e-9), name
        assert row["value"] == row["metrics"]["p_at_L5"] and row["low"] <= row["value"] <= row["high"]
    along = [-np.abs(np.subtract.outer(np.arange(len(t)), np.arange(len(t)))) for _, t in labelled(folder)]
    each = [precision(a, t, 6, 5) for a, (_, t) in zip(along, labelled(folder), strict=True)]
    assert nearest["baseline"] == "nearest along the chain"
    assert nearest["value"] == pytest.approx(np.mean(each), abs=1e-9)
    (difference,) = task["differences"]
    assert difference["difference"] == pytest.approx(second["value"] - first["value"], abs=1e-12)
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert [difference[side]["model"] for side in "ab"] == ["hf", "other"]
    before = {path: (folder / "own" / path).read_bytes() for path in ("results.json", "results.csv")}
    evaluate(folder, "own", *words)
    assert all((folder / "own" / path).read_bytes() == text for path, text in before.items())
    assert "nearest along the chain" in (folder / "own" / "results.html").read_text()
    capsys.readouterr()
    assert main(["autoeval", str(folder / "zeros"), *words[2:], "--out", str(folder / "refused")]) == 2
    error = capsys.readouterr().err
    assert "zeros: has no contact head, which --mode zero-shot computes contacts with" in error
    assert error.count("\n") == 1 and not (folder / "refused").exists()


def test_contacts_of_tape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without MMseqs2, which takes seconds for the smallest files.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    words = [str(folder / "hf"), "--tasks", "tape/contact_prediction", "--mode", "finetune,zero-shot"]
    # The rate is high, for probabilities that are all near 0.5 would be rounded to equal ones.
    words += ["train.max_steps=1", "train.global_batch_size=5", "finetune.mode=frozen", "optim.lr=0.3"]
    words += ["--source", str(folder), "task.head=attention_maps"]
    (task,) = evaluate(folder, "of_tape", *words)["tasks"]
    rows = {row.get("mode") or row["baseline"]: row for row in task["rows"] if row["row"] != "published"}
    assert list(rows) == ["finetune", "zero-shot", "frequency by separation"]
    run = next((folder / "of_tape" / "work").glob("*/hf/finetune-*/run"))
    table = next((folder / "of_tape" / "data").glob("*/tables/test.csv"))
    out = folder / "evaluation.json"
    assert main(["evaluate", str(run), "--data", str(table), "--out", str(out)]) == 0
    measured = json.loads(out.read_text())
    for name in NAMES:
        assert rows["finetune"]["metrics"][name] == measured[name], name
    # The same seed draws the same proteins.
    assert [rows["finetune"]["low"], rows["finetune"]["high"]] == measured["intervals"]["p_at_L5"]
    # TAPE's mask hides the residue whose place the own table leaves out, so contacts are the same.
    own = json.loads((folder / "own" / "results.json").read_text())["tasks"][0]["rows"][0]
    assert rows["zero-shot"]["metrics"] == own["metrics"]


def test_maps_of_other_proteins_are_refused(folder: Path, tmp_path: Path) -> None:
    table = next((folder / "own" / "data").glob("*/tables/test.csv"))
    task = TaskConfig(kind="contact", target_columns=["target"])
    proteins, _ = read_labelled(table, task, DataConfig(), None, "data.test")
    (maps, *_) = (folder / "own" / "work").glob("*/hf/*/contacts.h5")
    assert counts_of_maps(maps, proteins).shape == (5, len(NAMES), 2)
    with pytest.raises(UserError, match=r"contacts.h5: holds other proteins than .*test.csv; make it again"):
        counts_of_maps(maps, proteins.select(np.arange(4)))
