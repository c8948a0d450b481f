"""What is scored, and that every row is checked before a model is loaded."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from esm2mega.data.variants.variant import Substitution
from esm2mega.data.variants.wild_types import WildType
from esm2mega.errors import UserError
from esm2mega.infer.plan import Plan, ScoreOptions, measured, plan_file, plan_scan

WILD = WildType("w", "MKTAY")
OTHER = WildType("o", "GSHM")


def plan(folder: Path, text: str, *proteins: WildType, name: str = "t.csv", **options: object) -> Plan:
    path = folder / name
    path.write_text(text)
    return plan_file(str(path), proteins, ScoreOptions(**options))  # type: ignore[arg-type]


def test_variants_go_to_their_wild_types(tmp_path: Path) -> None:
    found = plan(tmp_path, "id,mutant\no,G1A\nw,K2N\no,WT\n", WILD, OTHER)
    assert found.variants == [
        (OTHER, [(0, (Substitution(0, "G", "A"),)), (2, ())]),
        (WILD, [(1, (Substitution(1, "K", "N"),))]),
    ]
    assert found.columns(ScoreOptions()) == ["score"] and not found.skipped


def test_whole_sequences_are_those_without_a_column_of_variants(tmp_path: Path) -> None:
    """ProteinGym's tables of substitutions have both columns, those of indels have only the sequences."""
    table = "mutant,mutated_sequence\nK2N,MNTAY\n"
    assert plan(tmp_path, table, WILD).variants
    table = "mutated_sequence,DMS_score\nmkay,1\nMKTTAY,2\n"
    assert plan(tmp_path, table, WILD).whole == [(WILD, [(0, "MKAY"), (1, "MKTTAY")])]
    added = ["pseudo_perplexity", "pseudo_log_likelihood"]
    assert plan(tmp_path, table, WILD).columns(ScoreOptions()) == [*added, "score"]
    alone = plan(tmp_path, table)
    assert alone.whole == [(None, [(0, "MKAY"), (1, "MKTTAY")])] and alone.columns(ScoreOptions()) == added
    # An older ProteinGym had whole sequences in the column of variants.
    table = f"mutant,DMS_score\n{'MKAY' * 6},1\n"
    with pytest.raises(
        UserError, match="is a whole sequence; name the column of such with --sequence-column"
    ):
        plan(tmp_path, table, WILD)
    assert plan(tmp_path, table, WILD, sequence_column="mutant").whole == [(WILD, [(0, "MKAY" * 6)])]


@pytest.mark.parametrize("name", ["p.fasta", "p.txt", "p.fasta.gz"])
def test_a_fasta_is_whole_sequences_whatever_its_name(tmp_path: Path, name: str) -> None:
    text = "\n>a x\nMK\nT\n>b\nmka\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = plan_file(str(tmp_path / name), [], ScoreOptions())
    assert found.whole == [(None, [(0, "MKT"), (1, "MKA")])]
    assert found.table is not None
    assert found.table.columns == ["id", "sequence"] and found.table.rows == [["a", "MKT"], ["b", "mka"]]
    assert found.table.location(1).endswith(f"{name}:5")


def test_a_table_with_an_ending_of_no_format_stays_a_table(tmp_path: Path) -> None:
    assert plan(tmp_path, "mutant\tx\nK2N\t1\n", WILD, name="variants.txt").variants


