"""Which layer is chosen, and that its checkpoint keys are those of the fused modules."""

from __future__ import annotations

import pytest

from esm2mega.errors import UserError
from esm2mega.model import layer_spec
from esm2mega.model.esm2 import ESM2Model


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [("auto", True, "te"), ("auto", False, "local"), ("local", True, "local"), ("te", True, "te")],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, name: str, found: bool, expected: str) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: found)
    assert layer_spec.choose_layer_spec(name) == expected


def test_te_without_transformer_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_spec, "transformer_engine_found", lambda: False)
    with pytest.raises(UserError, match="model.layer_spec=te.*use auto"):
        layer_spec.choose_layer_spec("te")


def test_keys_of_the_local_layer_are_those_of_the_fused_one(model: ESM2Model) -> None:
    keys = {getattr(tensor, "key", "") for tensor in model.sharded_state_dict().values()}
    expected = {
        f"encoder.layers.{module}.layer_norm_{part}"
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1")
        for part in ("weight", "bias")
    }
    assert expected <= keys
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in keys)
