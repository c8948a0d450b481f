"""Proteins whose variants are scored."""

from pathlib import Path

import pytest

from esm2mega.data.variants.wild_types import WildType, clean, read_wild_types
from esm2mega.errors import UserError


def test_sequences_are_cleaned_and_strangers_refused() -> None:
    assert clean(" mk\nT-") == "MKT-"
    for bad in ("", "MK*", "MKJ", "MÄ"):
        with pytest.raises(UserError, match="give residues in one-letter code"):
            clean(bad)


def test_wild_types_are_read_and_the_line_of_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.fasta"
    path.write_text(">a\nMKT\n>b\nmk\nx\n")
    assert read_wild_types(str(path)) == [WildType("a", "MKT"), WildType("b", "MKX")]
    path.write_text(">a\nMKT\n>b\nMKJ\n")
    with pytest.raises(UserError, match=r"w.fasta:3: the sequence holds 'J', which ESM-2 does not know"):
        read_wild_types(str(path))
    path.write_text(">a\nMKT\n>a\nMK\n")
    with pytest.raises(UserError, match="ids repeat"):
        read_wild_types(str(path))
