"""Logits and every gradient, on the CPU and on CUDA, against Hugging Face in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.convert.formats import hf
from esm2mega.model.build import DTYPES, build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import Ranks
from tests.gpu.cases import all_kernels, packed_batch
from tests.parity import references
from tests.parity.references import Shape

pytest.importorskip(
    "transformers", reason="Hugging Face transformers is not installed: pip install esm2mega[dev]"
)

SHAPE = Shape()
# Largest difference relative to the largest value: some 80 fp32 epsilons, for three layers of sums over up to
# 700 keys and 112 channels.
FP32 = 1e-5
# bf16 has no such bound: on a CPU the gradients of some LayerNorms are half of their size off in both models.
# We may round twice as much as Hugging Face's does in bf16 on the same device, or by four epsilons (2**-8).
BF16_FACTOR, BF16_FLOOR = 2.0, 2**-7


def hugging_face_of(precision: str) -> torch.nn.Module:
    """A random model in fp64 on the CPU, its weights rounded to `precision`."""
    model = references.hugging_face(SHAPE, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[precision]))
    return model


def our_model(reference: torch.nn.Module, device: torch.device, precision: str, attention: str) -> ESM2Model:
    """Ours with the weights of the reference."""
    config = ModelConfig(precision=precision, attention_backend=attention, **vars(SHAPE))
    (model,) = build_model(config, ParallelConfig(), device, seed=5)
    assert model.config.packed_attention == attention
    weights = references.ours(dict(reference.state_dict()), hf.NAMES, SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: weights[name].shape[0]] = weights[name].to(parameter)
    return model


def their_values(model: torch.nn.Module) -> dict[str, Tensor]:
    """Logits of all tokens and the gradient of every weight, in fp64 on the CPU."""
    batch = references.batch()
    keep, labels = batch.attention_mask.bool(), batch.labels.flatten()
    device = next(model.parameters()).device
    logits = model(batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)).logits.cpu()
    cross_entropy(logits.flatten(0, 1).double(), labels).backward()
    # The contact head has no part in the loss.
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[keep].detach().double(), **references.ours(gradients, hf.NAMES, SHAPE)}


def our_values(model: ESM2Model, device: torch.device) -> dict[str, Tensor]:
    """The same of ours.

    Gradients come through the logits of labelled tokens alone, as in training: queries and keys of the last
    layer then differ in number.
    """
    batch = packed_batch().to(device)
    packed = PackedSequences.from_lengths(batch.seqlens, device, batch.label_counts)
    with torch.no_grad():
        logits = model(batch.input_ids, packed)
    labelled = model(batch.input_ids, packed, batch.label_positions)
    cross_entropy(labelled.double(), batch.labels).backward()
    gradients = {name: parameter.grad.cpu().double() for name, parameter in model.named_parameters()}
    return {"logits": logits.cpu().double(), **gradients}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By tensor, the largest difference relative to the largest expected value."""
    assert actual.keys() == expected.keys()
    result = {}
    for name, reference in expected.items():
        # Rows past the reference are padding of the vocabulary.
        value = actual[name].reshape(-1, *reference.shape[1:])[: len(reference)]
        scale = reference.abs().max().item()
        assert scale > 0, name
        result[name] = (value - reference).abs().max().item() / scale
    return result


@all_kernels
def test_logits_and_gradients_are_those_of_hugging_face(ranks: Ranks, precision: str, attention: str) -> None:
    """Five proteins of 3 to 700 tokens, with masks and unusual letters; every tensor is random."""
    reference = hugging_face_of(precision)
    expected = their_values(reference)
    device = ranks.device
    ours = differences(our_values(our_model(reference, device, precision, attention), device), expected)
    if precision == "fp32":
        bounds = dict.fromkeys(ours, FP32)
    else:
        peer = hugging_face_of(precision).to(device, DTYPES[precision])
        theirs = differences(their_values(peer), expected)
        bounds = {name: BF16_FACTOR * max(value, BF16_FLOOR) for name, value in theirs.items()}
    for name, difference in ours.items():
        print(f"{name}: {difference:.2e}, bound {bounds[name]:.2e}")
    assert {name: value for name, value in ours.items() if not value <= bounds[name]} == {}
