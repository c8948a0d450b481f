"""`predict` on several processes gives the same predictions, and after a kill the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.runs import SETTINGS
from tests.infer_models import random_proteins, write_fasta
from tests.ranks import end_ranks, run_ranks, start_ranks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Numbers of residues, and contacts from attention maps, whose head spans the stages of a pipeline."""
    from esm2mega.finetune.api import train_model

    found = {}
    sequences = random_proteins([30, 60, 90] * 4, seed=1)
    for kind, head in (("token_regression", "auto"), ("contact", "attention_maps")):
        labels: list[object] = [[float(ord(letter)) for letter in sequence] for sequence in sequences]
        if kind == "contact":
            labels = [[[3.8 * i, 5.0 * (i % 3), 0.0] for i in range(len(s))] for s in sequences]
        task = (f"task.kind={kind}", f"task.head={head}", "train.max_steps=2")
        run_dir = tmp_path_factory.mktemp(kind)
        pairs = list(zip(sequences, labels, strict=True))
        found[kind] = train_model([*SETTINGS, *task, f"run_dir={run_dir}"], train=pairs).checkpoint
    return found


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20,000 residues, which are 40 packs; the last protein is cropped."""
    lengths = [1, 290, *np.random.default_rng(2).integers(2, 126, 300).tolist(), 400]
    pairs = [(f"p{number % 40}", sequence) for number, sequence in enumerate(random_proteins(lengths))]
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", pairs)


def arguments(checkpoint: Path, fasta: Path, out: Path, *more: str) -> list[str]:
    command = ["-m", "esm2mega", "-v", "predict", str(checkpoint), str(fasta), "--out", str(out)]
    return [*command, "--too-long", "crop", *more]


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the predictions of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind, checkpoint in checkpoints.items():
        run_ranks(arguments(checkpoint, fasta, folder / f"{kind}.h5"), 1, folder / f"output_{kind}")
    return folder


def values_of(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file["predictions" if "predictions" in file else "contacts"][()]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("token_regression", "data"),
        pytest.param("token_regression", "pipeline", marks=pytest.mark.slow),
        ("contact", "tensor"),
        pytest.param("contact", "pipeline", marks=pytest.mark.slow),
    ],
)
def test_every_layout_predicts_what_one_process_does(
    checkpoints: dict[str, Path], fasta: Path, alone: Path, tmp_path: Path, kind: str, layout: str
) -> None:
    split = [] if layout == "data" else [f"parallel.{layout}_model_parallel_size=2"]
    out = tmp_path / "x.h5"
    run_ranks(arguments(checkpoints[kind], fasta, out, *split), 2, tmp_path / "output")
    if layout == "data":
        assert out.read_bytes() == (alone / f"{kind}.h5").read_bytes()
    found, expected = values_of(out), values_of(alone / f"{kind}.h5")
    assert len(found) > 10_000 and np.isnan(expected).any() and np.nanstd(expected) > 0
    # Split sums of TP, and those of attention maps over the stages, are added in another order.
    bound = 1e-5 if layout == "tensor" or kind == "contact" else 0.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize(
    "layout",
    [
        "data",
        pytest.param("pipeline", marks=pytest.mark.slow),
        pytest.param("tensor", marks=pytest.mark.slow),
    ],
)
def test_samples_of_dropout_are_the_same_at_every_layout(
    checkpoints: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """With intervals that are calibrated on a table, whose proteins the ranks share out."""
    from esm2mega.finetune.draws import Uncertainty
    from esm2mega.finetune.predict import predict

    lengths = [1, 290, *np.random.default_rng(3).integers(2, 126, 40).tolist(), 400]
    pairs = [(f"p{number}", sequence) for number, sequence in enumerate(random_proteins(lengths))]
    fasta, table = write_fasta(tmp_path / "proteins.fasta", pairs), tmp_path / "valid.csv"
    rows = [f'{s},"{[float(ord(x)) for x in s]}"\n' for s in random_proteins([30, 60, 90] * 7, seed=4)]
    table.write_text("sequence,target\n" + "".join(rows))
    checkpoint, crop = checkpoints["token_regression"], ["infer.too_long=crop"]
    predict(checkpoint, fasta, tmp_path / "1.h5", crop, uncertainty=Uncertainty("dropout", 2, str(table)))
    out = tmp_path / "2.h5"
    more = ["--uncertainty", "dropout", "--samples", "2", "--calibrate", str(table)]
    if layout != "data":
        more.append(f"parallel.{layout}_model_parallel_size=2")
    run_ranks(arguments(checkpoint, fasta, out, *more), 2, tmp_path / "output")
    if layout == "data":
        assert out.read_bytes() == (tmp_path / "1.h5").read_bytes()
    with h5py.File(out) as found, h5py.File(tmp_path / "1.h5") as expected:
        assert np.nanmin(expected["sd"]) > 0
        for name in ("predictions", "sd", "low", "high"):
            bound = 1e-5 * np.nanmax(np.abs(expected[name]))
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=bound)


def test_a_kill_leaves_no_trace(
    checkpoints: dict[str, Path], fasta: Path, alone: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first finished piece; two processes do the rest."""
    out, done = tmp_path / "x.h5", tmp_path / "x.h5.partial" / "done.0"
    command = arguments(checkpoints["token_regression"], fasta, out, "--resume")
    processes = start_ranks(command, 1, tmp_path / "killed")
    try:
        # Not by the clock, which goes on while a busy machine lets nobody run.
        for _ in range(60_000):
            if _pieces(done) or processes[0].poll() is not None:
                break
            time.sleep(0.002)
        os.kill(processes[0].pid, signal.SIGKILL)
        assert processes[0].wait() == -signal.SIGKILL, "it was finished before it could be killed"
    finally:
        end_ranks(processes)
    assert not out.exists() and _pieces(done)
    run_ranks(command, 2, tmp_path / "output")
    assert out.read_bytes() == (alone / "token_regression.h5").read_bytes()


def _pieces(journal: Path) -> int:
    return len(journal.read_text().split()) if journal.exists() else 0
