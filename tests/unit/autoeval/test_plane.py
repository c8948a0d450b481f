"""Embeddings in the plane: principal components as done by hand, and UMAP where it is there."""

from __future__ import annotations

import csv
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from esm2mega.autoeval.plane import pca, plane_labels, write_plane
from esm2mega.errors import MachineError
from esm2mega.infer.hdf5_checksums import seal

COUNT, LENGTH, HIDDEN = 40, 7, 6


@pytest.fixture
def embedded(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Vectors of residues and their means, as `esm2mega embed` writes them."""
    residues = np.random.default_rng(1).normal(size=(COUNT, LENGTH, HIDDEN)).astype(np.float32)
    path = tmp_path / "test.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("ids", data=[f"p{n}" for n in range(COUNT)], dtype=h5py.string_dtype())
        file.create_dataset("offsets", data=np.arange(COUNT + 1) * LENGTH)
        file.create_dataset("residue/layer_2", data=residues.reshape(-1, HIDDEN))
        file.create_dataset("pooled/layer_2", data=residues.mean(axis=1))
        seal(file)
    return path, residues


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_proteins(tmp_path: Path, embedded: tuple[Path, np.ndarray]) -> None:
    path, residues = embedded
    labels = [(f"p{n}", "" if n == 3 else str(n)) for n in range(COUNT)]
    for out in ("a.csv", "b.csv"):
        assert write_plane(tmp_path / out, path, "layer_2", labels, False, 1)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    rows = read(tmp_path / "a.csv")
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(COUNT) if n != 3], "p3 has no label"
    means = residues.mean(axis=1)[np.arange(COUNT) != 3].astype(np.float64)
    centred = means - means.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.array([[float(row["pca_1"]), float(row["pca_2"])] for row in rows])
    # Five digits are written; the sign of a component is free.
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :2] * sizes[:2]), rtol=1e-3, atol=1e-5)


def test_residues_with_a_label(tmp_path: Path, embedded: tuple[Path, np.ndarray]) -> None:
    labels = [(f"p{n}", "HE-CHEC") for n in range(COUNT)]
    assert write_plane(tmp_path / "plane.csv", embedded[0], "layer_2", labels, True, 1)
    rows = read(tmp_path / "plane.csv")
    assert len(rows) == COUNT * 6 and not any(row["id"].endswith(":3") for row in rows)
    assert [(row["id"], row["label"]) for row in rows[:3]] == [("p0:1", "H"), ("p0:2", "E"), ("p0:4", "C")]


def test_too_few_points_have_no_plane(tmp_path: Path, embedded: tuple[Path, np.ndarray]) -> None:
    assert not write_plane(
        tmp_path / "plane.csv", embedded[0], "layer_2", [("p0", "1"), ("p1", "2")], False, 1
    )
    assert not (tmp_path / "plane.csv").exists()
    assert pca(np.ones((4, 1), np.float32)).shape == (4, 2)


def test_umap_where_it_is_installed(
    tmp_path: Path, embedded: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Stub:
        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            return vectors[:, :2]

    module = types.ModuleType("umap")
    module.__spec__ = ModuleSpec("umap", None)
    module.UMAP = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    labels = [(f"p{n}", str(n)) for n in range(COUNT)]
    assert write_plane(tmp_path / "plane.csv", embedded[0], "layer_2", labels, False, 9)
    assert float(read(tmp_path / "plane.csv")[5]["umap_2"]) == pytest.approx(
        embedded[1].mean(axis=1)[5, 1], rel=1e-4
    )
    assert asked == [{"n_neighbors": 15, "random_state": 9, "n_jobs": 1}]
    assert write_plane(tmp_path / "few.csv", embedded[0], "layer_2", labels[:20], False, 9)
    assert "umap_1" not in read(tmp_path / "few.csv")[0], "too few for its neighbours"


def test_an_umap_that_does_not_work(
    tmp_path: Path, embedded: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "umap.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    labels = [(f"p{n}", str(n)) for n in range(COUNT)]
    expected = "installed and cannot be imported: 'Numba needs NumPy 2.2 or less'; install it again"
    with pytest.raises(MachineError, match=expected):
        write_plane(tmp_path / "plane.csv", embedded[0], "layer_2", labels, False, 1)
    assert not (tmp_path / "plane.csv").exists()


def test_labels_of_the_plane() -> None:
    rows = [{"id": "a", "sequence": "MKV", "x": "1", "y": "0", "z": "HEC"}]
    assert plane_labels(rows, ["x"], "regression") == [("a", "1")]
    assert plane_labels(rows, ["x", "y"], "multilabel") == [("a", "x")]
    assert plane_labels(rows, ["z"], "token_classification") == [("a", "HEC")]
    assert plane_labels(rows, ["x"], "token_regression") is None, "numbers are no characters"
