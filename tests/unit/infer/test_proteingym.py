"""Assays of ProteinGym: the summary, finished tables, and what is checked before anything is scored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.infer.plan import ScoreOptions
from esm2mega.infer.proteingym import mean_of_means, read_reference, score_assays
from esm2mega.infer.variant_tables import read_table
from tests.infer_models import Reference, pseudo_log_likelihood
from tests.proteingym_files import HEADER, write_assays


def test_proteingym_layout(reference: Reference, tmp_path: Path) -> None:
    (tmp_path / "assays").mkdir()
    assays = {"A_X": "MKTAYIAKQR", "B_Y": "GSHMLEDPVE"}
    rows = [
        f"{name},{name}.csv,P_{name[0]},{sequence},{name[0]}ctivity\n" for name, sequence in assays.items()
    ]
    (tmp_path / "reference.csv").write_text(HEADER + "".join(rows))
    for name, w in assays.items():
        lines = [f"{w[i]}{i + 1}W:{w[i + 1]}{i + 2}C,x,{i * i % 7}\n" for i in range(0, 8)]
        (tmp_path / "assays" / f"{name}.csv").write_text(
            "mutant,mutated_sequence,DMS_score\n" + "".join(lines)
        )
    found = read_reference(str(tmp_path / "reference.csv"), str(tmp_path / "assays"))
    options = ScoreOptions(strategy="wt-marginals")
    first = score_assays(str(reference.checkpoint), found, str(tmp_path / "out"), options)
    summary = read_table(tmp_path / "out" / "summary.csv")
    mean = sum(map(float, summary.column("spearman", ""))) / 2
    assert first[-2].endswith(f"2 assays, mean Spearman {mean:.4f}")
    stamps = [(tmp_path / "out" / f"{name}.csv").stat().st_mtime_ns for name in assays]

    def again(mode: str, options: ScoreOptions = options) -> list[str]:
        return score_assays(str(reference.checkpoint), found, str(tmp_path / "out"), options, mode)

    with pytest.raises(UserError, match="is not empty; continue with --resume"):
        again("new")
    assert again("resume") == first
    assert stamps == [(tmp_path / "out" / f"{name}.csv").stat().st_mtime_ns for name in assays]
    with pytest.raises(UserError, match="strategy was 'wt-marginals' and is 'masked-marginals'"):
        again("resume", ScoreOptions())
    (tmp_path / "assays" / "B_Y.csv").write_text("mutant,mutated_sequence,DMS_score\nG1A,x,2\n")
    with pytest.raises(UserError, match=r"B_Y.csv: holds other rows than .*begin again with --overwrite"):
        again("resume")
    assert again("overwrite", ScoreOptions())[-2].startswith(str(tmp_path / "out" / "summary.csv"))
    assert len(read_table(tmp_path / "out" / "B_Y.csv").rows) == 1


def written(folder: Path, tables: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """The names of the reference file and of the folder of the tables."""
    reference, assays = folder / "r.csv", folder / "assays"
    write_assays(reference, assays, tables)
    return str(reference), str(assays)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("mutant,DMS_score\nG1A,1\nS2C,2\nA3C,3\n", "Z.csv:4: A3C: residue 3 of the sequence is H, not A"),
        ("mutated_sequence,DMS_score\nGS,1\nGSJ,2\n", "Z.csv:3: the sequence holds 'J'"),
        ("mutant,DMS_score\nG1A,1\nS2C\n", "Z.csv:3: has 1 cells, the header has 2"),
        ("mutant,DMS_score\nG1A,x\n", "Z.csv: no row has a number in 'DMS_score'"),
        ("mutant,fitness\nG1A,1\n", "Z.csv: no column 'DMS_score' .*is it a table of ProteinGym"),
        ("mutant,DMS_score,score\nG1A,1,1\n", "Z.csv: has a column 'score' already"),
    ],
)
def test_the_last_assay_is_checked_before_the_first_is_scored(
    tmp_path: Path, last: str, message: str
) -> None:
    """Before the model is looked for: there is none."""
    first = "mutant,DMS_score\nM1A,1\nK2N,2\n"
    reference_file, folder = written(tmp_path, {"A": ("MKTAY", first), "Z": ("GSHM", last)})
    assays = read_reference(reference_file, folder)
    with pytest.raises(UserError, match=message) as caught:
        score_assays(str(tmp_path / "no_model"), assays, str(tmp_path / "out"), ScoreOptions())
    assert "--offset" not in str(caught.value) and not (tmp_path / "out").exists()


def test_ids_that_name_no_table_are_refused(tmp_path: Path) -> None:
    table = "mutant,DMS_score\nM1A,1\n"
    for number, name in enumerate(("../x", "summary")):
        (tmp_path / str(number)).mkdir()
        reference_file, folder = written(tmp_path / str(number), {"A": ("MK", table)})
        Path(reference_file).write_text(Path(reference_file).read_text().replace("\nA,", f"\n{name},"))
        with pytest.raises(UserError, match=f"r.csv:2: DMS_id '{name}' cannot name a table"):
            read_reference(reference_file, folder)


def test_a_reference_file_without_a_column_is_refused(tmp_path: Path) -> None:
    reference_file, folder = written(tmp_path, {"A": ("MK", "mutant,DMS_score\nM1A,1\n")})
    Path(reference_file).write_text(Path(reference_file).read_text().replace("UniProt_ID", "protein"))
    with pytest.raises(UserError, match="r.csv: no column 'UniProt_ID' .*; is it the reference file of Prot"):
        read_reference(reference_file, folder)


def test_indels_and_rows_without_a_score(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; a second start takes over what is finished, empty cells included."""
    from scipy.stats import spearmanr

    mutants = ["MKAYIA", "MKTTAYIA", "MKTAY", "MK*", "MKTAYIA", "AKTAYIA"]
    rows = "".join(f"{m},{number},1\n" for number, m in enumerate(mutants))
    indels = "mutated_sequence,DMS_score,DMS_score_bin\n" + rows
    substitutions = "mutant,DMS_score\nG1A,1\nS2*,2\nWT,3\nH3K,4\n"
    reference_file, folder = written(tmp_path, {"I": ("MKTAYIA", indels), "S": ("GSHM", substitutions)})
    command = ["score", str(reference.checkpoint), "--proteingym", reference_file, "--assays", folder]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "I.csv:5: the sequence holds '*'" in capsys.readouterr().err
    assert main([*command, "--skip-invalid"]) == 0
    printed = capsys.readouterr().out
    assert "I: 1 of 6 rows have no score" in printed and "S: 1 of 4 rows have no score" in printed
    assert "S: 1 rows are the wild type" in printed
    table = read_table(tmp_path / "out" / "I.csv")
    scores = [math.nan if cell == "" else float(cell) for cell in table.column("score", "")]
    wild = pseudo_log_likelihood(reference, "MKTAYIA")
    for mutant, score in zip(mutants, scores, strict=True):
        if "*" not in mutant:
            assert abs(score - (pseudo_log_likelihood(reference, mutant) - wild)) < 1e-4  # fp32, 8 terms
    kept = [0, 1, 2, 4, 5]
    expected = spearmanr(kept, [scores[i] for i in kept]).statistic
    summary = read_table(tmp_path / "out" / "summary.csv")
    assert summary.column("variants", "") == ["5", "3"]
    assert float(summary.column("spearman", "")[0]) == pytest.approx(expected, abs=1e-12)
    assert main([*command, "--skip-invalid", "--resume"]) == 0
    assert capsys.readouterr().out == printed


