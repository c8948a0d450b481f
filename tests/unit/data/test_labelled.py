"""Labelled tables: cells to labels, classes from training alone, long proteins, what a pack holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.batch import BatchSpec
from esm2mega.data.labelled import fit_length, proteins_of_pairs, read_labelled
from esm2mega.data.labelled_batch import LabelledPacks, LabelledStream
from esm2mega.data.targets import TargetInfo
from esm2mega.data.tokenizer import decode
from esm2mega.errors import UserError


def read(tmp_path: Path, text: str, info: TargetInfo | None = None, **task: Any):
    path = tmp_path / "table.csv"
    path.write_text(text)
    columns = {"sequence_column": "input_ids"} if text.startswith("input_ids") else {}
    return read_labelled(path, TaskConfig(**task), DataConfig(**columns), info, "data.train")


def test_numbers_are_scaled_and_may_be_missing(tmp_path: Path) -> None:
    text = "id,sequence,a,b\nx,MK,1.5,\ny,NA,-1.25e-05,2\nz,LLL,,4\n"
    # A protein of asparagine and alanine is no missing value, but the sequence column refuses the word.
    with pytest.raises(UserError, match=r"table.csv:3: the sequence of 'y' 'NA' is a missing value"):
        read(tmp_path, text, kind="regression", target_columns=["a", "b"])
    found, info = read(tmp_path, text.replace("NA", "NAA"), kind="regression", target_columns=["a", "b"])
    np.testing.assert_array_equal(found.labels, [[1.5, np.nan], [-1.25e-05, 2.0], [np.nan, 4.0]])
    assert info.mean == pytest.approx([(1.5 - 1.25e-05) / 2, 3.0]) and info.counts == [2, 2]
    assert info.std[1] == 1.0 and found.num_missing == 2
    assert TargetInfo.from_dict(info.to_dict()) == info
    with pytest.raises(UserError, match=r"table.csv:2: 'fast' in column 'a' is not a number"):
        read(tmp_path, "sequence,a\nMK,fast\n", kind="regression", target_columns=["a"])


def test_class_names_stay_text(tmp_path: Path) -> None:
    text = "sequence,target\nMK,007\nMKK,NA\nM,Lysosome/Vacuole\nLL,007\n"
    found, info = read(tmp_path, text, kind="classification")
    assert (info.names, info.counts) == (["007", "Lysosome/Vacuole", "NA"], [2, 1, 1])
    assert found.labels is not None and found.labels.tolist() == [0, 2, 1, 0]
    numbers = "sequence,target\nMK,10\nMKK,9\n"
    assert read(tmp_path, numbers, kind="classification")[1].names == ["9", "10"]
    with pytest.raises(UserError, match=r"table.csv:3: the class '9' does not occur in the training data"):
        read(tmp_path, "sequence,target\nMK,NA\nMKK,9\n", info, kind="classification")
    with pytest.raises(UserError, match="task.num_classes=4, but data.train has 3 classes"):
        read(tmp_path, text, kind="classification", num_classes=4)


def test_residue_labels_and_masks(tmp_path: Path) -> None:
    text = "sequence,target,resolved\nMKT,012,011\nLA,10,01\n"
    task = {"kind": "token_classification", "mask_column": "resolved"}
    found, info = read(tmp_path, text, **task)
    assert (info.names, info.counts) == (["0", "1", "2"], [1, 1, 1])
    assert found.labels is not None and found.labels.tolist() == [-100, 1, 2, -100, 0]
    with pytest.raises(UserError, match="table.csv:2: 2 labels in column 'target' for 3 residues"):
        read(tmp_path, "sequence,target,resolved\nMKT,01,011\n", **task)
    found, _ = read(tmp_path, "sequence,target\nMKT,1 nan -2.5\n", kind="token_regression")
    np.testing.assert_array_equal(found.labels, [1.0, np.nan, -2.5])


def test_multilabel_by_names_and_by_columns(tmp_path: Path) -> None:
    found, info = read(tmp_path, "sequence,target\nMK,b;a\nL,\nT,c\n", kind="multilabel")
    assert info.names == ["a", "b", "c"] and info.counts == [1, 1, 1]
    np.testing.assert_array_equal(found.labels, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    text = "sequence,u,v\nMK,1,0\nL,,1\n"
    found, info = read(tmp_path, text, kind="multilabel", target_columns=["u", "v"])
    np.testing.assert_array_equal(found.labels, [[1, 0], [np.nan, 1]])
    with pytest.raises(UserError, match="'2' in column 'u'; a label is 0 or 1"):
        read(tmp_path, text.replace("1,0", "2,0"), kind="multilabel", target_columns=["u", "v"])


@pytest.mark.parametrize("pad", [0, 1])
def test_tables_that_were_tokenised_before(tmp_path: Path, pad: int) -> None:
    """The attention mask decides, whatever id pads."""
    text = f'input_ids,attention_mask,labels\n"[0, 20, 15, 2, {pad}]","[1, 1, 1, 1, 0]",1\n'
    found, _ = read(tmp_path, text, kind="classification", target_columns=["labels"])
    assert decode(found.residues(0)) == "MK"
    with pytest.raises(UserError, match=r"table.csv:2: input_ids must be <cls>"):
        read(tmp_path, text.replace("1, 0]", "0, 0]"), kind="classification", target_columns=["labels"])


def test_long_proteins_are_refused_dropped_or_cropped_with_their_labels() -> None:
    sequences = ["MKTAYIAKQR", "LA", "WYVTSRQP"]
    pairs = [(text, text) for text in sequences]
    task = TaskConfig(kind="token_classification")
    proteins, info = proteins_of_pairs(pairs, task, None, "train")
    data = DataConfig(max_seq_length=6)
    with pytest.raises(
        UserError, match="2 of 3 proteins of train have more than 4 residues, first '0' with 10"
    ):
        fit_length(proteins, data, "train")
    data.too_long = "drop"
    kept = fit_length(proteins, data, "train")
    assert (kept.ids, decode(kept.tokens), kept.notes) == (
        ["1"],
        "LA",
        ["2 of 3 proteins of train have more than 4 residues and are left out"],
    )
    assert kept.labels is not None and [info.names[i] for i in kept.labels] == ["L", "A"]
    data.too_long = "crop"
    cropped = fit_length(proteins, data, "train")
    assert "are cropped (random)" in cropped.notes[0]
    with LabelledStream(cropped, BatchSpec(data, 24, seed=1)) as stream:
        for _ in range(20):
            batch = next(stream)
            residues = batch.input_ids[batch.wanted.residues]
            # Each residue is its own label, so labels that moved would show.
            assert batch.labels is not None
            assert decode(residues) == "".join(info.names[i] for i in batch.labels.tolist())
            assert batch.num_residues == len(residues) > 0


def test_every_protein_once_whatever_the_ranks() -> None:
    pairs = [("M" * n, n / 10) for n in range(1, 30)]
    proteins, _ = proteins_of_pairs(pairs, TaskConfig(kind="regression"), None, "train")
    spec = BatchSpec(DataConfig(max_seq_length=32), 64, seed=1)
    shares = [list(LabelledPacks(proteins, spec, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    seen = [
        (row, label) for share in shares for b in share for row, label in zip(b.rows, b.labels, strict=True)
    ]
    assert sorted((int(row), float(label)) for row, label in seen) == [(n - 1, n / 10) for n in range(1, 30)]
