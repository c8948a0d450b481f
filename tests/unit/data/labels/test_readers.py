"""Several target columns of residues: classes, scale and mask of each, and what a pack holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.config.schema import DataConfig, Run, TaskConfig
from esm2mega.config.task import validate_task
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_pairs, read_labelled
from esm2mega.data.labels.schema import TargetInfo, with_columns
from esm2mega.data.labels.stream import LabelledStream
from esm2mega.data.stream.build import BatchSpec
from esm2mega.errors import UserError
from esm2mega.vocabulary import decode

TABLE = "id,sequence,three,eight,m,n\np,MKT,CHE,1G2,011,110\nq,LA,HC,BG,10,11\n"
CLASSES = TaskConfig(kind="token_classification", target_columns=["three", "eight"], mask_column=["m", "n"])


def read(
    folder: Path, text: str, task: TaskConfig, info: TargetInfo | None = None, name: str = "t.csv"
) -> tuple[LabelledProteins, TargetInfo]:
    (folder / name).write_text(text)
    return read_labelled(folder / name, task, DataConfig(), info, "data.train")


def named(proteins: LabelledProteins, info: TargetInfo) -> list[str]:
    """The labels of each column as names, ``-`` for none."""
    assert proteins.labels is not None
    return [
        "".join("-" if number < 0 else target.names[number] for number in column)
        for target, column in zip(info.targets, proteins.labels.T.tolist(), strict=True)
    ]


def test_classes_of_each_column_from_training_alone(tmp_path: Path) -> None:
    found, info = read(tmp_path, TABLE, CLASSES)
    # Masked residues count nowhere: C of the first and the 2 of the second protein are not learned.
    assert (info.names, info.columns, info.widths) == (["E", "H", "1", "B", "G"], ["three", "eight"], [2, 3])
    assert (info.counts, info.baseline) == ([1, 2, 1, 1, 2], [1 / 3, 2 / 3, 0.25, 0.25, 0.5])
    assert named(found, info) == ["-HEH-", "1G-BG"] and found.num_missing == 3
    assert info.output_names == ["three/E", "three/H", "eight/1", "eight/B", "eight/G"]
    assert TargetInfo.from_dict(info.to_dict()) == info != replace(info, columns=["eight", "three"])
    held_out = "id,sequence,three,eight,m,n\nr,WY,EH,1B,11,11\n"
    assert named(read(tmp_path, held_out, CLASSES, info)[0], info) == ["EH", "1B"]
    with pytest.raises(UserError, match=r"t.csv:2: the class 'E' in column 'eight' is none .*: 1, B, G;"):
        read(tmp_path, held_out.replace("1B", "1E"), CLASSES, info)
    empty = TABLE.replace("110\n", "000\n").replace("11\n", "00\n")
    with pytest.raises(UserError, match="the column 'eight' of data.train holds no label that counts"):
        read(tmp_path, empty, CLASSES)


def test_declared_classes_have_the_declared_order(tmp_path: Path) -> None:
    one = TaskConfig(kind="token_classification", target_columns=["three"], classes=["H", "C", "E", "P"])
    found, info = read(tmp_path, TABLE, one)
    assert (info.names, info.counts, info.untrained) == (["H", "C", "E", "P"], [2, 2, 1, 0], [3])
    assert named(found, info) == ["CHEHC"]
    assert found.notes == ["data.train has no label of the class 'P' in column 'three'"]
    held_out = "id,sequence,three\nq,MK,CH\nr,WYV,EPP\n"
    scored, _ = read(tmp_path, held_out, one, info)
    assert named(scored, info) == ["CHEPP"]
    (note,) = scored.notes
    assert note.startswith("2 labels are of the class 'P' in data.train in column 'three', first at")
    assert note.endswith("t.csv:3; training had none of that class, so they count as wrong")
    with pytest.raises(
        UserError, match=r"t.csv:2: the class 'C' .* is none of those of the head: H, E; correct"
    ):
        read(tmp_path, TABLE, replace(one, classes=["H", "E"]))
    # One list for each of several columns, null for the classes that training has.
    both = replace(CLASSES, classes=[None, ["1", "2", "B", "G", "T"]])
    found, info = read(tmp_path, TABLE, both)
    assert (info.names, info.widths) == (["E", "H", "1", "2", "B", "G", "T"], [2, 5])
    assert info.untrained == [3, 6] and [target.untrained for target in info.targets] == [[], [1, 4]]
    assert named(found, info) == ["-HEH-", "1G-BG"]
    assert TargetInfo.from_dict(info.to_dict()).untrained == [3, 6]


def test_declared_classes_of_proteins() -> None:
    task = TaskConfig(kind="classification", classes=["high", "low", "none"])
    pairs = [("MK", "low"), ("LA", "high"), ("WY", "low")]
    found, info = proteins_of_pairs(pairs, task, None, "train")
    assert found.labels is not None and found.labels.tolist() == [1, 0, 1]
    assert (info.names, info.untrained, info.baseline) == (["high", "low", "none"], [2], [1 / 3, 2 / 3, 0.0])
    names = TaskConfig(kind="multilabel", classes=["b", "a", "c"])
    found, info = proteins_of_pairs([("MK", "a;b"), ("LA", "b"), ("WY", "")], names, None, "train")
    assert found.labels is not None and found.labels.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert info.untrained == [2]
    # A head that is loaded remembers what it has never seen, and learns it from new labels.
    _, again = proteins_of_pairs([("MK", "b"), ("LA", "a")], names, None, "train", loaded=info)
    _, taught = proteins_of_pairs([("MK", "b"), ("LA", "c")], names, None, "train", loaded=info)
    assert (again.untrained, taught.untrained) == ([2], [])
    assert with_columns(info, names, "here") is info
    with pytest.raises(
        UserError, match=r"the head of here has the classes \['b', 'a', 'c'\]; set task.classes=null"
    ):
        with_columns(info, replace(names, classes=["a", "b", "c"]), "here")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("m", ["-HEH-", "-G2B-"]),
        ([None, "n"], ["CHEHC", "1G-BG"]),
        (["m", None], ["-HEH-", "1G2BG"]),
        (None, ["CHEHC", "1G2BG"]),
    ],
)
def test_a_mask_for_all_or_for_some(tmp_path: Path, mask: Any, expected: list[str]) -> None:
    assert named(*read(tmp_path, TABLE, replace(CLASSES, mask_column=mask))) == expected


def test_numbers_of_each_column_have_a_scale_of_their_own(tmp_path: Path) -> None:
    text = "sequence,u,v,m\nMKT,1 nan 5,10 30 -4,111\nLA,3 8,20 0,10\n"
    task = TaskConfig(kind="token_regression", target_columns=["u", "v"], mask_column=["m", None])
    found, info = read(tmp_path, text, task)
    expected = [[1, 10], [np.nan, 30], [5, -4], [3, 20], [np.nan, 0]]
    np.testing.assert_array_equal(found.labels, expected)
    assert info.mean == info.baseline == pytest.approx(np.nanmean(expected, axis=0), rel=1e-15)
    assert info.std == pytest.approx(np.nanstd(expected, axis=0), rel=1e-15)
    assert (info.names, info.counts, info.columns) == (["u", "v"], [3, 5], [])
    assert [target.outputs for target in info.targets] == [slice(0, 1), slice(1, 2)]


def test_headers_and_files_of_labels(tmp_path: Path) -> None:
    headers = ">p three=CHE eight=1G2 m=011 n=110\nMKT\n>q three=HC eight=BG m=10 n=11\nLA\n"
    assert named(*read(tmp_path, headers, CLASSES, name="t.fasta")) == ["-HEH-", "1G-BG"]
    (tmp_path / "l.csv").write_text("id,three,eight,m,n\nq,HC,BG,10,11\np,CHE,1G2,011,110\n")
    (tmp_path / "l.fasta").write_text(">p\nCHE\n>q\nHC\n")
    (tmp_path / "m.fasta").write_text(">p\n001\n>q\n11\n")
    bare = ">p\nMKT\n>q\nLA\n"
    in_table = replace(CLASSES, label_file=str(tmp_path / "l.csv"))
    assert named(*read(tmp_path, bare, in_table, name="t.fasta")) == ["-HEH-", "1G-BG"]
    # A file of masks holds for every column.
    for_all = replace(in_table, mask_column=None, mask_file=str(tmp_path / "m.fasta"))
    assert named(*read(tmp_path, bare, for_all, name="t.fasta")) == ["--EHC", "--2BG"]
    with pytest.raises(UserError, match="a FASTA of labels is one column, task.target_columns=.* several"):
        read(tmp_path, bare, replace(CLASSES, label_file=str(tmp_path / "l.fasta")), name="t.fasta")


def test_crops_and_chunks_keep_every_column_with_its_residues() -> None:
    """The second column is the first one with other names."""
    lower = [text.lower() for text in ("MKTAYIAKQR", "LA", "WYVTSRQP")]
    task = TaskConfig(kind="token_classification", target_columns=["a", "b"])
    proteins, info = proteins_of_pairs([(x.upper(), (x.upper(), x)) for x in lower], task, None, "train")
    assert named(proteins, info) == ["".join(lower).upper(), "".join(lower)]
    kept = proteins.select(np.array([2, 0]))
    assert named(kept, info) == [(lower[2] + lower[0]).upper(), lower[2] + lower[0]]
    coordinates = [[0.0, 0.0, float(i)] for i in range(3)]
    pairs, _ = proteins_of_pairs([("M" * 12, coordinates * 4)], TaskConfig(kind="contact"), None, "train")
    assert pairs.select(np.array([0, 0])).per_pair and not kept.per_pair
    for crop in ("random", "chunk"):
        data = DataConfig(max_seq_length=6, too_long="crop", crop=crop)
        with LabelledStream(proteins, BatchSpec(data, 24, seed=1)) as stream:
            for _ in range(10):
                batch = next(stream)
                assert batch.labels is not None and batch.labels.shape == (batch.num_residues, 2)
                residues = decode(batch.input_ids[batch.head_inputs.residues].numpy().astype(np.uint8))
                for target, column in zip(info.targets, batch.labels.T.tolist(), strict=True):
                    assert "".join(target.names[i] for i in column).upper() == residues


def test_pairs_have_a_value_for_each_column() -> None:
    for value in ("CH", 1.0, ("CH", "CH", "CH")):
        with pytest.raises(UserError, match=r"train\[0\]: [13] values for task.target_columns=.*; give one"):
            proteins_of_pairs([("MK", value)], replace(CLASSES, mask_column=None), None, "train")


def test_a_head_with_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, info = read(tmp_path, TABLE, CLASSES)
    renamed = with_columns(info, replace(CLASSES, target_columns=["three", "y"]), "here")
    assert [target.name for target in renamed.targets] == ["three", "y"]
    assert capsys.readouterr().err == "here: outputs of the loaded head: eight for y\n"
    for order in (["eight", "three"], ["eight", "y"]):
        with pytest.raises(UserError, match=r"have another order; set task.target_columns=\[three,eight\]"):
            with_columns(info, replace(CLASSES, target_columns=order), "here")
    one = TaskConfig(kind="token_classification")
    with pytest.raises(UserError, match="the loaded head has 2 targets, three, eight; name a column for"):
        with_columns(info, one, "here")
    single = TargetInfo("token_classification", ["C", "H"])
    assert with_columns(single, one, "here") is single
    with pytest.raises(UserError, match="the loaded head has one column; name that"):
        with_columns(single, CLASSES, "here")


def test_a_checkpoint_of_an_earlier_version_has_one_column() -> None:
    state = {"kind": "token_classification", "names": ["C", "H"], "counts": [1, 2], "mean": [], "std": []}
    (target,) = TargetInfo.from_dict(state).targets
    assert (target.name, target.outputs, target.names) == ("", slice(0, 2), ["C", "H"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"mask_column": ["m"]}, r"has 1 entries for task.target_columns=\['a', 'b'\]; give one for each"),
        ({"mask_column": ["m", 1]}, r"\['m', 1\] must be a column, a list of columns and nulls, or null"),
        ({"mask_column": ["m", ""]}, "must be a column, a list of columns and nulls, or null"),
        ({"mask_column": [None, "m"], "mask_file": "f"}, "task.mask_file=f .* set task.mask_column=null"),
        ({"kind": "regression", "mask_column": ["m", None]}, "marks residues, but task.kind=regression"),
        ({"kind": "contact", "target_columns": ["a"], "mask_column": ["m"]}, "without a list"),
        ({"kind": "contact"}, "task.kind=contact has one column; name one"),
        ({"kind": "classification"}, "task.kind=classification has one column; name one"),
        ({"num_classes": 5}, "task.num_classes=5 says nothing of several target columns"),
        (
            {"classes": ["C", "H"]},
            r"must have a list of classes for each of task.target_columns=\['a', 'b'\]",
        ),
        ({"classes": [["C", "H"]]}, "must have a list of classes for each of task.target_columns"),
        ({"classes": [["C", "H"], ["x"]]}, "must name 2 classes or more, each of them once"),
        ({"classes": [["C", "C"], None]}, "must name 2 classes or more, each of them once"),
        ({"classes": [["C", ""], None]}, "must be a list of class names, or one such list for each column"),
        ({"classes": [["C", "x "], None]}, "'x ' begins or ends with a blank, which labels never do"),
        ({"kind": "multilabel", "classes": ["a", "b"]}, r"the classes are the columns task.target_columns="),
        ({"kind": "regression", "classes": ["a", "b"]}, "does not go with task.kind=regression; remove it"),
        ({"kind": "multilabel", "target_columns": ["a"], "classes": ["x;y"]}, "holds the ; that separates"),
        (
            {"kind": "classification", "target_columns": ["a"], "classes": ["x", "y"], "num_classes": 3},
            "are 2 classes, task.num_classes=3; remove task.num_classes",
        ),
    ],
)
def test_what_the_configuration_refuses(task: dict[str, Any], message: str) -> None:
    given = {"kind": "token_classification", "target_columns": ["a", "b"], **task}
    with pytest.raises(UserError, match=message) as caught:
        validate_task(Run(task=TaskConfig(**given)))
    assert "\n" not in str(caught.value)
