"""Variants, and the tables that hold them."""

from pathlib import Path

import pytest

from esm2mega.data.variants.variant import (
    STOP,
    Substitution,
    apply,
    ends_early,
    single_substitutions,
    write_variant,
)
from esm2mega.errors import UserError
from esm2mega.infer.variant_tables import read_table, write_table

SEQUENCE = "MKTAYX"


def test_a_variant_is_applied_and_written() -> None:
    variant = (Substitution(1, "K", "N"), Substitution(2, "T", "G"))
    assert write_variant(variant, 24) == "K25N:T26G"
    assert apply(variant, SEQUENCE) == "MNGAYX" and not ends_early(variant)
    assert apply((), SEQUENCE) == SEQUENCE
    stop = (Substitution(1, "K", "N"), Substitution(3, "A", STOP))
    assert apply(stop, SEQUENCE) == "MNT" and ends_early(stop)


def test_the_scan_has_19_of_every_standard_residue() -> None:
    scan = single_substitutions(SEQUENCE)
    assert len(scan) == 5 * 19 == len(set(scan))
    assert all(SEQUENCE[s.position] == s.wild != s.mutant for (s,) in scan)


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
