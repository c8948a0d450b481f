"""A folder of FASTA with coordinates becomes a table that fine-tuning reads; C-beta is where it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.benchmarks.contacts import ideal_c_beta, prepare_contacts
from esm2mega.data.labels.dataset import read_labelled
from esm2mega.errors import UserError

RNG = np.random.default_rng(8)
SEQUENCE = "MKTAYIAKQR"


def folder(path: Path, atoms: np.ndarray) -> Path:
    path.mkdir()
    (path / "all.fasta").write_text(f">p1\n{SEQUENCE}\n")
    lines = [f"{letter},{x:.3f},{y:.3f},{z:.3f}" for letter, (x, y, z) in zip(SEQUENCE, atoms, strict=True)]
    lines[4] = "Y,,,"
    (path / "p1.csv").write_text("\n".join(["residue,x,y,z", *lines]) + "\n")
    return path


def test_a_folder_becomes_a_table_of_contacts(tmp_path: Path) -> None:
    atoms = np.cumsum(RNG.normal(size=(10, 3)), axis=0).round(3)
    source = folder(tmp_path / "source", atoms)
    assert main(["prepare", "contacts", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    task = TaskConfig(kind="contact", target_columns=["target"])
    proteins, _ = read_labelled(tmp_path / "out" / "test.csv", task, DataConfig(), None, "data.test")
    atoms[4] = np.nan
    assert proteins.ids == ["p1"]
    np.testing.assert_array_equal(proteins.labels, atoms)


def test_c_beta_has_the_geometry_of_an_amino_acid() -> None:
    # Ideal N, CA and C of alanine, turned and moved: CA-CB is 1.52 to 1.54, both angles about 110 degrees.
    ideal = np.array([[-0.525, 1.363, 0.0], [0.0, 0.0, 0.0], [1.526, 0.0, 0.0]])
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    (place,) = (ideal_c_beta(ideal[None]) @ turn.T) + 3.0
    backbone = ideal @ turn.T + 3.0
    np.testing.assert_allclose(ideal_c_beta(backbone[None])[0], place, atol=1e-12)
    bond = place - backbone[1]
    assert np.linalg.norm(bond) == pytest.approx(1.53, abs=0.02)
    for other in (0, 2):
        arm = backbone[other] - backbone[1]
        cosine = bond @ arm / np.linalg.norm(bond) / np.linalg.norm(arm)
        assert np.degrees(np.arccos(cosine)) == pytest.approx(110.4, abs=1.5)
    # The known C-beta of this alanine; its mirror image would be a D amino acid.
    np.testing.assert_allclose(ideal_c_beta(ideal[None])[0], [-0.529, -0.774, -1.205], atol=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "p1.csv: no such file"),
        ("residue,x,y\nM,1,2\n", "p1.csv:1: has the columns residue, x, y"),
        ("residue,x,y,z\nM,1,2,3\n", "has 1 residues, the sequence has 10"),
        ("residue,x,y,z\nA,1,2,3\n", "has 'A' as residue 1, the sequence has 'M'"),
        ("residue,x,y,z\nM,1,b,3\n", "p1.csv:2: y is 'b', not a number"),
        ("residue,x,y,z\nM,1,inf,3\n", "p1.csv:2: y is 'inf', not a number"),
        ("residue,x,y,z\nM,1,5,2,0,3,0\n", "p1.csv:2: has 7 cells, the header 4; .* a decimal point"),
        ("residue,x,y,z\nM,1,2\n", "p1.csv:2: z is None, not a number"),
        ("\xff", "p1.csv: is no CSV"),
    ],
)
def test_wrong_coordinates_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    source = folder(tmp_path / "source", np.zeros((10, 3)))
    (source / "p1.csv").unlink()
    if text is not None:
        (source / "p1.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        prepare_contacts(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
