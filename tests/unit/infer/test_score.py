"""Scores against loops over Hugging Face's model, one masked protein at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import esm2mega
from esm2mega.cli.app import main
from esm2mega.data.variants.variant import AMINO_ACIDS
from esm2mega.data.variants.wild_types import WildType
from esm2mega.errors import UserError
from esm2mega.infer.plan import ScoreOptions
from esm2mega.infer.score import draw_scan, score_file
from esm2mega.infer.variant_tables import read_table
from esm2mega.infer.windows import optimal
from esm2mega.vocabulary import MASK, STANDARD_RESIDUES, VOCAB
from tests.infer_models import (
    MAX_SEQ_LENGTH,
    Reference,
    ids_of,
    pseudo_log_likelihood,
    random_proteins,
    write_fasta,
)

# Absolute, in nats: fp32 logits of a random model of some 10 nats, differences of log-probabilities.
BOUND = 1e-4
# Absolute, in nats, of sums of up to 45 terms in fp64.
BOUND_FP64 = 1e-9

SEQUENCE, LONG = random_proteins([60, 286], seed=12)


def masked_table(reference: Reference, sequence: str, letters: list[int] | None = None) -> torch.Tensor:
    """log p at every residue when it alone is masked, each in its own window: ``[L, 33]`` fp64."""
    rows = []
    for residue in range(len(sequence)):
        window = optimal(residue, len(sequence), MAX_SEQ_LENGTH)
        ids = ids_of(sequence)
        ids[0, residue + 1] = MASK
        logits = (
            reference.run_ids(ids[:, window.start : window.stop])
            .logits[0, residue + 1 - window.start]
            .double()
        )
        if letters is not None:
            outside = [token for token in range(33) if token not in letters]
            logits[outside] = -torch.inf
        rows.append(logits.log_softmax(-1))
    return torch.stack(rows)


def scores(checkpoint: Path, out: Path, **changes: object) -> dict[str, float]:
    sequence = str(changes.pop("sequence", SEQUENCE))
    variants = changes.pop("variants", None)
    options = ScoreOptions(**changes)  # type: ignore[arg-type]
    score_file(str(checkpoint), [WildType("w", sequence)], variants, str(out), options)  # type: ignore[arg-type]
    table = read_table(out)
    cells = zip(table.column("mutant", ""), table.column("score", ""), strict=True)
    return {mutant: float(score) for mutant, score in cells}


def test_masked_scan_of_286_residues(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 5,434 substitutions and their picture by one command, through windows of 128 tokens."""
    out, picture = tmp_path / "scan.csv", tmp_path / "scan.png"
    command = ["score", str(reference.checkpoint), "--sequence", LONG, "--out", str(out)]
    command += ["--heat-map", str(picture)]
    assert main(command) == 0
    assert "5,434 single substitutions of 1 proteins" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    table = read_table(out)
    cells = zip(table.column("mutant", ""), table.column("score", ""), strict=True)
    found = {mutant: float(score) for mutant, score in cells}
    expected_table = masked_table(reference, LONG)
    assert len(found) == 5434 == 286 * 19
    for residue, wild in enumerate(LONG):
        for mutant in AMINO_ACIDS.replace(wild, ""):
            expected = (
                expected_table[residue, VOCAB.index(mutant)] - expected_table[residue, VOCAB.index(wild)]
            )
            assert abs(found[f"{wild}{residue + 1}{mutant}"] - float(expected)) < BOUND


@pytest.fixture(scope="module")
def variants_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variants") / "variants.csv"
    w = SEQUENCE
    rows = [f"{w[0]}24A,1.5", f"{w[3]}27W:{w[30]}54C,-0.25", f"{w[59]}83M:{w[1]}25Y,", f"{w[8]}32H,0.5"]
    path.write_text("mutant,DMS_score\n" + "\n".join(rows) + "\n")
    return path


def parsed(path: Path) -> list[tuple[str, list[tuple[int, str, str]]]]:
    texts = read_table(path).column("mutant", "")
    return [(t, [(int(p[1:-1]) - 24, p[0], p[-1]) for p in t.split(":")]) for t in texts]


