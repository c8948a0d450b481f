"""Numbers with commas: read as pandas reads them when asked, and named as what they may be when not."""

from __future__ import annotations

import io

import numpy as np
import pytest

from esm2mega.data.labels.cells import number_of, numbers_of
from esm2mega.data.labels.numbers import read_number, write_number
from esm2mega.errors import UserError

RNG = np.random.default_rng(4)
NUMBERS = [
    *(RNG.normal(size=40) * 10 ** RNG.integers(-4, 9, 40).astype(float)),
    0.0,
    -1.0,
    1e6,
    999.0,
    1000.0,
]
SWAP = str.maketrans(",.", ".,")


@pytest.mark.parametrize("written", ["plain", "thousands_comma", "decimal_comma"])
def test_numbers_that_are_written_are_read_back(written: str) -> None:
    for number in [*NUMBERS, 1.234, 0.91, 1.5e-7, 1234, -3]:
        assert read_number(write_number(number, written), written) == number


@pytest.mark.parametrize("written", ["thousands_comma", "decimal_comma"])
@pytest.mark.parametrize("form", ["{:,.6f}", "{:.6f}", "{:,.0f}", "{:.9e}"])
def test_numbers_are_read_as_pandas_reads_them(written: str, form: str) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install esm2mega[dev]")
    english = [form.format(x) for x in NUMBERS]
    texts = [x.translate(SWAP) for x in english] if written == "decimal_comma" else english
    marks = {"decimal": ",", "thousands": "."} if written == "decimal_comma" else {"thousands": ","}
    table = io.StringIO("x\n" + "\n".join(texts) + "\n")
    # Its parser of numbers with an exponent knows no marks, which these do not have.
    expected = pandas.read_csv(table, sep=";", float_precision="round_trip", **marks)["x"].astype(float)
    np.testing.assert_array_equal([read_number(text, written) for text in texts], expected)


@pytest.mark.parametrize(
    ("text", "written", "expected"),
    [
        ("1 234 567,5", "decimal_comma", 1234567.5),
        ("1\u202f234,5", "decimal_comma", 1234.5),
        ("1'234,5", "decimal_comma", 1234.5),
        ("-,5", "decimal_comma", -0.5),
        ("2", "decimal_comma", 2.0),
        ("2e-3", "decimal_comma", 0.002),
        ("1,5E+2", "decimal_comma", 150.0),
        ("1,234,567.5e1", "thousands_comma", 12345675.0),
        ("+.5", "thousands_comma", 0.5),
    ],
)
def test_other_forms(text: str, written: str, expected: float) -> None:
    assert number_of(text, "t", "x.csv:2", written) == expected


@pytest.mark.parametrize(
    ("text", "written", "message"),
    [
        (
            "0,5",
            "plain",
            "it has a decimal comma; set data.numbers=decimal_comma, or write",
        ),
        ("1.234,5", "plain", "it has a decimal comma; set"),
        (
            "1,234.5",
            "plain",
            "it has commas between thousands; set data.numbers=thousands_comma, or",
        ),
        ("1,234,567", "plain", "it has commas between thousands; set"),
        (
            "1,234",
            "plain",
            "it is 1.234 with a decimal comma and 1234 with a comma between thousands",
        ),
        ("0.123", "decimal_comma", "data.numbers=decimal_comma is set, and this has a point for decimals"),
        ("1.5", "decimal_comma", "data.numbers=decimal_comma is set, and this has a point for decimals"),
        ("1,234.5", "decimal_comma", "it has commas between thousands"),
        ("0,5", "thousands_comma", "it has a decimal comma"),
        ("12,34.5", "thousands_comma", "correct it, or leave it empty"),
        ("1.2.3", "plain", "correct it, or leave it empty"),
        (",", "decimal_comma", "correct it, or leave it empty"),
        ("1_000", "decimal_comma", "write nothing between thousands"),
        ("\u0661,5", "decimal_comma", "correct it, or leave it empty"),
    ],
)
def test_what_is_no_number_as_written_is_named(text: str, written: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"x.csv:2: .* in column 't' is not a number; {message}"):
        number_of(text, "t", "x.csv:2", written)


def test_numbers_of_residues() -> None:
    for text in ("0,5 1.000,25 nan", "0,5; 1.000,25; nan"):
        found = numbers_of({"t": text}, "t", "x.csv:2", 3, "decimal_comma")
        np.testing.assert_array_equal(found, [0.5, 1000.25, np.nan])
    np.testing.assert_array_equal(numbers_of({"t": "[0.5, 2]"}, "t", "x", 2, "decimal_comma"), [0.5, 2])
    np.testing.assert_array_equal(numbers_of({"t": [0.5, 2]}, "t", "x", 2, "decimal_comma"), [0.5, 2])
