"""Our logits, loss and every gradient against Hugging Face and fair-esm, with every tensor random."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.convert.formats import fair_esm, hf
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.parallel.initialize import process_groups
from tests.padded import pack, unpack
from tests.parity import references
from tests.parity.references import Shape

pytest.importorskip(
    "transformers", reason="Hugging Face transformers is not installed: pip install esm2mega[dev]"
)
pytest.importorskip("esm", reason="fair-esm is not installed: pip install esm2mega[dev]")


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference relative to the largest absolute reference value."""

    fp32: float = 1e-5  # some 80 fp32 epsilons: three layers of sums over up to 700 keys and 112 channels
    fp64: float = 1e-10  # the same in fp64 leaves 1e-14; 1e-10 catches any fp32 step on the way


TOLERANCE = Tolerance()


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def ours(shape: Shape, precision: str, weights: dict[str, Tensor]) -> ESM2Model:
    config = ModelConfig(precision=precision, **vars(shape))
    (model,) = build_model(config, ParallelConfig(), torch.device("cpu"), seed=5)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(weights), names ^ set(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[name]
            parameter[: value.shape[0]] = value
    return model


def our_logits(model: ESM2Model, batch: references.Batch) -> Tensor:
    ids, packed = pack(batch.input_ids, batch.attention_mask)
    return unpack(model(ids, packed), batch.attention_mask)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        # Rows past the reference are padding of the vocabulary: they must be untouched by the loss.
        rows = reference.shape[0] if reference.dim() else 1
        value, padding = actual[name].reshape(-1, *reference.shape[1:]).tensor_split([rows])
        scale = reference.abs().max().item()
        assert scale > 0, name
        difference = (value - reference).abs().max().item() / scale
        print(f"{name}: {difference:.2e} of scale {scale:.3g}")
        assert difference <= tolerance, f"{name}: {difference:.2e} of scale {scale:.3g}"
        assert not padding.any(), name


def run(
    model: ESM2Model, reference_logits: Tensor, reference: torch.nn.Module, batch: references.Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Backward through both; returns ours, theirs (logits and loss) and their raw gradients."""
    logits = our_logits(model, batch)
    keep = batch.attention_mask.bool()
    outputs = []
    for values in (logits, reference_logits):
        loss = cross_entropy(values.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        outputs.append({"logits": values[keep].detach(), "loss": loss.detach()})
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    return outputs[0], outputs[1], gradients


def gradients_of(model: ESM2Model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_hugging_face_fp32(attention: str) -> None:
    shape = Shape()
    reference = references.hugging_face(shape)
    reference.set_attn_implementation(attention)
    batch = references.batch()
    model = ours(shape, "fp32", references.ours(dict(reference.state_dict()), hf.NAMES, shape))
    theirs = reference(batch.input_ids, attention_mask=batch.attention_mask).logits
    actual, expected, raw = run(model, theirs, reference, batch)
    compare(actual, expected, TOLERANCE.fp32)
    compare(gradients_of(model), references.ours(raw, hf.NAMES, shape), TOLERANCE.fp32)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_equals_fair_esm(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "fp64":
        # fair-esm takes the attention softmax in fp32 whatever the model's dtype, which alone costs 2e-7.
        monkeypatch.setattr(
            "esm.multihead_attention.utils_softmax", lambda x, dim, onnx_trace=False: torch.softmax(x, dim)
        )
    shape = replace(Shape(), ffn_hidden_size=160)
    reference = references.fair_esm(shape, {"fp32": torch.float32, "fp64": torch.float64}[precision])
    batch = references.batch()
    model = ours(shape, precision, references.ours(dict(reference.state_dict()), fair_esm.NAMES, shape))
    theirs = reference(batch.input_ids)["logits"]
    actual, expected, raw = run(model, theirs, reference, batch)
    tolerance = getattr(TOLERANCE, precision)
    compare(actual, expected, tolerance)
    compare(gradients_of(model), references.ours(raw, fair_esm.NAMES, shape), tolerance)


@functools.cache
def _packed_model() -> tuple[Shape, dict[str, Tensor]]:
    shape = replace(Shape(), ffn_hidden_size=160)
    reference = references.fair_esm(shape, torch.float64)
    return shape, references.ours(dict(reference.state_dict()), fair_esm.NAMES, shape)


def test_neighbours_in_the_pack_do_not_matter() -> None:
    """fp64, 1e-12: only the order of sums inside matrix products may differ with the pack's length."""
    shape, weights = _packed_model()
    model = ours(shape, "fp64", weights)
    batch = references.batch()
    together = our_logits(model, batch)
    for row in range(batch.input_ids.shape[0]):
        alone = replace(
            batch,
            input_ids=batch.input_ids[row : row + 1],
            attention_mask=batch.attention_mask[row : row + 1],
        )
        keep = alone.attention_mask[0].bool()
        assert (our_logits(model, alone)[0, keep] - together[row, keep]).abs().max() < 1e-12


def test_no_gradient_crosses_protein_borders() -> None:
    shape, weights = _packed_model()
    model = ours(shape, "fp64", weights)
    batch = references.batch()
    ids, packed = pack(batch.input_ids, batch.attention_mask)
    captured: list[Tensor] = []

    def keep_gradient(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    model.embedding.register_forward_hook(keep_gradient)
    logits = model(ids, packed)
    begin, end = packed.cu_seqlens_q[2].item(), packed.cu_seqlens_q[3].item()
    logits[begin:end].logsumexp(-1).sum().backward()
    gradient = captured[0].grad
    assert gradient is not None
    assert gradient[begin:end].abs().max() > 0
    assert not gradient[:begin].any()
    assert not gradient[end:].any()
