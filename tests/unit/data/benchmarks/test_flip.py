"""FLIP's files to tables: published counts of the real files, and the hazards of the others in small ones."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from esm2mega.cli.app import main
from esm2mega.config.load import load_run
from esm2mega.data.benchmarks.flip import prepare_flip
from esm2mega.data.benchmarks.names import FLIP_TASKS, Sizes, differing
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.data.readers.base import file_sha256
from esm2mega.errors import UserError
from esm2mega.vocabulary import decode

REAL = Path(__file__).resolve().parents[5] / "shared" / "data" / "flip"


def real(task: str) -> Path:
    if not (REAL / task).is_dir():
        pytest.skip("FLIP's files are not beside the repository (../shared/data/flip)")
    return REAL / task


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in out.glob("*.csv"):
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def sizes(out: Path) -> list[int]:
    return [manifest(out)["splits"][split]["proteins"] for split in ("train", "valid", "test")]


@pytest.mark.parametrize(("split", "expected"), [(None, [381, 43, 8309]), ("sampled", [6289, 699, 1745])])
def test_gb1_as_published(tmp_path: Path, split: str | None, expected: list[int]) -> None:
    out = tmp_path / "gb1"
    prepare_flip("gb1", real("gb1"), out, split)
    assert sizes(out) == expected
    found = tables(out)
    # Ids, sequences and values are those of an independent look at the file.
    lines = (REAL / "gb1" / f"{split or 'two_vs_rest'}.fasta").read_text().splitlines()
    headers = [line[1:].split() for line in lines[::2]]
    kept = [
        [name, body, target.removeprefix("TARGET=")]
        for (name, target, *marks), body in zip(headers, lines[1::2], strict=True)
        if marks == ["SET=train", "VALIDATION=True"]
    ]
    assert [list(row.values()) for row in found["valid"]] == kept
    entry = manifest(out)["splits"]["valid"]
    assert entry["sha256"] == file_sha256(out / "valid.csv") and entry["longest"] == 265


def test_secondary_structure_as_published(tmp_path: Path) -> None:
    out = tmp_path / "ss"
    lines = prepare_flip("secondary_structure", real("secondary_structure"), out)
    assert "186,876 of 2,845,094 residues are masked" in lines[-1]
    assert sizes(out) == [9712, 1080, 364]
    found = tables(out)
    rows = [row for of_split in found.values() for row in of_split]
    assert Counter("".join(row["target"] for row in rows)) == {"C": 1_211_931, "E": 602_963, "H": 1_030_200}
    assert sum(row["mask"].count("0") for row in rows) == 186_876
    lengths = [len(row["sequence"]) for row in rows]
    assert (min(lengths), max(lengths), sum(n > 1022 for n in lengths)) == (20, 1632, 37)
    assert all(len(row["target"]) == len(row["mask"]) == len(row["sequence"]) for row in rows)
    classes: Counter[str] = Counter()
    for entry in manifest(out)["splits"].values():
        classes.update(entry["classes"])
    assert classes == {"C": 1_211_931, "E": 602_963, "H": 1_030_200}


FASTA = """\
>NA TARGET=-1.25e-05 SET=train VALIDATION=False
NA
>nan TARGET=2.5E-3 SET=train VALIDATION=True
NANNAN
>007 TARGET=1 SET=test VALIDATION=False
MKT
"""


@pytest.mark.parametrize("task", [name for name, task in FLIP_TASKS.items() if task.kind == "regression"])
def test_numbers_keep_their_text(tmp_path: Path, task: str) -> None:
    """Exponents stay, ids and sequences may look like missing values, and fine-tuning reads it all back."""
    published = FLIP_TASKS[task]
    name = published.files.get(published.default, published.default)
    (tmp_path / f"{name}.fasta.gz").write_bytes(gzip.compress(FASTA.encode()))
    with pytest.raises(UserError, match=r"training|all.*published"):
        prepare_flip(task, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = prepare_flip(task, tmp_path, tmp_path / "out", other_sizes=True)
    assert "published are" in lines[-1] and manifest(tmp_path / "out")["notes"]
    found = tables(tmp_path / "out")
    assert [row["target"] for row in found["train"] + found["valid"] + found["test"]] == [
        "-1.25e-05", "2.5E-3", "1",
    ]  # fmt: skip
    run = load_run(f"flip_{task}", ["model.size=tiny"])
    proteins, info = read_labelled(tmp_path / "out/train.csv", run.task, run.data, None, "data.train")
    assert (proteins.ids, decode(proteins.residues(0)), info.mean) == (["NA"], "NA", [-1.25e-05])
    proteins, _ = read_labelled(tmp_path / "out/valid.csv", run.task, run.data, info, "data.valid")
    assert (proteins.ids, decode(proteins.residues(0))) == (["nan"], "NANNAN")


@pytest.mark.parametrize("task", ["scl", "sav"])
def test_class_names_are_read_whole_from_fasta_and_its_csv_twin(tmp_path: Path, task: str) -> None:
    name = FLIP_TASKS[task].default
    (tmp_path / "fasta").mkdir()
    (tmp_path / "csv" / "splits").mkdir(parents=True)
    (tmp_path / "fasta" / f"{name}.fasta").write_text(
        ">Sequence0 TARGET=Lysosome/Vacuole SET=train VALIDATION=False\nMKT\n"
        ">Sequence1 TARGET=Cell_membrane SET=test VALIDATION=False\nMKLL\n"
        ">Sequence2 TARGET=NA SET=train VALIDATION=True\nMKLLV\n"
    )
    twin = tmp_path / "csv" / "splits" / f"{name}.csv"
    twin.write_text(
        "sequence,target,set,validation\nMKT,Lysosome/Vacuole,train,\nMKLL,Cell_membrane,test,\n"
        "MKLLV,NA,train,True\nMKLLVV,Plastid,,\n"
    )
    prepare_flip(task, tmp_path / "fasta", tmp_path / "a", other_sizes=True)
    lines = prepare_flip(task, tmp_path / "csv", tmp_path / "b", other_sizes=True)
    assert tables(tmp_path / "a") == tables(tmp_path / "b")
    assert "1 proteins belong to no set and are left out" in "".join(lines)
    assert manifest(tmp_path / "b")["splits"]["train"]["classes"] == {"Lysosome/Vacuole": 1}


def test_a_split_with_several_classes_per_protein_is_multilabel(tmp_path: Path) -> None:
    (tmp_path / "mixed_vs_human_2.fasta").write_text(
        ">a TARGET=Nucleus;Cytoplasm SET=train VALIDATION=False\nMKT\n"
        ">b TARGET=Nucleus SET=train VALIDATION=False\nMKL\n>c TARGET=Plastid SET=test VALIDATION=False\nLL\n"
    )
    prepare_flip("scl", tmp_path, tmp_path / "out", "mixed_vs_human_2")
    written = manifest(tmp_path / "out")
    assert written["kind"] == "multilabel"
    run = load_run("flip_scl", ["model.size=tiny", "task.num_classes=null", f"task.kind={written['kind']}"])
    _, info = read_labelled(tmp_path / "out/train.csv", run.task, run.data, None, "data.train")
    assert written["splits"]["train"]["classes"] == dict(zip(info.names, info.counts, strict=True))
    assert info.names == ["Cytoplasm", "Nucleus"] and info.counts == [1, 2]


def residue_files(folder: Path, task: str, **changed: str) -> Path:
    """Three proteins with labels of digits, one without labels."""
    folder.mkdir()
    files = {
        "sequences": ">p0\nMKT\n>p1\nLA\n>p2\nWYV\n>p3\nGG\n",
        FLIP_TASKS[task].default: ">p0 SET=train VALIDATION=False\n012\n>p1 SET=train VALIDATION=True\n00\n"
        ">p2 SET=test VALIDATION=False\n100\n",
        "resolved": ">p0\n011\n>p1\n11\n>p2\n000\n>p3\n11\n",
        **changed,
    }
    for name, text in files.items():
        (folder / f"{name}.fasta").write_text(text)
    return folder


@pytest.mark.parametrize("task", [name for name, task in FLIP_TASKS.items() if task.per_residue])
def test_labels_of_residues_keep_leading_zeros(tmp_path: Path, task: str) -> None:
    lines = prepare_flip(task, residue_files(tmp_path / "in", task), tmp_path / "out", other_sizes=True)
    assert "1 of 4 proteins have no labels" in "".join(lines)
    (row,) = tables(tmp_path / "out")["train"]
    expected = {"id": "p0", "sequence": "MKT", "target": "012"}
    assert row == ({**expected, "mask": "011"} if FLIP_TASKS[task].masked else expected)
    assert manifest(tmp_path / "out")["without_labels"] == 1
    few = ["task.num_classes=null", "task.classes=null"]
    run = load_run(f"flip_{task}", ["model.size=tiny", *few])
    proteins, info = read_labelled(tmp_path / "out/train.csv", run.task, run.data, None, "data.train")
    masked = FLIP_TASKS[task].masked
    assert info.names == (["1", "2"] if masked else ["0", "1", "2"])
    assert proteins.labels is not None
    assert proteins.labels.tolist() == ([[-100], [0], [1]] if masked else [[0], [1], [2]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequences": ">p0\nMKT\n>p1\nLA\n"}, "sampled.fasta:5: no sequence of 'p2' in"),
        ({"sequences": ">p0\nMKT\n>p1\nLA\n>p2\nWYVV\n"}, "sampled.fasta:5: 3 labels of 'p2', which has 4"),
        ({"resolved": ">p0\n011\n>p1\n11\n"}, "sampled.fasta:5: no marks of 'p2' in"),
        ({"resolved": ">p0\n011\n>p1\n1\n>p2\n111\n"}, "resolved.fasta:3: 1 marks of 'p1', which has 2"),
        ({"resolved": ">p0\n01x\n>p1\n11\n>p2\n111\n"}, "resolved.fasta:1: 'x' in the mask of 'p0'"),
        ({"resolved": ">p0\n011\n>p0\n111\n"}, "resolved.fasta:3: the id 'p0' is that of line 1 already"),
        ({"sampled": ">p0 VALIDATION=True\n012\n"}, "sampled.fasta:1: the header of 'p0' has no SET="),
        ({"sampled": ">p0 SET=dev\n012\n"}, "sampled.fasta:1: SET of 'p0' is 'dev', not train, val or test"),
        ({"sampled": ">p0 SET=test SET=train\n012\n"}, "sampled.fasta:1: the header of 'p0' has SET twice"),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_place(
    tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    source = residue_files(tmp_path / "in", "secondary_structure", **changed)
    with pytest.raises(UserError, match=message):
        prepare_flip("secondary_structure", source, tmp_path / "out", other_sizes=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("TARGET=Cell membrane SET=train", "'membrane' after 'TARGET=Cell' in the header of 'x'"),
        ("TARGET=fast SET=train", "the target 'fast' of 'x' is not a number"),
        ("TARGET= SET=train", "'x' has no target"),
        ("SET=train", "the header of 'x' has no TARGET="),
        ("TARGET=1 SET=train VALIDATION=yes", "VALIDATION of 'x' is 'yes', not True or False"),
    ],
)
def test_headers_that_mean_nothing(
    tmp_path: Path, header: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two_vs_rest.fasta").write_text(f">x {header}\nMK\n")
    command = ["prepare", "flip", "gb1", "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"two_vs_rest.fasta:1: {message}" in capsys.readouterr().err
    assert main([*command, "--split", "three"]) == 2
    assert "--split three is none of gb1, which has two_vs_rest, one_vs_rest" in capsys.readouterr().err
    assert main([*command, "--split", "sampled"]) == 2
    assert "no sampled.fasta (nor .csv) in it" in capsys.readouterr().err


def test_only_what_is_published_is_compared() -> None:
    found = {"train": 3, "valid": 2, "test": 1}
    assert differing(Sizes(), found) == []
    assert differing(Sizes(3, 2, 1, 5, 6), found) == []
    assert differing(Sizes(train_and_valid=4, total=7), found) == [
        "5 training and validation proteins, published are 4",
        "6 all proteins, published are 7",
    ]
