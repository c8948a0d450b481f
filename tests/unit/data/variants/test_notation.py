"""Variants as tables write them."""

import pytest

from esm2mega.data.variants.notation import parse_variant
from esm2mega.data.variants.variant import Substitution, apply, write_variant
from esm2mega.errors import UserError

SEQUENCE = "MKTAYX"


def test_parses_what_is_written() -> None:
    variant = parse_variant(" k25n:T26G ", SEQUENCE, offset=24)
    assert variant == (Substitution(1, "K", "N"), Substitution(2, "T", "G"))
    assert write_variant(variant, 24) == "K25N:T26G"
    assert parse_variant("M-3A", SEQUENCE, offset=-3) == (Substitution(0, "M", "A"),)


@pytest.mark.parametrize(
    ("text", "mutant"),
    [
        # Substitutions, in one letter, in three, and as HGVS and MaveDB write them.
        ("K2N", "MNTAYX"),
        ("Lys2Asn", "MNTAYX"),
        ("LYS2ASN", "MNTAYX"),
        ("p.Lys2Asn", "MNTAYX"),
        ("p.(Lys2Asn)", "MNTAYX"),
        ("p.K2N", "MNTAYX"),
        ("NP_009225.1:p.Lys2Asn", "MNTAYX"),
        ("p.Lys2Xaa", "MXTAYX"),
        ("p.Lys2Sec", "MUTAYX"),
        ("K2X", "MXTAYX"),
        ("p.[Lys2Asn;Thr3Gly]", "MNGAYX"),
        ("p.[(Lys2Asn);(Thr3Gly)]", "MNGAYX"),
        ("p.([Lys2Asn; Thr3Gly])", "MNGAYX"),
        ("Lys2Asn:Thr3Gly", "MNGAYX"),
        # The wild type, by name and as synonymous changes.
        *((text, SEQUENCE) for text in ("WT", "wt", "_wt", "_sy", "wild-type", "p.=", "p.(=)", "K2K", "K2=")),
        *((text, SEQUENCE) for text in ("p.Lys2=", "p.(Lys2=)", "p.Lys2Lys", "p.[Lys2=;Thr3=]", "K2K:T3T")),
        ("p.[Lys2=;Thr3Gly]", "MKGAYX"),
        # Stops.
        *((text, "MKT") for text in ("A4*", "A4Ter", "Ala4Ter", "p.Ala4Ter", "p.(Ala4*)", "p.A4*")),
        ("K2N:A4*", "MNT"),
    ],
)
def test_what_is_known_is_read(text: str, mutant: str) -> None:
    assert apply(parse_variant(text, SEQUENCE, offset=1), SEQUENCE) == mutant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A1G", "residue 1 of the sequence is M, not A"),
        ("p.Ala1=", "residue 1 of the sequence is M, not A"),
        ("A1*", "residue 1 of the sequence is M, not A"),
        ("M0A", "residue 0 is not in the sequence"),
        ("X7A", "residue 7 is not in the sequence"),
        *(
            (text, "is no variant")
            for text in ("K2", "", "=K2", "K2Abc", "p.?", "p.Met1?", "WT:K2N", "c.4A>G")
        ),
        ("p.[Lys2Asn];[Thr3Gly]", "is no variant"),  # of two molecules
        *((f"p.Lys2{change}", "no substitution; .* whole sequences") for change in ("del", "dup", "fs")),
        ("p.Lys2_Ala4del", "no substitution; .* whole sequences"),
        ("p.Lys2_Thr3insGly", "no substitution; .* whole sequences"),
        ("K2del", "no substitution; .* whole sequences"),
        (f"K{'9' * 5000}A", "is no variant"),
        ("K2J", "J is no residue"),
        ("p.Lys2Xle", "J is no residue"),
        ("p.Lys2X", "X is a stop in old HGVS and any residue in new"),
        ("Lys2X", "X is a stop in old HGVS and any residue in new"),
        ("p.Met1Ter", "leaves no residue"),
        ("K2A:K2G", "changes a residue twice"),
        ("K2K:K2G", "changes a residue twice"),
        ("K2*:T3G", "changes a residue after a stop"),
    ],
)
def test_refuses_what_is_not_known(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_variant(text, SEQUENCE, offset=1)


def test_cures_name_what_sets_the_offset() -> None:
    cures = {
        "--offset": "or set --offset .now 1. to",
        "offset": "or set offset .now 1. to",
        "": "correct it$",
    }
    for name, cure in cures.items():
        for text in ("A1G", "M0A"):
            with pytest.raises(UserError, match=cure):
                parse_variant(text, SEQUENCE, 1, name)
