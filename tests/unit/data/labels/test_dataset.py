"""Labelled tables: cells to labels, classes from training alone, long proteins, what a pack holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.dataset import apply_length_policy, proteins_of_pairs, read_labelled
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.labels.stream import LabelledPacks, LabelledStream
from esm2mega.data.stream.build import BatchSpec
from esm2mega.errors import UserError
from esm2mega.vocabulary import decode


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
    with pytest.raises(UserError, match=r"table.csv:3: the class '9' in column 'target' is none of those of"):
        read(tmp_path, "sequence,target\nMK,NA\nMKK,9\n", info, kind="classification")
    with pytest.raises(UserError, match="task.num_classes=4, but data.train has 3 classes"):
        read(tmp_path, text, kind="classification", num_classes=4)


def test_residue_labels_and_masks(tmp_path: Path) -> None:
    text = "sequence,target,resolved\nMKT,012,011\nLA,10,01\n"
    task = {"kind": "token_classification", "mask_column": "resolved"}
    found, info = read(tmp_path, text, **task)
    assert (info.names, info.counts) == (["0", "1", "2"], [1, 1, 1])
    assert found.labels is not None and found.labels.tolist() == [[-100], [1], [2], [-100], [0]]
    with pytest.raises(UserError, match="table.csv:2: 2 labels in column 'target' for 3 residues"):
        read(tmp_path, "sequence,target,resolved\nMKT,01,011\n", **task)
    found, _ = read(tmp_path, "sequence,target\nMKT,1 nan -2.5\n", kind="token_regression")
    np.testing.assert_array_equal(found.labels, [[1.0], [np.nan], [-2.5]])


def test_multilabel_by_names_and_by_columns(tmp_path: Path) -> None:
    found, info = read(tmp_path, "sequence,target\nMK,b;a\nL,\nT,c\n", kind="multilabel")
    assert info.names == ["a", "b", "c"] and info.counts == [1, 1, 1]
    np.testing.assert_array_equal(found.labels, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    text = "sequence,u,v\nMK,1,0\nL,,1\n"
    found, info = read(tmp_path, text, kind="multilabel", target_columns=["u", "v"])
    np.testing.assert_array_equal(found.labels, [[1, 0], [np.nan, 1]])
    as_pandas = text.replace("1,0", "True,False").replace(",,1", ",,true")
    again, _ = read(tmp_path, as_pandas, kind="multilabel", target_columns=["u", "v"])
    np.testing.assert_array_equal(again.labels, found.labels)
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
        apply_length_policy(proteins, data, "train")
    data.too_long = "drop"
    kept = apply_length_policy(proteins, data, "train")
    assert (kept.ids, decode(kept.tokens), kept.notes) == (
        ["1"],
        "LA",
        ["2 of 3 proteins of train have more than 4 residues and are left out"],
    )
    assert kept.labels is not None and [info.names[i] for (i,) in kept.labels] == ["L", "A"]
    data.too_long = "crop"
    cropped = apply_length_policy(proteins, data, "train")
    assert "are cropped (random)" in cropped.notes[0]
    with LabelledStream(cropped, BatchSpec(data, 24, seed=1)) as stream:
        for _ in range(20):
            batch = next(stream)
            residues = batch.input_ids[batch.head_inputs.residues]
            # Each residue is its own label, so labels that moved would show.
            assert batch.labels is not None
            assert decode(residues) == "".join(info.names[i] for (i,) in batch.labels.tolist())
            assert batch.num_residues == len(residues) > 0


@pytest.mark.parametrize("head", ["new", "loaded"])
def test_proteins_that_are_dropped_teach_nothing(head: str) -> None:
    data = DataConfig(max_seq_length=6, too_long="drop")
    task = TaskConfig(kind="classification")
    loaded = (
        TargetInfo("classification", ["b", "a"], [9, 9], baseline=[0.5, 0.5]) if head == "loaded" else None
    )
    pairs = [("MK", "a"), ("LA", "b"), ("WY", "a"), ("MKTAYIAKQR", "c")]
    proteins, info = proteins_of_pairs(pairs, task, None, "train", data, loaded)
    found = dict(zip(info.names, zip(info.counts, info.baseline, strict=True), strict=True))
    assert found == {"a": (2, 2 / 3), "b": (1, 1 / 3)}
    assert info.names == (["a", "b"] if loaded is None else ["b", "a"]) and len(proteins) == 3
    numbers = [("MK", 1.0), ("LA", 2.0), ("MKTAYIAKQR", 900.0)]
    _, info = proteins_of_pairs(numbers, TaskConfig(kind="regression"), None, "train", data)
    assert (info.mean, info.std, info.baseline) == ([1.5], [0.5], [1.5])


LETTERS = "LAGVSERTIDPKQN"


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (TaskConfig(kind="regression", target_columns=["u", "v"]), [(0.5, -2.0), (1.5, None), (4.0, 7.0)]),
        (TaskConfig(kind="token_regression"), [[0.5] * 14, [-1.0] * 14, [2.5, *[float("nan")] * 13]]),
        (TaskConfig(kind="classification"), ["a", "b", "a"]),
        (TaskConfig(kind="token_classification"), ["a" * 14, "ab" * 7, "b" * 14]),
        (TaskConfig(kind="multilabel"), ["a;b", "", "b"]),
        (TaskConfig(kind="multilabel", target_columns=["u", "v"]), [("1", "0"), ("1", None), ("0", "1")]),
        (TaskConfig(kind="contact"), [[[n % 9, n, 0.5 * k] for n in range(14)] for k in range(3)]),
    ],
    ids=lambda value: value.kind if isinstance(value, TaskConfig) else "",
)
def test_a_loaded_head_keeps_its_scale_and_forgets_its_labels(task: TaskConfig, labels: list[Any]) -> None:
    """Counts and baseline are those of a head that learns from the same labels, whatever was loaded."""
    pairs = [(LETTERS, label) for label in labels]
    _, fresh = proteins_of_pairs(pairs, task, None, "train")
    numbers = [101.0] * len(fresh.mean)
    loaded = replace(fresh, counts=[3] * len(fresh.counts), mean=numbers, std=numbers, baseline=[101.0])
    for before in (loaded, replace(loaded, counts=[], baseline=[])):  # a head of another program has none
        _, info = proteins_of_pairs(pairs, task, None, "train", loaded=before)
        assert (info.counts, info.baseline) == (fresh.counts, fresh.baseline)
        assert (info.mean, info.std) == (numbers, numbers)


def test_num_classes_is_compared_wherever_outputs_come_from() -> None:
    flags = TaskConfig(kind="multilabel", target_columns=["u", "v"], num_classes=3)
    with pytest.raises(UserError, match=r"task.num_classes=3, but data.train has 2 classes \(u, v\)"):
        proteins_of_pairs([("MK", ("1", "0"))], flags, None, "train")
    loaded = TargetInfo("classification", ["a", "b", "c"])
    task = TaskConfig(kind="classification", num_classes=2)
    with pytest.raises(UserError, match=r"task.num_classes=2, but the loaded head has 3 classes \(a, b, c\)"):
        proteins_of_pairs([("MK", "a"), ("LA", "b")], task, None, "train", loaded=loaded)


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
