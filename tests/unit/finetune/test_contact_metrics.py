"""Contacts end to end: coordinates to pairs, precision by its definition, prediction, cropping, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esm2mega.batch import Segments
from esm2mega.cli.app import main
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.data.labels.contacts import pair_labels
from esm2mega.data.labels.dataset import proteins_of_pairs, read_labelled
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.api import infer_model, train_model
from esm2mega.finetune.bootstrap import bootstrap_intervals
from esm2mega.finetune.checkpoint import loaded, open_task
from esm2mega.finetune.contact_metrics import NAMES, contact_counts
from esm2mega.finetune.losses import ContactLossReduction
from esm2mega.finetune.metrics import Predictions, metrics_of, objects
from esm2mega.finetune.output import contact_maps, shown_predictions
from esm2mega.model.packed import PackedSequences
from esm2mega.pairs import num_pairs, num_residues, pairs_of
from esm2mega.vocabulary import CLS, EOS, encode_residues
from tests.task_batches import proteins_of
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

RNG = np.random.default_rng(6)
LENGTHS = (40, 7, 33, 58, 26)


def coil(length: int) -> np.ndarray:
    return np.cumsum(RNG.normal(size=(length, 3)) * 2.2, axis=0)


def by_definition(values: np.ndarray, labels: np.ndarray, low: int, high: int, k: int) -> float:
    """The precision of one protein, pair by pair; values and labels are maps ``[l, l]``."""
    pairs = [
        (values[i, j], labels[i, j])
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if low <= j - i < high and labels[i, j] >= 0
    ]
    pairs.sort(key=lambda pair: -pair[0])
    return sum(label for _, label in pairs[:k]) / k if pairs and k else math.nan


def test_precision_by_its_definition() -> None:
    values, labels, maps = [], [], []
    for length in LENGTHS:
        first, second = pairs_of(length)
        assert (len(first), num_residues(len(first))) == (num_pairs(length), length)
        probabilities = RNG.random(len(first)).astype(np.float32)
        found = pair_labels(coil(length), IGNORED)
        found[RNG.random(len(found)) < 0.2] = IGNORED
        square = np.zeros((2, length, length))
        square[0, first, second], square[1, first, second] = probabilities, found
        values.append(probabilities)
        labels.append(found)
        maps.append(square)
    found = Predictions(np.arange(5), np.zeros(5, int), objects(values), objects(labels))
    info = TargetInfo("contact", ["contact"])
    metrics = metrics_of(found, info)
    for prefix, low, high in (("", 6, 999), ("short_", 6, 12), ("medium_", 12, 24), ("long_", 24, 999)):
        for name, part in (("p_at_L", 1), ("p_at_L2", 2), ("p_at_L5", 5)):
            each = [by_definition(*square, low, high, len(square[0]) // part) for square in maps]
            assert metrics[f"{prefix}{name}"] == pytest.approx(np.nanmean(each)), (prefix, name)
    counts = contact_counts(found.values, found.labels)[:, NAMES.index("p_at_L5")]
    assert metrics["p_at_L5_pooled"] == pytest.approx(counts[:, 0].sum() / sum(n // 5 for n in LENGTHS))
    low, high = bootstrap_intervals(found, info, 200, seed=1)["p_at_L"]
    assert low < metrics["p_at_L"] < high
    # A protein of seven residues has one pair: of its 7 likeliest six are missing, which are misses.
    assert contact_counts(objects([np.ones(21)]), objects([pair_labels(np.zeros((7, 3)), IGNORED)]))[
        0, 0
    ].tolist() == [1, 7]


def test_coordinates_of_a_table(tmp_path: Path) -> None:
    atoms = coil(12).round(3)
    rows: list[Any] = [*atoms.tolist()]
    rows[3], rows[4] = None, [1.0, None, 2.0]
    lines = [
        {"id": "a", "sequence": "M" * 12, "atoms": rows, "seen": "111111111011"},
        {"id": "b", "sequence": "LA", "atoms": [[0, 0, 0], [1, 1, 1]], "seen": "11"},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    task = TaskConfig(kind="contact", target_columns=["atoms"], mask_column="seen")
    proteins, info = read_labelled(path, task, DataConfig(), None, "data.train")
    known = atoms.copy()
    known[[3, 4, 9]] = np.nan
    np.testing.assert_array_equal(proteins.labels[:12], known)
    assert proteins.num_missing == 3
    expected = pair_labels(known, IGNORED)
    assert info.counts == [(expected == 1).sum()]
    # Their frequency at each distance along the chain is what the baseline knows.
    first, second = pairs_of(12)
    assert info.baseline[6] == pytest.approx((expected[(second - first == 6) & (expected >= 0)] == 1).mean())
    for wrong, message in (
        ([[0, 0]] * 12, r"t.jsonl:1: residue 0 in column 'atoms' has \[0, 0\]"),
        (rows[:11], "t.jsonl:1: 11 labels in column 'atoms' for 12 residues"),
        ("[[0,", "t.jsonl:1: column 'atoms' holds no list of coordinates"),
        (7, "t.jsonl:1: the coordinates in column 'atoms' are 7"),
    ):
        path.write_text(json.dumps({**lines[0], "atoms": wrong}))
        with pytest.raises(UserError, match=message):
            read_labelled(path, task, DataConfig(), None, "data.train")
    with pytest.raises(UserError, match="holds no pair of residues that counts"):
        proteins_of_pairs([("LA", [[0, 0, 0]] * 2)], TaskConfig(kind="contact"), None, "train")


def hairpins(count: int, seed: int) -> list[tuple[str, Any]]:
    """Proteins that fold back in the middle, with a letter for each half: contacts can be read off them."""
    rng = np.random.default_rng(seed)
    found = []
    for half in rng.integers(8, 14, count).tolist():
        x = [*range(half), *range(half - 1, -1, -1)]
        atoms = [[3.8 * a, 5.0 * (n >= half), 0.0] for n, a in enumerate(x)]
        letters = list("LAGVSERTIDPKQN")[:half]
        found.append(("".join([*letters, *reversed(letters)]), atoms))
    return found


def learn(run_dir: Path, *overrides: str):
    settings = [*SETTINGS, f"run_dir={run_dir}", "task.kind=contact", "train.log_every=20"]
    # There are only so many hairpins.
    settings += [
        "train.max_steps=40",
        "optim.lr=1e-2",
        "task.dropout=0.1",
        "data.allow_overlap=true",
        *overrides,
    ]
    return train_model(settings, train=hairpins(24, 1), valid=hairpins(8, 2))


@pytest.mark.parametrize("head", [pytest.param("product", marks=pytest.mark.slow), "attention_maps"])
def test_contacts_are_learned_and_predicted(tmp_path: Path, head: str) -> None:
    h5py = pytest.importorskip("h5py")
    trained = learn(tmp_path / "run", f"task.head={head}")
    table = tmp_path / "valid.jsonl"
    rows = [{"id": f"p{n}", "sequence": s, "target": t} for n, (s, t) in enumerate(hairpins(8, 2))]
    table.write_text("\n".join(map(json.dumps, rows)))
    out, result = tmp_path / "out.h5", tmp_path / "metrics.json"
    assert main(["evaluate", str(trained.checkpoint), "--data", str(table), "--out", str(result)]) == 0
    measured = json.loads(result.read_text())
    assert measured["p_at_L5"] == trained.metrics["valid_p_at_L5"] > 0.8 > measured["baseline_p_at_L5"]
    assert main(["predict", str(trained.checkpoint), str(table), "--out", str(out)]) == 0
    maps = infer_model(trained.checkpoint, [row["sequence"] for row in rows])
    with h5py.File(out) as file:
        assert file["ids"].asstr()[:].tolist() == [row["id"] for row in rows]
        borders = file["contact_offsets"][:]
        for number, row in enumerate(rows):
            found = file["contacts"][borders[number] : borders[number + 1]].reshape(maps[number].shape)
            np.testing.assert_array_equal(found, maps[number])
            np.testing.assert_array_equal(found, found.T)
            shown = measured["predictions"][number]
            assert len(shown["prediction"]) == len(row["sequence"])
            i, j, p = shown["prediction"][0]
            assert p == found[i, j] == np.nanmax(np.triu(found, 6)) and j - i >= 6
            labels = pair_labels(np.array(row["target"]), IGNORED)
            pairs = np.stack(pairs_of(len(row["sequence"])), axis=1)[labels == 1]
            assert shown["label"] == pairs.tolist()
    for ending in ("csv", "parquet"):
        refused = tmp_path / f"out.{ending}"
        assert main(["predict", str(trained.checkpoint), str(table), "--out", str(refused)]) == 2
        assert not refused.exists()


def test_contacts_are_ranked_where_probabilities_are_all_one() -> None:
    """In fp32 the logistic function of 18 is 1, as those of 25 and 40 are; the last pair is the contact."""
    first, second = pairs_of(8)
    logits = torch.full((len(first), 1), -3.0)
    logits[second - first >= 6, 0] = torch.tensor([18.0, 25.0, 40.0])
    labels = np.where(second - first >= 6, 0, IGNORED).astype(np.int8)
    labels[(first == 1) & (second == 7)] = 1
    values = ContactLossReduction().predictions(logits)[:, 0].numpy()
    found = Predictions(np.zeros(1, int), np.zeros(1, int), objects([values]), objects([labels]))
    info = TargetInfo("contact", ["contact"])
    assert metrics_of(found, info)["p_at_L5"] == 1.0
    proteins = proteins_of(["MKTAYIAK"])
    assert shown_predictions(found, info, proteins) == [[[1, 7, 1.0], [0, 7, 1.0], [0, 6, 1.0]]]
    (shown,) = contact_maps(found, proteins)
    assert shown[2, 3] == shown[3, 2] == pytest.approx(1 / (1 + math.exp(3)), rel=1e-7)


def test_a_piece_of_a_protein_keeps_its_places(tmp_path: Path) -> None:
    """Cropped at random, the map is that of the piece alone, at its place, and NaN elsewhere."""
    trained = learn(tmp_path / "run", "train.max_steps=1")
    sequences = [sequence for sequence, _ in hairpins(6, 5)]
    cropped = ["data.max_seq_length=12", "data.too_long=crop", "data.crop=random"]
    found = infer_model(trained.checkpoint, sequences, cropped)
    inner = 0
    with loaded(open_task(trained.checkpoint)) as ((model,), ranks):
        model.eval()
        for sequence, shown in zip(sequences, found, strict=True):
            (places,) = (~np.isnan(shown)).any(axis=0).nonzero()
            start, end = int(places[0]), int(places[-1]) + 1
            inner += start > 0
            ids = torch.tensor([CLS, *encode_residues(sequence).tolist(), EOS])
            # Residue i is token i + 1. Of 12 tokens one may be <cls> or <eos>.
            count = end - start
            with_cls = count == 11 and start == 0
            first = start + 1 - with_cls
            piece = Segments.of_protein(ids)
            piece = replace(
                piece,
                residues=torch.arange(count) + int(with_cls),
                owners=torch.zeros(count, dtype=torch.int64),
                numbers=torch.arange(count),
                tokens=(ids[first : first + 12].numpy().astype(np.uint8).tobytes(),),
            )
            with torch.no_grad():
                packed = PackedSequences.from_lengths([12], ranks.device)
                logits = model(ids[first : first + 12].to(ranks.device), packed, piece.to(ranks.device))
            expected = np.full((len(sequence), len(sequence)), np.nan)
            i, j = pairs_of(count)
            expected[i + start, j + start] = logits[:, 0].sigmoid().cpu().numpy()
            expected[j + start, i + start] = expected[i + start, j + start]
            # The model is fp64, what is shown fp32.
            np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-7)
    assert inner


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    for overrides, message in (
        (["task.head=cnn"], "heads for pairs of residues are auto, product, attention_maps"),
        (["task.loss=huber"], "task.loss=huber applies to numbers, not to task.kind=contact"),
        (["data.too_long=crop", "data.crop=chunk"], "would lose the pairs between chunks"),
        (["task.head=attention_maps", "model.recompute=full"], "computes its maps again itself"),
    ):
        with pytest.raises(UserError, match=message):
            learn(tmp_path, *overrides)
