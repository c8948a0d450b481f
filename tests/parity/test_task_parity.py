"""Heads on proteins and residues against `EsmForSequenceClassification` and `EsmForTokenClassification`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.config.schema import DataConfig, ModelConfig, ParallelConfig, TaskConfig
from esm2mega.convert import hf
from esm2mega.data.batch import BatchSpec
from esm2mega.data.labelled_batch import LabelledBatch, LabelledPacks
from esm2mega.data.tokenizer import VOCAB
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import process_groups
from tests.parity import references
from tests.parity.references import Shape
from tests.task_batches import proteins_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLASSES = 4
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "LAGVSERTIDPKQNFYMHWCXBUZO", "MK", "GGSSGLLPWYKKTTRRAAHHCC" * 3]
FP32 = 1e-5
"""Relative to the largest value, as for the masked language model: some 80 epsilons."""


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def reference_model(kind: str, dtype: torch.dtype) -> Any:
    config = references.hugging_face(Shape()).config
    config.num_labels = CLASSES
    made = {
        "sequence": transformers.EsmForSequenceClassification,
        "token": transformers.EsmForTokenClassification,
    }
    model = made[kind](config).to(dtype)
    references.randomize(model)
    return model.eval()


def head_weights(reference: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Tensors of their classifier under our names."""
    names = {"dense.": "head.dense.", "out_proj.": "head.output.", "": "head.output."}
    found = {}
    for name, parameter in reference.classifier.named_parameters():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        value = parameter.grad if gradients else parameter
        found[names[prefix] + name.removeprefix(prefix)] = value.detach()
    return found


def encoder_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table = hf.NAMES
    # The table wants a masked-language-model head, which these models lack.
    h, v = Shape().hidden_size, len(VOCAB)
    blank = {f"lm_head.dense.{p}": torch.zeros(*s) for p, s in (("weight", (h, h)), ("bias", (h,)))}
    blank |= {f"lm_head.layer_norm.{p}": torch.zeros(h) for p in ("weight", "bias")}
    blank["lm_head.bias"] = torch.zeros(v)
    kept = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    ours = references.ours({**blank, **kept}, table, Shape())
    return {name: value for name, value in ours.items() if name.startswith(("encoder.", "embedding."))}


def one_batch() -> LabelledBatch:
    spec = BatchSpec(DataConfig(max_seq_length=128), 160, seed=3)
    (batch,) = LabelledPacks(proteins_of(SEQUENCES), spec)
    return batch


def padded(batch: LabelledBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[n, s]`` of the proteins of a pack, in its order."""
    pieces = list(batch.input_ids.split(batch.seqlens))[: batch.num_sequences]
    ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=1)
    lengths = torch.tensor([len(piece) for piece in pieces])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, reference in expected.items():
        value = actual[name][: reference.shape[0]]
        scale = reference.abs().max().item()
        assert scale > 0, name
        assert (value - reference).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_equals_hugging_face_with_every_gradient(kind: str) -> None:
    reference = reference_model(kind, torch.float32)
    task = TaskConfig(kind="classification" if kind == "sequence" else "token_classification", head="hf")
    config = ModelConfig(precision="fp32", **vars(Shape()))
    (model,) = build_model(config, ParallelConfig(), torch.device("cpu"), 5, head_of_task(task, CLASSES))
    model.eval()
    weights = encoder_weights(dict(reference.state_dict())) | head_weights(reference)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: weights[name].shape[0]] = weights[name]

    batch = one_batch()
    ids, mask = padded(batch)
    theirs = reference(ids, attention_mask=mask).logits
    if kind == "token":
        # Theirs are of all tokens, ours of residues.
        residue = mask.bool() & (ids != 0) & (ids != 2)
        theirs = theirs[residue]
    ours = model(batch.input_ids, PackedSequences.from_lengths(batch.seqlens), batch.wanted)
    assert_close({"logits": ours.detach()}, {"logits": theirs.detach()}, FP32)
    labels = torch.arange(len(theirs)) % CLASSES
    for logits in (ours, theirs):
        cross_entropy(logits, labels).backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    expected = encoder_weights(gradients) | head_weights(reference, gradients=True)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(actual, {name: value for name, value in expected.items() if value.any()}, FP32)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_head_alone_in_fp64(kind: str) -> None:
    """On the same hidden states: rotary positions of transformers are fp32 whatever the model's precision."""
    reference = reference_model(kind, torch.float64).classifier
    task = TaskConfig(kind="classification" if kind == "sequence" else "token_classification", head="hf")
    config = ModelConfig(precision="fp64", **vars(Shape()))
    (model,) = build_model(config, ParallelConfig(), torch.device("cpu"), 5, head_of_task(task, CLASSES))
    head = model.head.eval()
    holder = type("Holder", (), {"classifier": reference})
    weights = head_weights(holder)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(weights[f"head.{name}"])
    batch = one_batch()
    states = torch.randn(160, Shape().hidden_size, dtype=torch.float64, requires_grad=True)
    theirs = (
        reference(states[batch.wanted.first][:, None])
        if kind == "sequence"
        else reference(states[batch.wanted.residues])
    )
    theirs.square().sum().backward()
    expected, states.grad = states.grad, None
    ours = head(states, batch.wanted)
    ours.square().sum().backward()
    assert_close({"logits": ours, "states": states.grad}, {"logits": theirs, "states": expected}, 1e-10)
    mine = {f"head.{name}": parameter.grad for name, parameter in head.named_parameters()}
    assert_close(mine, head_weights(holder, gradients=True), 1e-10)
