"""Variants as text, and the tables that hold them."""

from pathlib import Path

import pytest

from esm2mega.errors import UserError
from esm2mega.infer.score import clean
from esm2mega.infer.variants import (
    Substitution,
    apply,
    parse_variant,
    read_table,
    single_substitutions,
    write_table,
    write_variant,
)

SEQUENCE = "MKTAYX"


def test_parses_what_it_writes() -> None:
    variant = parse_variant(" k25n:T26G ", SEQUENCE, offset=24)
    assert variant == (Substitution(1, "K", "N"), Substitution(2, "T", "G"))
    assert write_variant(variant, 24) == "K25N:T26G"
    assert apply(variant, SEQUENCE) == "MNGAYX"
    assert parse_variant("M-3A", SEQUENCE, offset=-3) == (Substitution(0, "M", "A"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A1G", "residue 1 of the sequence is M, not A"),
        ("M0A", "residue 0 is not in the sequence"),
        ("X7A", "residue 7 is not in the sequence"),
        ("K2", "is no variant"),
        ("", "is no variant"),
        ("K2del", "is no variant"),
        ("K2J", "J is no residue"),
        ("K2A:K2G", "substitutes a residue twice"),
    ],
)
def test_refuses_what_is_no_variant(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_variant(text, SEQUENCE, offset=1)


def test_the_scan_has_19_of_every_standard_residue() -> None:
    scan = single_substitutions(SEQUENCE)
    assert len(scan) == 5 * 19 == len(set(scan))
    assert all(SEQUENCE[s.position] == s.wild != s.mutant for (s,) in scan)


def test_sequences_are_cleaned_and_strangers_refused() -> None:
    assert clean(" mk\nT-") == "MKT-"
    for bad in ("", "MK*", "MKJ", "MÄ"):
        with pytest.raises(UserError, match="give residues in one-letter code"):
            clean(bad)


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfmutant,note\r\nA1G,"x, y"\r\n\r\nA2G,\n')
    table = read_table(path)
    assert table.columns == ["mutant", "note"]
    assert table.rows == [["A1G", "x, y"], ["A2G", ""]]
    assert table.location(1).endswith("t.csv:4")
    write_table(tmp_path / "again.csv", table.columns, table.rows)
    assert read_table(tmp_path / "again.csv").rows == table.rows
    (tmp_path / "short.csv").write_text("a,b\n1\n")
    with pytest.raises(UserError, match=r"short.csv:2: has 1 cells, the header has 2"):
        read_table(tmp_path / "short.csv")
    with pytest.raises(UserError, match="no column 'c' among mutant, note; name one with --x"):
        table.column("c", "--x")
