"""Cells with a label for each residue, or with several names, as other programs write them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from esm2mega.data.labels.cells import classes_of, mask_of, names_of, number_of, numbers_of, text_of
from esm2mega.data.labels.contacts import read_coordinates
from esm2mega.data.labels.forms import CHARACTERS, LISTS, WORDS
from esm2mega.errors import UserError


def classes(value: Any, length: int, form: str = LISTS, declared: tuple[str, ...] = ()) -> list[str | None]:
    return classes_of({"t": value}, "t", "x.csv:2", length, form, declared)


@pytest.mark.parametrize(
    "cell",
    [
        "[0, 1, 1]",
        "(0, 1, 1)",
        "0, 1, 1",
        "0,1,1",
        "[0 1 1]",
        "[0\n 1 1]",
        "[0. 1. 1.]",
        "[0.0, 1.0, 1.0]",
        "['0', '1', '1']",
        '["0", "1", "1"]',
        "['0' '1' '1']",
        "[np.int64(0), np.int64(1), np.int64(1)]",
        " [ 0 , 1 , 1 ] ",
        [0, 1, 1],
        [0, 1.0, "1"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("form", [CHARACTERS, WORDS, LISTS])
def test_lists_are_read_as_lists_beside_any_form(cell: Any, form: str) -> None:
    assert classes(cell, 3, form) == ["0", "1", "1"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['C', 'H', 'E']", ["C", "H", "E"]),
        ("C, H, E", ["C", "H", "E"]),
        ("[0, -100, 2]", ["0", None, "2"]),
        ("0 -100 2", ["0", None, "2"]),
        ("[0, null, 2]", ["0", None, "2"]),
        ("[0, None, nan]", ["0", None, None]),
        ("[0.0, nan, 2.0]", ["0", None, "2"]),
        ("C null NA", ["C", None, "NA"]),
        ("['C', None, 'nan']", ["C", None, None]),
        ("[True, False, True]", ["True", "False", "True"]),
        ("[true, false, null]", ["True", "False", None]),
        ("[ True False  True]", ["True", "False", "True"]),
        ("007 8 9", ["007", "8", "9"]),
        ([0, -100, None], ["0", None, None]),
        ([0.0, math.nan, -100.0], ["0", None, None]),
        ([True, 1, None], ["True", "1", None]),
        (["C", "-100", " H "], ["C", None, "H"]),
    ],
    ids=repr,
)
def test_entries_and_residues_without_a_label(cell: Any, expected: list[str | None]) -> None:
    assert classes(cell, 3, WORDS) == expected


def test_a_tuple_of_one_and_a_single_residue() -> None:
    assert classes("(0,)", 1) == classes("[0]", 1) == classes("0", 1) == ["0"]
    assert classes("10", 1, WORDS) == ["10"] and classes("-100", 1) == [None]


@pytest.mark.parametrize(
    ("cell", "form", "message"),
    [
        ("[0, 1]", LISTS, "2 labels in column 't' for 3 residues"),
        ("[0, 1, 1", LISTS, "has commas between some|cannot be read at"),
        ("[0, 1 1]", LISTS, "has commas between some of its entries and blanks between others"),
        ("0,,1", LISTS, "cannot be read at ',1'"),
        ("[0, 1, 1,]", LISTS, "ends with a comma"),
        ("[0 1 ... 8 9]", LISTS, "was shortened with '...' when it was written"),
        ("array([0, 1, 1])", LISTS, r"cannot be read at 'array\(\[0, 1,'"),
        ("[[0], [1], [1]]", LISTS, "holds entries that are no text, number or null"),
        ("[0, 0.5, 1]", LISTS, "0.5 in column 't' is no class; .* task.kind=token_regression"),
        ("['C', '', 'H']", LISTS, "the class '' in column 't' is blank"),
        ("['C', ' ', 'H']", LISTS, "the class ' ' in column 't' is blank"),
        (
            "['C', 'a b', 'H']",
            LISTS,
            "the class 'a b' in column 't' holds blanks, brackets, quotes or commas",
        ),
        ("'C' 'H' 'E'", WORDS, "holds blanks, brackets, quotes or commas"),
        ("C H", WORDS, "2 labels in column 't' for 3 residues"),
        ("CHE", LISTS, "'CHE' in column 't' is no list, as other cells are"),
        (
            "C H",
            CHARACTERS,
            "' ' at residue 1 in column 't', which holds a character for each residue; .*declare",
        ),
        (" HE", CHARACTERS, "' ' at residue 0 in column 't'"),
        ("0,1", CHARACTERS, "',' at residue 1 in column 't'"),
        ("CHE ", CHARACTERS, "4 labels in column 't' for 3 residues"),
        ("nan", CHARACTERS, "'nan' in column 't' is a missing value"),
        ("", CHARACTERS, "the label in column 't' is empty"),
        (None, LISTS, "the label in column 't' is empty"),
        (12, LISTS, "12 in column 't' is no list"),
        ([b"C", 1, 2], LISTS, "holds entries that are no text"),
        ({"a": 1}, LISTS, "is no list"),
    ],
    ids=repr,
)
def test_what_is_no_list_is_refused(cell: Any, form: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^x.csv:2: .*({message})"):
        classes(cell, 3, form)


def test_what_the_user_declared_may_be_a_blank_or_a_sign() -> None:
    """DSSP writes a blank for coil; nothing is stripped before lengths are compared."""
    assert classes(" HE ", 4, CHARACTERS, (" ", "H", "E")) == [" ", "H", "E", " "]
    assert classes(["H", " ", "a b"], 3, LISTS, (" ", "a b", "H")) == ["H", " ", "a b"]
    assert classes("null H H", 3, WORDS, ("null", "H")) == ["null", "H", "H"]
    assert classes("(H)", 3, CHARACTERS, ("(", ")", "H")) == ["(", "H", ")"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("0.5 nan -2", [0.5, math.nan, -2.0]),
        ("[0.5, nan, -2]", [0.5, math.nan, -2.0]),
        ("[0.5 nan -2. ]", [0.5, math.nan, -2.0]),
        ("0.5,,-2", "cannot be read at ',-2'"),
        ("0.5, null, -2", [0.5, math.nan, -2.0]),
        ("[0.5, None, -100]", [0.5, math.nan, -100.0]),
        ([0.5, None, "-2"], [0.5, math.nan, -2.0]),
        ("0,5 0,7 1,2", "has commas between some of its entries and blanks between others"),
        ("0,5;0,7;1,2", "4 labels in column 't' for 3 residues"),
        ("[0.5, high, 1]", "'high' in column 't' is not a number"),
        (0.5, "0.5 in column 't' is not a list of numbers"),
        ("0,5", "'0,5' in column 't' may be two numbers, or one with a decimal comma"),
    ],
    ids=repr,
)
def test_numbers_of_residues(cell: Any, expected: list[float] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"^x.csv:2: .*{expected}"):
            numbers_of({"t": cell}, "t", "x.csv:2", 3)
    else:
        np.testing.assert_array_equal(numbers_of({"t": cell}, "t", "x.csv:2", 3), expected)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("a; b ;a", ["a", "b", "a"]),
        ("", []),
        (None, []),
        ("[]", []),
        ([], []),
        ("['a', 'b c']", ["a", "b c"]),
        ('["a", "b"]', ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("('a',)", ["a"]),
        ("['a' 'b']", ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        ("(R)", ["(R)"]),
        ("binding, metal;", ["binding, metal"]),
        ("a, b", "has commas; write names with ; between"),
        ("[a, b]", "has the text 'a' without quotes"),
        ("[NiFe]", "has the text 'NiFe' without quotes"),
        ("[0, 1, 1]", "is no list of names; write names as text, or give a column of 0 and 1"),
        ("['a', None]", "is no list of names"),
        ([0, 1], "is no list of names"),
        (["a", ""], "is no list of names"),
        (7, "7 in column 't' is no list of names"),
        (["a;b"], "holds a ; which separates names"),
    ],
    ids=repr,
)
def test_several_names_of_a_protein(cell: Any, expected: list[str] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"^x.csv:2: .*{re.escape(expected)}"):
            names_of({"t": cell}, "t", "x.csv:2")
    else:
        assert names_of({"t": cell}, "t", "x.csv:2") == expected


@pytest.mark.parametrize(
    "cell",
    ["110", "1 1 0", "1,1,0", "[1, 1, 0]", "[1 1 0]", "[ True  True False]", [1, 1, 0], [True, True, False]]
    + [[1.0, 1.0, 0.0], ["1", "1", "0"]],
    ids=repr,
)
def test_masks(cell: Any) -> None:
    assert mask_of({"m": cell}, "m", "x.csv:2", 3).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 0", "' ' in column 'm'; a mask is made of 0 and 1"),
        ("11", "2 labels in column 'm' for 3 residues"),
        ([1, None, 0], "'None' in column 'm'"),
        ([1, -100, 0], "'-100' in column 'm'"),
        (110, "110 in column 'm' is no mask"),
        (None, "the label in column 'm' is empty"),
    ],
    ids=repr,
)
def test_masks_of_other_signs_are_refused(cell: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^x.csv:2: {message}"):
        mask_of({"m": cell}, "m", "x.csv:2", 3)


def test_coordinates_as_python_writes_them() -> None:
    expected = [[1.0, 2.0, 3.0], [math.nan] * 3, [math.nan] * 3]
    for cell in (
        "[[1, 2, 3], null, [NaN, 1, 2]]",
        "[(1.0, 2.0, 3.0), None, (nan, 1.0, 2.0)]",
        [[1, 2, 3], None, [None, 1, 2]],
    ):
        np.testing.assert_array_equal(read_coordinates(cell, "t", "x.csv:2"), expected)
    for cell in ("[" * 100_000, "[[1, 2, 3]", "x", [[10**400, 0, 0]], [[1, 2]] * 500, 5, list(range(500))):
        with pytest.raises(UserError, match="^x.csv:2: ") as caught:
            read_coordinates(cell, "t", "x.csv:2")
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "value", [list(range(900)), "x" * 4000, [[0.5] * 900], str(list(range(900)))], ids=type
)
def test_a_message_never_prints_a_whole_list(value: Any) -> None:
    cells = {"t": value}
    for read in (
        lambda: text_of(cells, "t", "x"),
        lambda: number_of(value, "t", "x"),
        lambda: numbers_of(cells, "t", "x", 3),
        lambda: classes(value, 3),
        lambda: names_of(cells, "t", "x"),
        lambda: mask_of(cells, "t", "x", 3),
        lambda: read_coordinates(value, "t", "x"),
    ):
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 250
        else:
            assert isinstance(value, str) and value[0] == "x", "only text is a class or a name"


def test_the_decimal_comma_is_refused_with_its_cure() -> None:
    for cell in ("1,5", "-0,25", "1,5e-3"):
        with pytest.raises(UserError, match=f"^x.csv:2: '{cell}' .* not a number; it has a decimal comma"):
            number_of(cell, "t", "x.csv:2")
    with pytest.raises(UserError, match="is not a number; correct it, or leave it empty"):
        number_of("1,5,3", "t", "x.csv:2")
    with pytest.raises(UserError, match="is a list, not one class; .* task.kind=multilabel"):
        text_of({"t": "[0, 1]"}, "t", "x.csv:2")
    assert text_of({"t": "[NiFe] hydrogenase"}, "t", "x.csv:2") == "[NiFe] hydrogenase"
    # Spreadsheets make these of TRUE and FALSE, and write them so to CSV.
    assert [text_of({"t": value}, "t", "x") for value in (True, False)] == ["TRUE", "FALSE"]
