"""Which layer is chosen, and that its checkpoint keys are those of the fused modules."""

from __future__ import annotations

import pytest
import torch

from esm2mega.errors import UserError
from esm2mega.model import layer_spec
from esm2mega.model.esm2 import ESM2Model


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


def test_keys_of_the_local_layer_are_those_of_the_fused_one(model: ESM2Model) -> None:
    keys = {getattr(tensor, "key", "") for tensor in model.sharded_state_dict().values()}
    expected = {
        f"encoder.layers.{module}.layer_norm_{part}"
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for part in ("weight", "bias")
    }
    assert expected <= keys
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in keys)
