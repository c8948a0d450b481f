"""ProteinGym in `autoeval`: BLOSUM62's correlation of each assay by SciPy, and what it does not score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from esm2mega.autoeval.assays import blosum62_assays
from esm2mega.autoeval.baselines.substitutions import blosum62_scores

WILD = "MKTAYIAKQR"
VARIANTS = {"M1A": 3.0, "K2R": 1.0, "T3S:A4W": -2.0, "WT": 4.0, "Q9P": 0.5, "I6V": 3.5}


def test_blosum62_of_each_assay(tmp_path: Path) -> None:
    header = "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\n"
    (tmp_path / "reference.csv").write_text(
        f"{header}A,A.csv,P1,{WILD},Binding\nB,B.csv,P2,{WILD},Activity\n"
    )
    rows = [f"{name},x,{value}\n" for name, value in VARIANTS.items()]
    for name in ("A", "B"):
        lines = rows if name == "A" else [*rows[1:], "A7W,x,\n"]  # one that was not measured
        (tmp_path / f"{name}.csv").write_text("mutant,mutated_sequence,DMS_score\n" + "".join(lines))
    found = blosum62_assays(tmp_path / "reference.csv", tmp_path)
    assert found is not None and [each[:2] for each in found] == [("Binding", "P1"), ("Activity", "P2")]
    scores, measured = blosum62_scores(WILD, [sequence(name) for name in VARIANTS]), list(VARIANTS.values())
    # The same definition; only the order of sums differs.
    assert found[0][2] == pytest.approx(spearmanr(scores, measured).statistic, abs=1e-12)
    assert found[1][2] == pytest.approx(spearmanr(scores[1:], measured[1:]).statistic, abs=1e-12)
    (tmp_path / "B.csv").write_text("mutated_sequence,DMS_score\nMKT,1\nMKTAY,2\n")
    assert blosum62_assays(tmp_path / "reference.csv", tmp_path) is None


def sequence(variant: str) -> str:
    letters = np.array(list(WILD))
    for change in variant.split(":") if variant != "WT" else ():
        letters[int(change[1:-1]) - 1] = change[-1]
    return "".join(letters)
