"""The losses of single proteins are those of Hugging Face, and their mean is that of `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from esm2mega.autoeval.compare import compare
from esm2mega.autoeval.models import Measurement
from esm2mega.config.schema import DataConfig, EvalConfig
from esm2mega.data.store.token_store import StoreWriter, TokenStore
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.loader import EvalPacks
from esm2mega.train.evaluate import evaluate_checkpoint
from esm2mega.train.per_protein import ProteinLosses
from tests.infer_models import MAX_SEQ_LENGTH, Reference, make_reference, random_proteins

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    return make_reference(tmp_path_factory.mktemp("reference"))


def _store(path: Path, sequences: list[str]) -> Path:
    with StoreWriter(path) as writer:
        writer.append([f"p{i}" for i in range(len(sequences))], [text.encode() for text in sequences])
    return path


def _segments(store: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The masked pieces of the only protein of a store, and the labels of their tokens, -100 for none."""
    spec = BatchSpec(DataConfig(max_seq_length=MAX_SEQ_LENGTH), 512, seed=1)
    for batch in EvalPacks(TokenStore(store), spec, EvalConfig()):
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.label_positions] = batch.labels
        for first, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            if (labels[first:end] != -100).any():
                yield batch.input_ids[first:end], labels[first:end]


def test_losses_of_proteins_are_those_of_hugging_face(reference: Reference, tmp_path: Path) -> None:
    """Also of one in two pieces. Each is masked in a store of its own, as masks depend on residues alone."""
    sequences = random_proteins([40, 7, 150, 90, 25])
    store, out = _store(tmp_path / "all", sequences), tmp_path / "out.json"
    path = str(reference.checkpoint)
    result = compare((path, path), str(store), out, per_protein=True)
    found = {each["id"]: each for each in json.loads(out.read_text())["proteins"]}
    total, count = 0.0, 0
    for number, sequence in enumerate(sequences):
        losses = 0.0
        labels = 0
        for ids, wanted in _segments(_store(tmp_path / f"one{number}", [sequence])):
            with torch.no_grad():
                losses += float(reference.model(ids[None], labels=wanted[None]).loss) * int(
                    (wanted >= 0).sum()
                )
            labels += int((wanted >= 0).sum())
        if not labels:
            assert f"p{number}" not in found
            continue
        each = found[f"p{number}"]
        assert each["num_labels"] == labels
        # In fp32, where other kernels add in another order.
        assert each["a"] == each["b"] == pytest.approx([losses / labels], abs=2e-5)
        total, count = total + losses, count + labels
    assert result is not None and result["num_labels"] == count
    assert result["differences"]["loss"]["a"] == pytest.approx(total / count, abs=2e-5)
    plain = evaluate_checkpoint(path, store)
    assert result["a"][0]["loss"] == plain["loss"] and result["eval_recipe"] == plain["eval_recipe"]
    assert result["differences"]["loss"]["a"] == pytest.approx(plain["loss"], rel=1e-6)


def test_a_loss_that_is_no_sum_over_proteins_is_told_by_its_total() -> None:
    losses = ProteinLosses(np.array([3.0, 5.0, 0.0]), np.array([1, 3, 0]))
    assert Measurement(2.0, losses, {}).adds_up
    assert not Measurement(2.1, losses, {}).adds_up
    nothing = ProteinLosses(np.zeros(2), np.zeros(2, dtype=np.int64))
    assert Measurement(None, nothing, {}).adds_up
    assert not Measurement(None, losses, {}).adds_up and not Measurement(2.0, nothing, {}).adds_up
