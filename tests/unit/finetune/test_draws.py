"""An ensemble equals NumPy over its members, and samples of dropout equal masks that are computed here."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.batch import Segments
from esm2mega.cli.app import main
from esm2mega.data.counter_rng import Purpose, bits_at, mix, stream_starts
from esm2mega.finetune.api import train_model
from esm2mega.finetune.checkpoint import loaded, open_task
from esm2mega.finetune.draws import Uncertainty
from esm2mega.finetune.predict import predict
from esm2mega.finetune.uncertainty import spread_factor
from esm2mega.model.packed import PackedSequences
from esm2mega.vocabulary import encode_residues
from tests.infer_models import random_proteins, write_fasta
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
h5py = pytest.importorskip("h5py")

SEQUENCES = random_proteins(np.random.default_rng(6).integers(2, 62, 45).tolist())


def trained(folder: Path, kind: str, seed: int, *more: str) -> Path:
    labels: dict[str, list[object]] = {
        "regression": [float(len(sequence)) for sequence in SEQUENCES],
        "token_classification": ["".join("HEC"[ord(x) % 3] for x in sequence) for sequence in SEQUENCES],
    }
    settings = (f"task.kind={kind}", "train.max_steps=2", f"seed={seed}", f"run_dir={folder}", *more)
    return train_model(
        [*SETTINGS, *settings], train=list(zip(SEQUENCES, labels[kind], strict=True))
    ).checkpoint


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Regressions that differ in their seed."""
    return [trained(tmp_path_factory.mktemp("run"), "regression", seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of residues, with dropout in the encoder too."""
    dropout = ("model.hidden_dropout=0.2", "model.attention_dropout=0.1")
    return trained(tmp_path_factory.mktemp("run"), "token_classification", 4, *dropout)


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [(f"p{number}", sequence) for number, sequence in enumerate(SEQUENCES)]
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", pairs)


def write_table(path: Path, labels: list[float]) -> Path:
    lines = [f"{sequence},{label}\n" for sequence, label in zip(SEQUENCES, labels, strict=True)]
    path.write_text("sequence,target\n" + "".join(lines))
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}


def rows_of(path: Path) -> dict[str, list[str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_an_ensemble_is_the_mean_of_its_members(
    members: list[Path], fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval is that of the spread, or of the rank of held-out labels."""
    alone = []
    for number, member in enumerate(members):
        predict(member, fasta, tmp_path / f"{number}.h5")
        alone.append(arrays_of(tmp_path / f"{number}.h5")["predictions"])
    mean, sd = np.mean(alone, axis=0)[:, 0], np.std(alone, axis=0, ddof=1)[:, 0]
    assert sd.min() > 1e-3
    words = ["predict", ",".join(map(str, members)), str(fasta), "--out"]
    assert main([*words, str(tmp_path / "x.csv")]) == 0
    assert "mean and sd over 3 checkpoints; 95 % intervals (mean ± 4.968 sd)" in capsys.readouterr().out
    found = rows_of(tmp_path / "x.csv")
    half = spread_factor(3) * sd

    def check(half: np.ndarray) -> None:
        expected = {"target": mean, "target_sd": sd, "target_low": mean - half, "target_high": mean + half}
        assert [*found] == ["id", "truncated", *expected]
        for name, values in expected.items():
            # Packs differ with the seed, and fp64 has 16 digits.
            np.testing.assert_allclose(np.array(found[name], float), values, rtol=0, atol=1e-9)

    check(half)
    noise = np.random.default_rng(8).normal(size=len(sd))
    labels = mean + sd * noise
    table = write_table(tmp_path / "valid.csv", [*labels[:-1].tolist(), np.nan])
    assert main([*words, str(tmp_path / "x.csv"), "--calibrate", str(table), "--overwrite"]) == 0
    assert "calibrated on 45 proteins of" in capsys.readouterr().out
    found = rows_of(tmp_path / "x.csv")
    # ceil(0.95 * 45) = 43 of 44 labels
    check(np.sort(np.abs(noise[:-1]))[42] * sd)
    changed = write_table(tmp_path / "valid.csv", [*labels[:-1].tolist(), 1.0])
    assert main([*words, str(tmp_path / "x.csv"), "--calibrate", str(changed), "--resume"]) == 2
    assert "is of other settings: calibrated_on was" in capsys.readouterr().err


def test_samples_of_dropout_are_those_of_masks_by_protein(
    members: list[Path], fasta: Path, tmp_path: Path
) -> None:
    """The masks of the head follow from seed, sample, number of the protein and channel."""
    predict(members[0], fasta, tmp_path / "x.h5", uncertainty=Uncertainty("dropout", 4))
    found = arrays_of(tmp_path / "x.h5")
    task = open_task(members[0])
    with loaded(task) as (chunks, _), torch.no_grad():
        model = chunks[0].eval()
        weights = {
            name: value.numpy() for name, value in model.head.state_dict().items() if value is not None
        }
        pooled = []
        for sequence in SEQUENCES:
            tokens = torch.tensor([0, *encode_residues(sequence).tolist(), 2])
            states = model.encode(tokens, PackedSequences.from_lengths([len(tokens)], tokens.device))
            pooled.append(model.gathered(states)[1:-1, 0].mean(dim=0).numpy())
    hidden = np.maximum(np.array(pooled) @ weights["dense.weight"].T + weights["dense.bias"], 0.0)
    p, step = task.run.task.dropout, 0x9E3779B97F4A7C15
    assert p == 0.25
    draws = []
    for sample in range(4):
        seed = int(stream_starts(task.run.seed, Purpose.DROPOUT_SAMPLE, sample)[0])
        keys = stream_starts(seed, Purpose.DROPOUT, np.arange(len(SEQUENCES)))
        channels = [(channel + 1) * step % 2**64 for channel in range(hidden.shape[1])]
        bits = mix(keys[:, None] + np.array(channels, dtype=np.uint64))
        kept = (bits >> np.uint64(11)) >= np.uint64(int(p * 2**53))
        assert abs(kept.mean() - 0.75) < 0.02
        output = (hidden * kept / (1 - p)) @ weights["output.weight"].T + weights["output.bias"]
        draws.append(output * task.info.std[0] + task.info.mean[0])
    np.testing.assert_allclose(found["predictions"], np.mean(draws, axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["sd"], np.std(draws, axis=0, ddof=1), rtol=0, atol=1e-9)
    assert found["sd"].min() > 1e-3
    # Other packs, the same masks.
    settings = ["infer.micro_batch_tokens=200"]
    predict(members[0], fasta, tmp_path / "y.h5", settings, uncertainty=Uncertainty("dropout", 4))
    np.testing.assert_allclose(found["sd"], arrays_of(tmp_path / "y.h5")["sd"], rtol=0, atol=1e-9)


def test_the_encoder_drops_too_and_residues_have_entropies(
    classes: Path, fasta: Path, tmp_path: Path
) -> None:
    """Each protein alone through the model in training mode, with keys that are computed here."""
    predict(classes, fasta, tmp_path / "x.csv", uncertainty=Uncertainty("dropout", 3))
    found = rows_of(tmp_path / "x.csv")
    assert [*found] == ["id", "truncated", "prediction", "entropy", "mutual_information"]
    task = open_task(classes)
    with loaded(task) as (chunks, _), torch.no_grad():
        model = chunks[0].train()
        for row, sequence in enumerate(SEQUENCES[:6]):
            tokens = torch.tensor([0, *encode_residues(sequence).tolist(), 2])
            draws = []
            for sample in range(3):
                seed = int(stream_starts(task.run.seed, Purpose.DROPOUT_SAMPLE, sample)[0])
                of_head = stream_starts(seed, Purpose.DROPOUT, row).astype(np.int64)
                of_encoder = bits_at(stream_starts(seed, Purpose.ENCODER_DROPOUT, row), 0).astype(np.int64)
                packed = PackedSequences.from_lengths([len(tokens)], tokens.device)
                packed = packed.with_dropout_keys(torch.from_numpy(of_encoder))
                segments = Segments.of_protein(tokens)
                segments.keys[:] = torch.from_numpy(of_head)
                draws.append(model(tokens, packed, segments).softmax(-1).numpy())
            mean, each = np.mean(draws, axis=0), np.array(draws)
            entropy = -(mean * np.log(mean)).sum(-1)
            mutual = entropy + (each * np.log(each)).sum(-1).mean(axis=0)
            for name, values in {"entropy": entropy, "mutual_information": mutual}.items():
                np.testing.assert_allclose(
                    np.array(found[name][row].split(), float), values, rtol=0, atol=1e-9
                )
            assert found["prediction"][row] == "".join(task.info.names[i] for i in mean.argmax(-1))
            assert mutual.max() > 1e-4


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("a", ["--uncertainty", "ensemble"], "is one checkpoint; join several by commas"),
        ("a,b", ["--uncertainty", "dropout"], "samples one checkpoint; name one"),
        ("a,b", ["--samples", "3"], "--samples 3: counts samples of dropout"),
        ("a", ["--samples", "3"], "--samples 3: needs --uncertainty"),
        ("a", ["--calibrate", "t.csv"], "--calibrate t.csv: needs --uncertainty"),
        ("a,a", [], "is named twice"),
        ("a,", [], "a name is empty; give runs as RUN,RUN"),
        ("a,c", [], "predict different things (regression of target; token_classification of C, E, H)"),
        (
            "c",
            ["--uncertainty", "dropout", "--calibrate", "t.csv"],
            "predicts classes, intervals are of numbers",
        ),
        ("a", ["--uncertainty", "dropout", "task.dropout=0"], "was trained without dropout (task.dropout=0"),
    ],
)
def test_what_gives_no_uncertainty_is_refused_in_one_line(
    members: list[Path],
    classes: Path,
    fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: str,
    options: list[str],
    message: str,
) -> None:
    paths = {"a": str(members[0]), "b": str(members[1]), "c": str(classes), "": ""}
    named = ",".join(paths[name] for name in names.split(","))
    assert main(["predict", named, str(fasta), "--out", str(tmp_path / "x.csv"), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]
    assert not list(tmp_path.iterdir())