PUBLISHED = Path(__file__).parents[4] / "shared/data/proteingym"


@pytest.mark.skipif(
    not PUBLISHED.is_dir(),
    reason="ProteinGym's tables are not beside the repository (../shared/data/proteingym)",
)
@pytest.mark.parametrize(
    ("size", "expected"),
    [("8M", 0.226), ("35M", 0.321), ("150M", 0.387), ("650M", 0.414), ("3B", 0.406), ("15B", 0.400)],
)
def test_published_assays_give_the_published_leaderboard(size: str, expected: float) -> None:
    """The benchmark's own Spearman of each of its 217 assays, aggregated here, without any model."""
    reference = read_table(PUBLISHED / "reference_substitutions.csv")
    names = ("DMS_id", "coarse_selection_type", "UniProt_ID")
    assays = list(zip(*(reference.column(name, "") for name in names), strict=True))
    table = read_table(PUBLISHED / "spearman_by_assay.csv")
    spearman = dict(zip(table.column("DMS ID", ""), table.column(f"ESM2 ({size})", ""), strict=True))
    assert len(assays) == len(spearman) == 217
    values = [(function, protein, float(spearman[name])) for name, function, protein in assays]
    assert round(mean_of_means(values), 3) == expected
    # Neither a plain mean over assays nor one over proteins gives these.
    assert round(sum(value for *_, value in values) / 217, 3) != expected
