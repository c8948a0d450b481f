"""Losses of single proteins: each is the loss of a batch that holds this protein alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from esm2mega.batch import PackedBatch
from esm2mega.config.schema import DataConfig, EvalConfig, TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import EvalPacks
from esm2mega.finetune.evaluate import split_by_protein
from esm2mega.finetune.losses import loss_of_task
from esm2mega.pairs import num_pairs
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.per_protein import PerProtein
from esm2mega.vocabulary import CLS, EOS, PAD
from tests.task_batches import one_pack, proteins_of
from tests.unit.conftest import TinyRun
from tests.unit.runs import CPU

SEQUENCES = ["MKL", "LAG", "ACDEFGHIKLM", "MK", "QQRSTVWY", "W"]
LENGTHS = [len(sequence) for sequence in SEQUENCES]


def _terms(loss: PerProtein) -> dict[int, list[float]]:
    """Sum and number of labels by row, pieces of a protein added."""
    found: dict[int, list[float]] = {}
    for row, terms in zip(loss._rows, torch.cat(loss._terms).tolist(), strict=True):
        total = found.setdefault(row, [0.0, 0.0])
        found[row] = [total[0] + terms[0], total[1] + terms[1]]
    return found


@pytest.mark.parametrize("max_seq_length", [64, 24])
def test_masked_residues_belong_to_their_protein(finished: TinyRun, max_seq_length: int) -> None:
    """Also those of the chunks of long proteins. The labels alone say which protein it is."""
    store = TokenStore(finished.valid)
    spec = BatchSpec(DataConfig(max_seq_length=max_seq_length), 128, seed=3)
    loss = PerProtein(MLMLossReduction(), PackedBatch.by_protein)
    expected = np.zeros((len(store), 2))
    generator = torch.Generator().manual_seed(1)
    for batch in EvalPacks(store, spec, EvalConfig()):
        logits = torch.randn(len(batch.labels), 33, generator=generator, dtype=torch.float64)
        terms = loss.terms(batch, logits)
        assert terms.loss_sum == pytest.approx(float(cross_entropy(logits, batch.labels, reduction="sum")))
        original = batch.input_ids.clone()
        original[batch.label_positions] = batch.labels
        each = cross_entropy(logits, batch.labels, reduction="none")
        for position, value in zip(batch.label_positions.tolist(), each.tolist(), strict=True):
            segment = int(np.searchsorted(batch.cu_seqlens.numpy(), position, side="right")) - 1
            first, end = batch.cu_seqlens[segment : segment + 2].tolist()
            piece = [x for x in original[first:end].tolist() if x not in (CLS, EOS, PAD)]
            owners = [i for i in range(len(store)) if bytes(piece) in store.residues(i).tobytes()]
            if len(owners) == 1:  # a piece of one or two residues occurs in several
                expected[owners[0]] += value, 1
            else:
                assert batch.rows is not None and batch.rows[segment] in owners
                expected[batch.rows[segment]] += value, 1
    found = _terms(loss)
    assert set(found) == set(np.flatnonzero(expected[:, 1]).tolist())
    for row, terms in found.items():
        assert terms == pytest.approx(expected[row].tolist(), rel=1e-12)


def _labels(kind: str, rng: np.random.Generator) -> Any:
    """Labels of all proteins, some of them missing."""
    n, residues = len(SEQUENCES), sum(LENGTHS)
    if kind == "regression":
        labels = rng.normal(size=(n, 2))
        labels[1] = np.nan
    elif kind == "multilabel":
        labels = rng.integers(0, 2, (n, 2)).astype(float)
        labels[2, 0] = np.nan
    elif kind == "classification":
        labels = np.array([0, 1, -100, 1, 0, 1])
    elif kind == "token_classification":
        labels = rng.integers(0, 2, (residues, 1))
        labels[4] = -100
    elif kind == "token_regression":
        labels = rng.normal(size=(residues, 2))
        labels[:3] = np.nan
    else:
        labels = rng.normal(size=(residues, 3)).cumsum(axis=0) * 5
    return labels


@pytest.mark.parametrize(
    "kind",
    ["regression", "multilabel", "classification", "token_classification", "token_regression", "contact"],
)
def test_a_protein_has_the_loss_of_a_batch_of_its_own(kind: str) -> None:
    rng = np.random.default_rng(4)
    names, scale = ["a", "b"], {"mean": [0.5, 1.0], "std": [2.0, 0.5]}
    info = TargetInfo(kind, names, **(scale if "regression" in kind else {}))
    task = TaskConfig(kind=kind, target_columns=names if info.kind != "classification" else ["a"])
    labels, per_residue, per_pair = _labels(kind, rng), info.per_residue, kind == "contact"
    batch = one_pack(proteins_of(SEQUENCES, labels, per_residue, per_pair))
    assert batch.labels is not None
    width = 1 if per_pair else 2
    output = torch.from_numpy(rng.normal(size=(len(batch.labels), width)))
    plain = loss_of_task(task, info)
    loss = PerProtein(plain, split_by_protein(info))
    whole, direct = loss.terms(batch, output), plain.terms(batch, output)
    assert (whole.loss_sum, whole.count) == (direct.loss_sum, direct.count)
    found = _terms(loss)
    assert sum(terms[0] for terms in found.values()) == pytest.approx(float(direct.loss_sum), rel=1e-12)
    first = 0
    offsets = np.cumsum([0, *LENGTHS])
    for row in batch.rows.tolist():
        own = labels[offsets[row] : offsets[row + 1]] if per_residue else labels[row : row + 1]
        alone = one_pack(proteins_of([SEQUENCES[row]], own, per_residue, per_pair))
        size = num_pairs(LENGTHS[row]) if per_pair else LENGTHS[row] if per_residue else 1
        terms = plain.terms(alone, output[first : first + size])
        first += size
        assert found[row] == pytest.approx([float(terms.loss_sum), int(terms.count)], rel=1e-12)
    assert first == len(output)


@pytest.mark.usefixtures("world")
def test_the_loss_sees_a_batch_of_one_protein() -> None:
    """As a user's loss may read it; one that looks at the batch as a whole is told apart by its total."""
    from esm2mega.finetune.losses import TaskLossReduction
    from esm2mega.train.losses import LossTerms

    seen = []

    class Looking(TaskLossReduction):
        def forward(self, batch: Any, output: torch.Tensor) -> LossTerms:
            segments = batch.head_inputs
            seen.append((batch.num_sequences, batch.num_residues, segments.residue_counts))
            assert segments.owners.unique().tolist() == list(range(segments.num_proteins))
            assert len(segments.residues) == len(segments.numbers) == batch.num_residues
            assert batch.input_ids[segments.first].tolist() == [CLS] * batch.num_sequences
            return LossTerms(output.sum(), torch.tensor(len(output)))

    batch = one_pack(proteins_of(SEQUENCES, np.zeros((6, 1))))
    loss = PerProtein(Looking(), split_by_protein(TargetInfo("regression", ["a"])))
    loss.terms(batch, torch.ones(6, 1))
    lengths = [LENGTHS[row] for row in batch.rows.tolist()]
    assert seen == [*((1, length, [length]) for length in lengths), (6, sum(lengths), lengths)]
    from esm2mega.parallel.initialize import Ranks

    gathered = loss.gather(7, Ranks(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, CPU))
    assert gathered is not None
    assert (gathered.sums.tolist(), gathered.counts.tolist()) == ([1.0] * 6 + [0.0], [1] * 6 + [0])
