"""Names of linears that get adapters, as written out by hand."""

from __future__ import annotations

import pytest

from esm2mega.config.lora import is_trained_bias, resolve_targets, shortest_patterns
from esm2mega.config.schema import LoRAConfig
from esm2mega.errors import UserError

ALL = (0, 1, 2)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["linear_qkv"], {"linear_q": ALL, "linear_k": ALL, "linear_v": ALL}),
        (["query", "linear_v"], {"linear_q": ALL, "linear_v": ALL}),
        (["encoder.layers.*.self_attention.linear_k"], {"linear_k": ALL}),
        (["encoder.layers.1.mlp.linear_fc?"], {"linear_fc1": (1,), "linear_fc2": (1,)}),
        (["mlp.*"], {"linear_fc1": ALL, "linear_fc2": ALL}),
        (["esm.encoder.layer.[02].attention.self.value"], {"linear_v": (0, 2)}),
        (["attention.output.dense"], {"linear_proj": ALL}),
        (["output.dense"], {"linear_fc2": ALL}),
        (["esm.encoder.layer.*.output.dense"], {"linear_fc2": ALL}),
        (["intermediate.dense"], {"linear_fc1": ALL}),
        (["dense"], {"linear_proj": ALL, "linear_fc1": ALL, "linear_fc2": ALL}),
    ],
)
def test_patterns(patterns: list[str], expected: dict[str, tuple[int, ...]]) -> None:
    targets = resolve_targets(patterns, 3)
    assert targets == expected
    assert resolve_targets(shortest_patterns(targets, 3), 3) == expected


LAYERS = dict.fromkeys(("linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1", "linear_fc2"), ALL)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query", "dense"], {**LAYERS, "lm_head.dense": (0,)}),
        (["all-linear"], {**LAYERS, "lm_head.dense": (0,)}),
        (["lm_head.dense"], {"lm_head.dense": (0,)}),
        (["output.dense"], {"linear_fc2": ALL}),
    ],
)
def test_patterns_with_the_head_of_a_language_model(
    patterns: list[str], expected: dict[str, tuple[int, ...]]
) -> None:
    targets = resolve_targets(patterns, 3, has_lm_head=True)
    if "dense" in patterns:
        expected = {name: layers for name, layers in expected.items() if name not in ("linear_k", "linear_v")}
    assert targets == expected
    assert resolve_targets(shortest_patterns(targets, 3), 3, has_lm_head=True) == expected
    assert resolve_targets(["all-linear"], 3) == LAYERS


def test_trained_biases() -> None:
    names = [
        *("encoder.layers.1.self_attention.linear_qkv.bias", "encoder.layers.1.mlp.linear_fc1.bias"),
        *("encoder.layers.1.mlp.linear_fc1.layer_norm_bias", "encoder.final_layernorm.bias"),
        *("lm_head.dense.bias", "output_layer.bias", "encoder.layers.1.mlp.linear_fc1.weight"),
    ]
    targets = resolve_targets(["query", "lm_head.dense"], 3, has_lm_head=True)
    for bias, expected in (("none", []), ("all", names[:-1]), ("lora_only", [names[0], names[4]])):
        lora = LoRAConfig(rank=2, bias=bias)
        assert [name for name in names if is_trained_bias(name, lora, targets)] == expected


@pytest.mark.parametrize("pattern", ["linear_qk", "encoder.layers.3.*", "lm_head.dense", "", "Query"])
def test_a_pattern_without_a_match_is_named(pattern: str) -> None:
    with pytest.raises(UserError, match="matches no linear") as caught:
        resolve_targets(["linear_q", pattern], 3)
    message = str(caught.value)
    assert f"lora.target_modules={pattern} " in message
    assert "linear_fc2" in message and "encoder.layers.2" in message and "output.dense" in message


def test_no_pattern() -> None:
    with pytest.raises(UserError, match="nothing to adapt"):
        resolve_targets([], 3)
