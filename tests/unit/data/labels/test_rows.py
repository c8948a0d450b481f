"""Labels in FASTA headers, and in files of their own joined by id: and errors with places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, Run, TaskConfig
from esm2mega.config.task import validate_task
from esm2mega.data.labels.dataset import proteins_of_pairs, read_labelled
from esm2mega.errors import UserError

SEQUENCES = ">p0 first\nMKT\n>NA\nNA\n>p2\nWY\nVV\n"
LABELS = ">p2\n0100\n>p0 SET=train\n012\n>NA\n22\n>other\n1\n"
MASKS = ">p0\n011\n>p2\n1000\n>NA\n11\n"


def read(folder: Path, files: dict[str, str], data: str, **task: Any):
    """Read `data`; file names among the values of `task` are those of the folder."""
    for name, text in files.items():
        (folder / name).write_text(text)
    task = {key: str(folder / x) if key.endswith("_file") else x for key, x in task.items()}
    return read_labelled(folder / data, TaskConfig(**task), DataConfig(), None, "data.train")


def test_labels_in_headers(tmp_path: Path) -> None:
    """As FLIP writes them: a value is all up to the next white space."""
    text = (
        ">NA x TARGET=-1.25e-05 SET=train place=Lysosome/Vacuole\nNAN\n>b TARGET= place=a=b\nNA\n"
        ">c TARGET=2.5E-3 place=007 some words\nMK\n"
    )
    found, _ = read(tmp_path, {"a.fasta": text}, "a.fasta", kind="regression", target_columns=["TARGET"])
    np.testing.assert_array_equal(found.labels, [[-1.25e-05], [np.nan], [2.5e-3]])
    assert found.ids == ["NA", "b", "c"] and found.lengths.tolist() == [3, 2, 2]
    classes = {"kind": "classification", "target_columns": ["place"]}
    with pytest.raises(UserError, match=r"a.fasta:5: 'some' after 'place=007' in the header of 'c'"):
        read(tmp_path, {"a.fasta": text}, "a.fasta", **classes)
    _, info = read(tmp_path, {"a.fasta": text.replace(" some words", "")}, "a.fasta", **classes)
    assert info.names == ["007", "Lysosome/Vacuole", "a=b"]
    with pytest.raises(UserError, match=r"a.fasta:1: the header of 'NA' has no score=VALUE"):
        read(tmp_path, {"a.fasta": text}, "a.fasta", kind="regression", target_columns=["score"])
    twice = {"a.fasta": ">a TARGET=1 TARGET=2\nMK\n"}
    with pytest.raises(UserError, match=r"a.fasta:1: the header of 'a' has TARGET twice"):
        read(tmp_path, twice, "a.fasta", kind="regression", target_columns=["TARGET"])


FILES = {"s.fasta": SEQUENCES, "l.fasta": LABELS, "m.fasta": MASKS}
RESIDUES = {"kind": "token_classification", "label_file": "l.fasta", "mask_file": "m.fasta"}


def test_labels_and_masks_of_residues_in_files_of_their_own(tmp_path: Path) -> None:
    found, info = read(tmp_path, FILES, "s.fasta", **RESIDUES)
    # In the order of the sequences: 012, 22, 0100 under 011, 11, 1000.
    assert [-100 if i == -100 else int(info.names[i]) for (i,) in found.labels.tolist()] == [
        -100, 1, 2, 2, 2, 0, -100, -100, -100,
    ]  # fmt: skip
    assert found.notes == [f"1 of 4 labels in {tmp_path}/l.fasta are of other proteins"]
    # A mask file beside a table with labels.
    table = "id,sequence,target\np0,MKT,012\np2,WYVV,0100\n"
    files = {**FILES, "t.csv": table}
    found, info = read(tmp_path, files, "t.csv", kind="token_classification", mask_file="m.fasta")
    assert [info.names[i] if i >= 0 else "-" for (i,) in found.labels.tolist()] == list("-120---")


def test_a_table_of_labels(tmp_path: Path) -> None:
    files = {"s.fasta": SEQUENCES, "l.csv": "id,a,b\np2,1,2\nNA,3,\np0,5,6\n"}
    task = {"kind": "regression", "target_columns": ["a", "b"], "label_file": "l.csv"}
    found, _ = read(tmp_path, files, "s.fasta", **task)
    np.testing.assert_array_equal(found.labels, [[5, 6], [3, np.nan], [1, 2]])
    assert found.notes == []
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install esm2mega[parquet]")
    import pyarrow
    import pyarrow.parquet

    rows = {"id": [7, 8], "target": ["x", "NA"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "l.parquet")
    given = {"s.fasta": ">8\nMK\n>7\nM\n"}
    found, info = read(tmp_path, given, "s.fasta", kind="classification", label_file="l.parquet")
    assert [info.names[i] for i in found.labels.tolist()] == ["NA", "x"]
    with pytest.raises(UserError, match="task.label_file=.*: no column 'c' among id, a, b; correct"):
        read(tmp_path, files, "s.fasta", **{**task, "target_columns": ["c"]})
    # Of two columns of one name the last would be read.
    with pytest.raises(UserError, match="data.train=.*: has 2 columns 'y'; rename all but one"):
        read(tmp_path, {"t.csv": "sequence,y,y\nMK,1,2\n"}, "t.csv", kind="regression", target_columns=["y"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"l.fasta": ">p0\n012\n>NA\n22\n"}, r"s.fasta:5: no labels of 'p2' in .*l.fasta"),
        ({"l.fasta": LABELS.replace("012", "01")}, r"l.fasta:3: 2 labels of 'p0', which has 3 residues"),
        ({"l.fasta": LABELS + ">p0\n000\n"}, r"l.fasta:9: the id 'p0' is that of line 3 already"),
        ({"m.fasta": ">p0\n011\n>p2\n1000\n"}, r"l.fasta:5: no marks of 'NA' in .*m.fasta"),
        ({"m.fasta": MASKS.replace("1000", "100")}, r"m.fasta:3: 3 marks of 'p2', which has 4 residues"),
        ({"m.fasta": MASKS.replace("011", "01?")}, r"m.fasta:1: '\?' in the mask of 'p0'"),
        ({"s.fasta": SEQUENCES + ">p0\nMMM\n"}, r"s.fasta:8: the id 'p0' is that of line 1 already"),
    ],
)
def test_what_does_not_join(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, {**FILES, **changed}, "s.fasta", **RESIDUES)


def test_tables_of_labels_that_do_not_join(tmp_path: Path) -> None:
    task = {"kind": "classification", "label_file": "l.csv"}
    with pytest.raises(UserError, match=r"s.fasta:3: no labels of 'NA' in .*l.csv"):
        read(tmp_path, {"s.fasta": SEQUENCES, "l.csv": "id,target\np0,1\np2,1\n"}, "s.fasta", **task)
    with pytest.raises(UserError, match=r"l.csv:3: the id 'p0' is at .*l.csv:2 already"):
        read(tmp_path, {"s.fasta": SEQUENCES, "l.csv": "id,target\np0,1\np0,1\n"}, "s.fasta", **task)
    with pytest.raises(UserError, match="a FASTA of labels has one for each residue, task.kind=regression"):
        read(tmp_path, FILES, "s.fasta", kind="regression", label_file="l.fasta")


def test_what_the_configuration_refuses() -> None:
    for task, message in (
        ({"kind": "regression", "mask_file": "m"}, "marks residues .* set task.mask_file=null"),
        (
            {"kind": "token_regression", "mask_file": "m", "mask_column": "m"},
            "set task.mask_column=null",
        ),
    ):
        with pytest.raises(UserError, match=message):
            validate_task(Run(task=TaskConfig(**task)))
    with pytest.raises(UserError, match="pairs hold their labels themselves; set task.label_file=null"):
        proteins_of_pairs([("MK", 1.0)], TaskConfig(kind="regression", label_file="l"), None, "train")


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.fasta",
            b">a x=HC\nMK\n>b x=H\xe9\nMK\n",
            "a.fasta:3: .* in the header of 'b' is not UTF-8; convert",
        ),
        ("a.jsonl", b'{"sequence": "MK", "x": "H\\ud800"}\n', r"the label '.*\\ud800' is not text in UTF-8"),
        (
            "a.jsonl",
            b'{"sequence": "MK", "x": ' + b"[" * 99999,
            "a.jsonl:1: not JSON .it is nested too deeply",
        ),
    ],
)
def test_labels_that_are_no_text(tmp_path: Path, kind: str, name: str, content: bytes, message: str) -> None:
    """They would be one class with others, or could not be written to a file of predictions."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, {}, name, kind=kind, target_columns=["x"])
