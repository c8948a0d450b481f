"""Sequences of variants: what is written of insertions and deletions, and what is refused."""

from __future__ import annotations

import pytest
from Bio.SeqUtils import seq1

from esm2mega.data.variants.sequences import mutated_sequence
from esm2mega.errors import UserError

WILD = "MKTAYIAKQR"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WT", WILD),
        ("p.=", WILD),
        ("K2N", "MNTAYIAKQR"),
        ("K2N:A7G", "MNTAYIGKQR"),
        ("p.Ala4Ter", "MKT"),
        ("K2del", "MTAYIAKQR"),
        ("p.Lys2del", "MTAYIAKQR"),
        ("p.(Lys2_Ala4del)", "MYIAKQR"),
        ("k2_t3insgs", "MKGSTAYIAKQR"),
        ("p.Lys2_Thr3insGlySer", "MKGSTAYIAKQR"),
        ("p.Lys2delinsTrpGly", "MWGTAYIAKQR"),
        ("NP_1.1:p.Lys2_Ala4delinsTrp", "MWYIAKQR"),
        ("p.Thr3dup", "MKTTAYIAKQR"),
        ("T3_Y5dup", "MKTAYTAYIAKQR"),
        ("A4G:K2del", "MTGYIAKQR"),
        ("p.[Ala4Gly;Lys8del]", "MKTGYIAQR"),
        ("K2_T3insA:T3del", "MKAAYIAKQR"),
        ("K2del:A4*", "MT"),
        ("mktayiak", "MKTAYIAK"),
        ("MKTAYIAK*", "MKTAYIAK"),
        ("K2N/A7G", "MNTAYIGKQR"),
        ("K2N, A7G", "MNTAYIGKQR"),
        ("K2N;A7G", "MNTAYIGKQR"),
        ("K2N + A7G", "MNTAYIGKQR"),
        ("k2n a7g", "MNTAYIGKQR"),
        ("K2N_A7G", "MNTAYIGKQR"),
        ("Lys2Asn_Ala7Gly", "MNTAYIGKQR"),
        ("p.Lys2Asn:p.Ala7Gly", "MNTAYIGKQR"),
        ("p.Lys2Asn/p.Lys8del", "MNTAYIAQR"),
        ("Lys2Asn:p.Ala7Gly", "MNTAYIGKQR"),
        ("SCN5A:p.Ala7Gly", "MKTAYIGKQR"),
        ("ADH1B:p.Ala7Gly", "MKTAYIGKQR"),
        ("K2del:p.Ala7Gly", "MTAYIGKQR"),
        ("K2_T3insA/A7G", "MKATAYIGKQR"),
        ("EXT1_HUMAN:p.Ala7Gly", "MKTAYIGKQR"),
        ("P12345:p.Ala7Gly", "MKTAYIGKQR"),
    ],
)
def test_what_a_cell_stands_for(text: str, expected: str) -> None:
    assert mutated_sequence(f" {text} ", WILD) == expected


def test_residues_are_numbered_from_any_number() -> None:
    """A signal peptide that was cut off, or a tag in front."""
    assert mutated_sequence("K22N:A27G", WILD, 21) == "MNTAYIGKQR"
    assert mutated_sequence("K-1_T0insGS", WILD, -2) == "MKGSTAYIAKQR"
    for text in ("K2N", "K2del", "K2_T3insA", "K22N:T3del"):
        with pytest.raises(UserError, match=r"are numbered from 21; correct it, or set data.first_residue"):
            mutated_sequence(text, WILD, 21)


def test_three_letters_are_read_as_biopython_reads_them() -> None:
    inserted = "GlyAlaTrpSecPyl"
    found = mutated_sequence(f"p.Lys2_Thr3ins{inserted}", WILD)
    assert found == WILD[:2] + seq1(inserted) + WILD[2:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("K2_A4insG", r"K2_A4INSG: residues are inserted between two neighbours"),
        ("A4_K2del", r"A4_K2DEL: ends before it begins"),
        ("K2_K2del", r"K2_K2DEL: ends before it begins"),
        ("K2ins", r"K2INS: names no residues"),
        ("K2insG", r"K2INSG: residues are inserted between two neighbours"),
        ("K2delK", r"K2DELK: names residues after del; leave them out"),
        (
            "A2del",
            r"A2DEL: residue 2 of the sequence is K, not A; correct it, or set data.first_residue \(now 1\)",
        ),
        ("K2_T30del", r"K2_T30DEL: residue 30 is not in the sequence, whose 10 residues"),
        ("p.Lys2_Thr3insGlyXyz", r"XYZ is no residue of ESM-2"),
        ("K2del:K2N", r"changes a residue twice"),
        ("K2_T3insA:K2_T3insG", r"changes a residue twice"),
        ("K2_A4del:T3N", r"changes a residue twice"),
        ("K2*:A4del", r"changes a residue twice"),
        ("M1_R10del", r"leaves no residue"),
        ("p.Lys2fs", r"LYS2FS is no substitution, .* write the whole sequence of the variant in its place"),
        ("p.Lys2ArgfsTer9", r"write the whole sequence"),
        ("MKT", r"with less than half of the 10 residues of data.wild_type it is not taken for a sequence"),
        (
            "A2G",
            r"A2G: residue 2 of the sequence is K, not A; correct it, or set data.first_residue \(now 1\)",
        ),
        ("K2N:", r"'K2N:' is no variant"),
        # A gene, and a change.
        ("A2M:p.Lys2Asn", r"A2M may be a change or the name of a protein; leave the name out"),
        ("K2N:p.Ala7Gly", r"K2N may be a change or the name of a protein"),
        ("K2N_A7G_", r"'K2N_A7G_' is no variant"),
        ("2", r"'2' is no variant"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mutated_sequence(text, WILD)
