"""Which layer is chosen, that its checkpoint keys are those of the fused modules, and what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.errors import UserError
from esm2mega.model import layer_spec
from esm2mega.model.attention import PackedCoreAttention
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences
from tests import te_stub

CPU = torch.device("cpu")
SHAPE = ModelConfig(num_layers=3, hidden_size=24, ffn_hidden_size=56, num_attention_heads=3)
LENGTHS = [4, 7, 3]
IDS = torch.tensor([0, 5, 32, 2, 0, 6, 9, 32, 4, 8, 2, 0, 11, 2])
ROWS = torch.tensor([2, 7, 9])


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, "te"),
        ("auto", "cuda", torch.float64, "local"),
        ("auto", "cpu", torch.bfloat16, "local"),
        ("local", "cuda", torch.bfloat16, "local"),
        ("te", "cuda", torch.float32, "te"),
    ],
)
def test_choice_where_transformer_engine_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: True)
    assert layer_spec.choose_layer_spec(name, torch.device(device), dtype) == expected


def test_auto_is_local_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: False)
    assert layer_spec.choose_layer_spec("auto", torch.device("cuda"), torch.bfloat16) == "local"


def test_te_without_transformer_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: False)
    with pytest.raises(UserError, match="model.layer_spec=te.*=auto"):
        layer_spec.choose_layer_spec("te", torch.device("cuda"), torch.bfloat16)


@pytest.fixture
def te_calls(monkeypatch: pytest.MonkeyPatch, world: None) -> Iterator[list[dict[str, Any]]]:
    """Layers of the stand-in for Transformer Engine, wherever `layer_spec` is not local."""
    chosen = {"local": "local", "te": "te", "auto": "te"}
    monkeypatch.setattr(layer_spec, "choose_layer_spec", lambda name, device, dtype: chosen[name])
    with te_stub.transformer_engine() as calls:
        yield calls


def _te_name(name: str) -> str:
    """The name that a parameter of a local layer has in a layer of Transformer Engine."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def _outcome(model: ESM2Model) -> dict[str, Tensor]:
    """Logits of some rows, and the gradient of every parameter."""
    logits = model(IDS, PackedSequences.from_lengths(LENGTHS, row_counts=[1, 2, 0]), ROWS)
    logits.float().logsumexp(-1).sum().backward()
    gradients = {_te_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize(
    ("precision", "backend", "attention"),
    [
        ("bf16", "auto", "te"),
        ("fp16", "te", "te"),
        ("bf16", "sdpa", "sdpa"),
        # Transformer Engine has no kernel for packs in fp32, so the layers get our own attention.
        ("fp32", "auto", "own"),
    ],
)
def test_layers_of_transformer_engine_compute_what_local_ones_do(
    te_calls: list[dict[str, Any]], precision: str, backend: str, attention: str
) -> None:
    """The stand-in computes the same by PyTorch, and refuses other types, layouts and borders."""
    shape = replace(SHAPE, precision=precision, attention_backend=backend)
    (fused,) = build_model(shape, ParallelConfig(), CPU, seed=5)
    local_shape = replace(SHAPE, precision=precision, layer_spec="local", attention_backend="sdpa")
    (local,) = build_model(local_shape, ParallelConfig(), CPU, seed=5)
    assert (fused.config.layer_spec, local.config.layer_spec) == ("te", "local")
    assert fused.config.packed_attention in (("native", "sdpa") if attention == "own" else (attention,))
    own = dict(fused.named_parameters())
    for name, parameter in local.named_parameters():
        # Initial weights are the same by name, and so are the LayerNorms.
        assert torch.equal(own.pop(_te_name(name)), parameter), name
    assert not own
    expected, actual = _outcome(local), _outcome(fused)
    assert actual.keys() == expected.keys()
    # The same kernels in the same order, but for the transposes around attention.
    bound = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-10}[precision]
    for name, value in expected.items():
        assert value.any(), name
        assert (actual[name] - value).abs().max() <= bound * value.abs().max(), name
    assert len(te_calls) == (SHAPE.num_layers if attention == "te" else 0)
    assert {call["max_seqlen"] for call in te_calls} <= {(7, 7)}
    kernels = {type(layer.self_attention.core_attention) for layer in fused.encoder.layers}
    assert (kernels == {PackedCoreAttention}) is (attention != "te")


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_attention_of_transformer_engine_is_refused_without_its_kernels(
    te_calls: list[dict[str, Any]], precision: str
) -> None:
    shape = replace(SHAPE, precision=precision, attention_backend="te")
    with pytest.raises(UserError, match="attention_backend=te needs bf16 or fp16.*attention_backend=auto"):
        build_model(shape, ParallelConfig(), CPU, seed=5)


def test_fp64_has_no_layers_of_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: True)
    with pytest.raises(UserError, match="layer_spec=te needs .* no fp64; set model.layer_spec=auto"):
        layer_spec.choose_layer_spec("te", torch.device("cuda"), torch.float64)


def test_keys_of_the_local_layer_are_those_of_the_fused_one(model: ESM2Model) -> None:
    keys = {getattr(tensor, "key", "") for tensor in model.sharded_state_dict().values()}
    expected = {
        f"encoder.layers.{module}.layer_norm_{part}"
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for part in ("weight", "bias")
    }
    assert expected <= keys
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in keys)