BAD_ROWS = [
    ("mutant\nK2N\nA2N\n", {}, "t.csv:3: A2N: residue 2 of the sequence is K, not A"),
    ("mutant\nK2N\n\nK2*\n", {}, "t.csv:4: 'K2.': a stop is no residue, so masked-marginals has no score"),
    ("mutant\nK2N\np.Lys2Ter\n", {"strategy": "wt-marginals"}, "t.csv:3: 'p.Lys2Ter': a stop is no residue"),
    ("mutant\nK2N\nK2del\n", {}, "t.csv:3: 'K2del' is no substitution"),
    ('mutant\nK2N\n""\n', {}, "t.csv:3: '' is no variant"),
    (
        "mutant\nK2N\nK2X\n",
        {"normalization": "residues"},
        "t.csv:3: 'K2X': X has no probability among the 20",
    ),
    ("mutated_sequence\nMK\nMK*\n", {}, "t.csv:3: the sequence holds '.', which ESM-2 does not know"),
    ("mutated_sequence\nMK\nNA\n", {}, "t.csv:3: 'NA' in the place of a sequence is a missing value"),
    (
        "mutated_sequence\nMK\nMX\n",
        {"normalization": "residues"},
        "t.csv:3: X has no probability among the 20",
    ),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_or_listed(
    tmp_path: Path, text: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=f"{message}.*or leave such rows without a score with --skip-invalid"):
        plan(tmp_path, text, WILD, **options)
    found = plan(tmp_path, text, WILD, **options, skip_invalid=True)
    assert list(found.skipped) == [1]
    assert [[row for row, _ in rows] for _, rows in (*found.variants, *found.whole)] == [[0]]
    with pytest.raises(UserError, match=r"t.csv:[23]: .*; no other row has a score either"):
        lines = text.split("\n")
        plan(tmp_path, "\n".join([lines[0], *lines[2:]]), WILD, **options, skip_invalid=True)


def test_a_stop_is_scored_as_what_is_left_of_the_protein(tmp_path: Path) -> None:
    assert plan(tmp_path, "mutant\nK2*\n", WILD, strategy="pseudo-ppl").variants
    # Letters behind the stop are not there any more.
    odd = WildType("w", "MKTAX")
    options = {"strategy": "pseudo-ppl", "normalization": "residues"}
    assert plan(tmp_path, "mutant\nK2*\n", odd, **options).variants
    with pytest.raises(UserError, match="X has no probability"):
        plan(tmp_path, "mutant\nK2N\n", odd, **options)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "neither a column 'mutant' of variants nor a column 'mutated_sequence' of whole"),
        ("mutant,score\nK2N,1\n", {}, "has a column 'score' already; name the new one with --score-column"),
        ("mutated_sequence,score\nMK,1\n", {}, "a column 'score' already; name the new one"),
        ("mutated_sequence,pseudo_perplexity\nMK,1\n", {}, "a column 'pseudo_perplexity' already; rename it"),
        ("mutant\nK2N\n", {"measured_column": "m"}, "no column 'm' among mutant; name one with --measured"),
        ("mutant,m\nK2N,1_000\n", {"measured_column": "m"}, "no row has a number in 'm'"),
        ("mutant,m\nK2N,\nK2A,inf\n", {"measured_column": "m"}, "no row has a number in 'm'"),
        ("mutated_sequence\nMK\n", {"strategy": "wt-marginals"}, "leave --strategy wt-marginals out"),
        ("mutated_sequence\nMK\n", {"offset": 3}, "leave --offset out"),
        (
            "mutated_sequence\nMK\n",
            {"sequence_column": "s"},
            "no column 's' .* name one with --sequence-column",
        ),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path, text, WILD, **options)


def test_variants_need_a_wild_type_with_letters_that_have_a_probability(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its variants need a wild type; give it by --sequence or --fasta"):
        plan(tmp_path, "mutant\nK2N\n")
    odd = WildType("w", "MKX")
    with pytest.raises(UserError, match="X has no probability among the 20"):
        plan(tmp_path, "mutated_sequence\nMK\n", odd, normalization="residues")
    with pytest.raises(UserError, match="w: X has no probability among the 20"):
        plan_scan([WILD, odd], ScoreOptions(strategy="pseudo-ppl", normalization="residues"))


def test_measured_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    """One that is written in another way is no missing one."""
    rows = ['M1A,"0,91"', 'K2N,"1.234,5"', "T3A,n.d.", "A4G,"]
    (tmp_path / "v.csv").write_text("mutant,fitness\n" + "\n".join(rows) + "\n")
    comma = ScoreOptions(measured_column="fitness", overrides=["data.numbers=decimal_comma"])
    found = plan_file(str(tmp_path / "v.csv"), [WILD], comma)
    assert found.table is not None
    assert measured(found.table, "fitness", comma.numbers) == [0.91, 1234.5, None, None]
    with pytest.raises(
        UserError, match=r"v.csv:2: '0,91' in column 'fitness': it has a decimal comma; set data"
    ):
        plan_file(str(tmp_path / "v.csv"), [WILD], ScoreOptions(measured_column="fitness"))
