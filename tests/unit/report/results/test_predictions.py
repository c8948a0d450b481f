"""Files of predictions are read as they are written, and counted as scikit-learn counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from esm2mega.report.results.predictions import Classes, Flags, Numbers, targets_of

NAMES = ("A", "B", "C")


def of_kind(rows: list[dict[str, str]], kind: str) -> Any:
    (found,) = targets_of(rows, kind)
    return found


def test_classes_of_proteins() -> None:
    rng = np.random.default_rng(3)
    known, shares = rng.integers(0, 3, 40), rng.dirichlet([1, 1, 1], 40)
    rows = [
        {
            "id": f"p{n}", "label": NAMES[a], "prediction": NAMES[p.argmax()],
            **{f"p_{x}": str(v) for x, v in zip(NAMES, p, strict=True)},
        }
        for n, (a, p) in enumerate(zip(known, shares, strict=True))
    ]  # fmt: skip
    rows.append({**rows[0], "id": "unlabelled", "label": ""})
    found = of_kind(rows, "classification")
    assert isinstance(found, Classes) and found.known is not None
    assert found.counts.tolist() == confusion_matrix(known, shares.argmax(axis=1)).tolist()
    assert found.known.tolist() == known.tolist()
    np.testing.assert_array_equal(found.scores, shares)
    wrong = np.flatnonzero(shares.argmax(axis=1) != known)
    assert len(found.errors) == len(wrong)
    worst = min(wrong, key=lambda n: shares[n, known[n]])
    assert found.worst(1)[0][0] == f"p{worst}", "that which had given its class the least"


def test_a_class_that_the_model_does_not_have() -> None:
    row = {"id": "a", "label": "Z", "prediction": "A", "p_A": "0.75", "p_B": "0.25"}
    found = of_kind([row, {**row, "label": "A"}], "classification")
    assert found.names == ["A", "B", "Z"] and found.counts.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert found.scores[:, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("known, predicted", [("CE-H", "CEHH"), ('["C", "E", null, "H"]', "C E H H")])
def test_residues_that_do_not_count_are_left_out(known: str, predicted: str) -> None:
    rows = [
        {"id": "a", "label": known, "prediction": predicted},
        {"id": "b", "label": "HH", "prediction": "CE"},
    ]
    rows.append({"id": "c", "label": "", "prediction": "HHH"})
    found = of_kind(rows, "token_classification")
    assert found.counts.sum() == 5
    assert found.errors == [("b", "2 residues", "2 wrong")]


def test_several_targets_of_residues() -> None:
    row = {"id": "a", "label/q3": "HHE", "label/rsa": "01-", "q3": "HEE", "rsa": "011"}
    q3, rsa = targets_of([row], "token_classification")
    assert isinstance(q3, Classes) and isinstance(rsa, Classes)
    assert (q3.target, q3.counts.tolist()) == ("q3", [[1, 0], [1, 1]])
    assert (rsa.target, rsa.counts.tolist()) == ("rsa", [[1, 0], [0, 1]])


def test_numbers_with_intervals_and_missing_labels() -> None:
    ends = {"stability_sd": "1", "stability_low": "0", "stability_high": "4"}
    rows = [
        {"id": name, "label": label, "stability": value, **ends}
        for name, label, value in (("a", "1.0", "1.5"), ("b", "", "2"), ("c", "nan", "2"), ("d", "5", "2"))
    ]  # fmt: skip
    found = of_kind(rows, "regression")
    assert isinstance(found, Numbers) and found.low is not None and found.high is not None
    assert found.ids == ["a", "d"] and found.labels.tolist() == [1.0, 5.0] and found.high.tolist() == [4, 4]
    assert found.worst(1) == [("d", "5", "2")]


def test_numbers_of_several_targets_and_of_residues() -> None:
    both = targets_of([{"id": "a", "label/x": "1", "label/y": "", "x": "2", "y": "3"}], "regression")
    assert [each.target for each in both if isinstance(each, Numbers)] == ["x"], "y has no label"
    rows = [
        {"id": "a", "label": "1.0 nan 3", "prediction": "2 2 5"},
        {"id": "b", "label": "1.5", "prediction": "1.5"},
        {"id": "c", "label": "", "prediction": "1"},
    ]
    found = of_kind(rows, "token_regression")
    assert found.labels.tolist() == [1.0, 3.0, 1.5] and found.values.tolist() == [2.0, 5.0, 1.5]
    assert found.worst(1) == [("a", "2 residues", "1.5 off on average")]


@pytest.mark.parametrize("label", [{"label": "A;C"}, {"label/A": "1", "label/B": "0", "label/C": "1"}])
def test_flags_of_one_column_and_of_several(label: dict[str, str]) -> None:
    row = {"id": "a", **label, "prediction": "A;B", "p_A": "0.9", "p_B": "0.5", "p_C": "0.25"}
    found = of_kind([row], "multilabel")
    assert isinstance(found, Flags) and found.known.tolist() == [[1.0, 0.0, 1.0]]
    assert found.worst(9) == [("a", "A, C", "A, B")]


def test_a_flag_that_is_not_known_is_not_wrong() -> None:
    row = {"id": "a", "label/A": "", "label/B": "0", "prediction": "A", "p_A": "0.9", "p_B": "0.1"}
    found = of_kind([row], "multilabel")
    assert np.isnan(found.known[0, 0]) and found.worst(9) == []


def test_contacts_and_empty_files_have_nothing_to_draw() -> None:
    assert targets_of([], "regression") == []
    assert targets_of([{"id": "a", "label": ""}], "contact") == []