@pytest.mark.parametrize("strategy", ["wt-marginals", "masked-marginals"])
@pytest.mark.parametrize("normalization", ["vocabulary", "residues"])
def test_marginals_add_up_over_substitutions(
    reference: Reference, variants_csv: Path, tmp_path: Path, strategy: str, normalization: str
) -> None:
    out = tmp_path / "out.csv"
    found = scores(
        reference.checkpoint,
        out,
        variants=str(variants_csv),
        strategy=strategy,
        normalization=normalization,
        offset=24,
    )
    letters = list(STANDARD_RESIDUES) if normalization == "residues" else None
    if strategy == "masked-marginals":
        table = masked_table(reference, SEQUENCE, letters)
    else:
        table = reference.run(SEQUENCE).logits[0, 1:-1].double().log_softmax(-1)
    for text, substitutions in parsed(variants_csv):
        expected = sum(
            float(table[i, VOCAB.index(m)] - table[i, VOCAB.index(w)]) for i, w, m in substitutions
        )
        assert abs(found[text] - expected) < BOUND
    assert out.read_text().splitlines()[0] == "mutant,DMS_score,score"


def test_pseudo_likelihood_covers_every_residue_of_the_mutant(
    reference: Reference, variants_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    found = scores(reference.checkpoint, out, variants=str(variants_csv), strategy="pseudo-ppl", offset=24)
    for text, substitutions in parsed(variants_csv):
        mutant = list(SEQUENCE)
        for i, _, letter in substitutions:
            mutant[i] = letter
        table = masked_table(reference, "".join(mutant))
        expected = sum(float(table[i, VOCAB.index(letter)]) for i, letter in enumerate(mutant))
        assert abs(found[text] - expected) < 1e-3  # a sum of 60 terms


def test_normalization_over_20_residues_is_of_these_20(reference: Reference, tmp_path: Path) -> None:
    with esm2mega.load(reference.checkpoint) as model:
        variant = f"{SEQUENCE[5]}6{'A' if SEQUENCE[5] != 'A' else 'G'}"
        found = model.score(SEQUENCE, [variant], strategy="pseudo-ppl", normalize="residues")[variant]
        table = masked_table(reference, SEQUENCE[:5] + variant[-1] + SEQUENCE[6:], list(STANDARD_RESIDUES))
        mutant = SEQUENCE[:5] + variant[-1] + SEQUENCE[6:]
        expected = sum(float(table[i, VOCAB.index(letter)]) for i, letter in enumerate(mutant))
        assert abs(found - expected) < 1e-3
        with pytest.raises(UserError, match="X has no probability among the 20 residues"):
            model.score("MKX", ["X3A"], normalize="residues")


def test_several_wild_types_and_measured_values(reference: Reference, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    proteins = [WildType("one", "MKTAYIAKQR"), WildType("two", "GSHMLEDPVE")]
    table = tmp_path / "v.csv"
    rows = ["two,G1A,3", "one,M1A,1", "two,S2C,2.5", "one,K2N,nan", "two,E10K,0"]
    table.write_text("id,mutant,fitness\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out.csv"
    options = ScoreOptions(measured_column="fitness", strategy="wt-marginals")
    report = score_file(str(reference.checkpoint), proteins, str(table), str(out), options)
    written = read_table(out)
    assert [row[:2] for row in written.rows] == [row.split(",")[:2] for row in rows]
    values = [float(text) for text in written.column("score", "")]
    with esm2mega.load(reference.checkpoint) as model:
        assert model.score("GSHMLEDPVE", ["S2C"], strategy="wt-marginals")["S2C"] == pytest.approx(
            values[2], abs=1e-5
        )
    kept = [0, 1, 2, 4]
    expected = spearmanr([3, 1, 2.5, 0], [values[i] for i in kept]).statistic
    assert report[1] == f"Spearman with fitness: {expected:.4f} over 4 variants"
    assert report[2] == "1 variants have no number in fitness"
    with pytest.raises(UserError, match=r"v.csv:3: M1A: residue 1 of the sequence is G"):
        score_file(str(reference.checkpoint), [WildType("x", "GSHM")], str(table), str(out), options)
    with pytest.raises(UserError, match=r"v.csv:3: there is no protein 'one'"):
        score_file(
            str(reference.checkpoint), [proteins[1], WildType("z", "MK")], str(table), str(out), options
        )


def test_whole_sequences_equal_hugging_face_in_fp64(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deletion, an insertion, the wild type itself, one residue, and a protein longer than the window."""
    wild = SEQUENCE[:30]
    proteins = {
        "deletion": wild[:10] + wild[13:],
        "insertion": f"{wild[:5]}GX{wild[5:]}",
        "wild": wild.lower(),
        "one": "M",
        "long": LONG[:45],
    }
    fasta = write_fasta(tmp_path / "p.fasta", proteins)
    command = ["score", str(reference.checkpoint), "--variants", str(fasta), "infer.precision=fp64"]
    command += ["--max-seq-length", "36", "--out"]
    assert main([*command, str(tmp_path / "out.csv"), "--sequence", wild]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out.csv'}: 5 sequences",
        "computed in fp64 on cpu, attention sdpa; the checkpoint is in fp32",
    ]
    table = read_table(tmp_path / "out.csv")
    added = ["pseudo_perplexity", "pseudo_log_likelihood", "score"]
    assert table.columns == ["id", "sequence", *added]
    assert [row[:2] for row in table.rows] == [list(pair) for pair in proteins.items()]
    expected = {name: pseudo_log_likelihood(reference, p.upper(), 36) for name, p in proteins.items()}
    for name, sequence, *cells in table.rows:
        perplexity, total, score = map(float, cells)
        assert abs(total - expected[name]) < BOUND_FP64
        assert abs(score - (expected[name] - expected["wild"])) < BOUND_FP64
        assert abs(math.log(perplexity) + expected[name] / len(sequence)) < BOUND_FP64
    assert float(table.rows[2][-1]) == 0.0

    # The layout of ProteinGym's tables of indels gives the same, and a correlation.
    short = table.rows[:4]
    rows = "".join(f"{row[1]},{number % 3}\n" for number, row in enumerate(short))
    (tmp_path / "t.csv").write_text(f"mutated_sequence,DMS_score\n{rows}")
    command[3] = str(tmp_path / "t.csv")
    assert main([*command, str(tmp_path / "t.out.csv"), "--sequence", wild, "--measured", "DMS_score"]) == 0
    assert "Spearman of score with DMS_score: " in capsys.readouterr().out
    # In fp64 the last bits depend on which copies share a pack.
    numbers = np.array([row[2:] for row in short], dtype=float)
    found = np.array([row[2:] for row in read_table(tmp_path / "t.out.csv").rows], dtype=float)
    assert np.abs(found - numbers).max() < BOUND_FP64

    # Without a wild type there is no difference.
    assert main([*command, str(tmp_path / "alone.csv")]) == 0
    alone = read_table(tmp_path / "alone.csv")
    assert alone.columns == ["mutated_sequence", "DMS_score", *added[:2]]
    found = np.array([row[2:] for row in alone.rows], dtype=float)
    assert np.abs(found - numbers[:, :2]).max() < BOUND_FP64


def test_every_known_form_is_scored_and_the_rest_is_listed(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = ["K2N:T3G", "p.[Lys2Asn;Thr3Gly]", "WT", "_wt", "p.Lys2=", "K2K", "p.Ala6Ter", "K2del", "G2N", ""]
    (tmp_path / "v.csv").write_text("mutant,note\n" + "".join(f"{form},x\n" for form in forms))
    command = ["score", str(reference.checkpoint), "--sequence", "MKTAYAKQ"]
    command += ["--variants", str(tmp_path / "v.csv"), "--out"]
    assert main([*command, str(tmp_path / "x.csv")]) == 2
    error = capsys.readouterr().err
    assert "v.csv:8: 'p.Ala6Ter': a stop is no residue" in error and "with --skip-invalid" in error

    out = tmp_path / "out.csv"
    assert main([*command, str(out), "--skip-invalid"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{out}: 6 variants\n4 rows are the wild type or synonymous\n4 of 10 rows have no"
    )
    for line, reason in (
        (8, "a stop is no residue"),
        (9, "no substitution"),
        (10, "is K, not G"),
        (11, "no var"),
    ):
        assert any(f"v.csv:{line}: " in text and reason in text for text in printed.splitlines())
    table = read_table(out)
    assert [row[:2] for row in table.rows] == [[form, "x"] for form in forms]
    cells = table.column("score", "")
    assert cells[0] == cells[1] != "0.0" and cells[2:6] == ["0.0"] * 4 and cells[6:] == [""] * 4

    # What is left of the protein before a stop has a pseudo-likelihood.
    assert main([*command, str(out), "--overwrite", "--skip-invalid", "--strategy", "pseudo-ppl"]) == 0
    assert "1 rows end early at a stop: sums over fewer residues" in capsys.readouterr().out
    cells = read_table(out).column("score", "")
    assert abs(float(cells[6]) - pseudo_log_likelihood(reference, "MKTAY")) < BOUND
    assert abs(float(cells[2]) - pseudo_log_likelihood(reference, "MKTAYAKQ")) < BOUND
    assert len(set(cells[2:6])) == 1 and cells[7:] == [""] * 3


def test_python_refuses_what_has_no_score(reference: Reference) -> None:
    with esm2mega.load(reference.checkpoint) as model:
        assert model.score("MKTAY", ["WT", "p.Lys2="], strategy="wt-marginals") == {"WT": 0.0, "p.Lys2=": 0.0}
        with pytest.raises(UserError, match="'K2.': a stop is no residue"):
            model.score("MKTAY", ["K2*"])
        with pytest.raises(UserError, match="or set offset .now 1. to"):
            model.score("MKTAY", ["A2K"])


def test_heat_map_of_a_scan(reference: Reference, tmp_path: Path) -> None:
    options = ScoreOptions(strategy="wt-marginals", offset=24)
    protein = WildType("w", "MKTXY")
    report = score_file(str(reference.checkpoint), [protein], None, str(tmp_path / "s.csv"), options)
    assert "76 single substitutions" in report[0] and "1 residues other than the 20" in report[1]
    draw_scan(str(tmp_path / "s.png"), protein, str(tmp_path / "s.csv"), options)
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_outputs_are_guarded(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there stays without a word; what cannot be written is said before anything is computed."""
    out = tmp_path / "out.csv"
    command = ["score", str(reference.checkpoint), "--sequence", "MKTAY", "--strategy", "wt-marginals"]
    refused = {
        (str(out), "--resume"): "--resume is for the assays of --proteingym",
        (str(out), "--fasta", "x.fasta"): "by one of --sequence, --fasta and --proteingym",
        (str(out), "--heat-map", "x.png", "--variants", "v.csv"): "leave --variants out",
        (str(tmp_path),): f"{tmp_path}: exists",
        (str(out), "--sequence", "XX", "--heat-map", "x.png"): "there is nothing to substitute",
        (str(out), "--measured", "y"): "--measured is about the rows of --variants; leave it out",
        (str(out), "--sequence-column", "y"): "--sequence-column is about the rows of --variants",
        (str(out), "--skip-invalid"): "--skip-invalid is about the rows of --variants",
        (str(out), "infer.too_long=crop"): "in the window around it: leave it out",
    }
    for (path, *options), message in refused.items():
        assert main([*command, "--out", path, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--out", str(out)]) == 0
    assert main([*command, "--out", str(out)]) == 2
    assert "exists; replace it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "y.csv"), "--heat-map", str(out)]) == 2
    assert f"{out}: exists; replace it with --overwrite" in capsys.readouterr().err
    assert main([*command, "--out", str(out), "--overwrite", "--offset", "24"]) == 0
    assert read_table(out).rows[0][1] == "M24A"
    assert main([*command, "--out", str(out / "x.csv")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    layout = ["--proteingym", "r.csv", "--assays", "a", "--out", str(tmp_path / "gym")]
    assert main(["score", str(reference.checkpoint), *layout, "--offset", "24"]) == 2
    assert "--offset is fixed by the layout of ProteinGym" in capsys.readouterr().err
