"""Resolves which linears `lora.target_modules` means, and checks the rules of the section `lora`.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from esm2mega.config.presets import shape_of
from esm2mega.config.schema import LoRAConfig, ModelConfig
from esm2mega.errors import UserError


@dataclass(frozen=True)
class Linear:
    """Describes a linear that can have an adapter; q, k and v are parts of the fused ``linear_qkv``.

    Attributes:
        name: Last part of its name.
        block: Part of a layer that holds it.
        fused: Name of the module that computes it.
        hugging_face: Its name within a layer of `transformers`' ESM.
    """

    name: str
    block: str
    fused: str
    hugging_face: str


LINEARS = (
    Linear("linear_q", "self_attention", "linear_qkv", "attention.self.query"),
    Linear("linear_k", "self_attention", "linear_qkv", "attention.self.key"),
    Linear("linear_v", "self_attention", "linear_qkv", "attention.self.value"),
    Linear("linear_proj", "self_attention", "linear_proj", "attention.output.dense"),
    Linear("linear_fc1", "mlp", "linear_fc1", "intermediate.dense"),
    Linear("linear_fc2", "mlp", "linear_fc2", "output.dense"),
)
"""Lists the linears in the order in which a layer computes them."""

Targets = dict[str, tuple[int, ...]]
"""Maps the name of a linear to the layers, counted from 0 and ascending, in which it has an adapter."""


def resolve_targets(patterns: Sequence[str], num_layers: int) -> Targets:
    """Return the linears that `patterns` name.

    A pattern is a whole name or its last parts, ours or Hugging Face's, with ``*``, ``?`` and ``[…]`` as in
    file names: ``linear_qkv``, ``encoder.layers.3.mlp.linear_fc?``, ``query``, ``attention.output.dense``.
    ``output.dense`` means the second linear of the feed-forward block only.

    Args:
        patterns: `lora.target_modules`.
        num_layers: Number of layers of the model.

    Raises:
        UserError: There are no patterns, or one of them matches nothing.
    """
    if not patterns:
        raise UserError("lora.target_modules=[] leaves nothing to adapt; name linears, such as linear_qkv")
    found: dict[str, list[int]] = {}
    unused = dict.fromkeys(patterns)
    for linear in LINEARS:
        for layer in range(num_layers):
            matching = [pattern for pattern in patterns if _matches(pattern, linear, layer)]
            if matching:
                found.setdefault(linear.name, []).append(layer)
            for pattern in matching:
                unused.pop(pattern, None)
    if unused:
        theirs = ", ".join(linear.hugging_face.removeprefix("attention.self.") for linear in LINEARS)
        raise UserError(
            f"lora.target_modules={next(iter(unused))} matches no linear of this model; there are "
            f"linear_qkv, {', '.join(linear.name for linear in LINEARS)}, in encoder.layers.0 to "
            f"encoder.layers.{num_layers - 1}, and as names of Hugging Face {theirs}"
        )
    return {name: tuple(layers) for name, layers in found.items()}


def shortest_patterns(targets: Targets, num_layers: int) -> list[str]:
    """Return patterns that mean `targets`: last parts if all layers have an adapter, else whole names."""
    patterns = []
    for linear in LINEARS:
        layers = targets.get(linear.name, ())
        if len(layers) == num_layers:
            patterns.append(linear.name)
        else:
            patterns += [f"encoder.layers.{layer}.{linear.block}.{linear.name}" for layer in layers]
    return patterns


def check_lora(lora: LoRAConfig, model: ModelConfig) -> None:
    """Check the values of `lora`, that the patterns match linears, and that the model can have adapters."""
    if lora.rank is None:
        return
    if lora.alpha is not None and lora.alpha <= 0:
        raise UserError(f"lora.alpha={lora.alpha} must be greater than 0")
    if lora.dropout >= 1:
        raise UserError(f"lora.dropout={lora.dropout} must be below 1")
    resolve_targets(lora.target_modules, shape_of(model).num_layers)
    if model.layer_spec == "te":
        raise UserError(
            "model.layer_spec=te does not go with lora.rank: Transformer Engine's fused linears do not show "
            "an adapter its input; set model.layer_spec=local"
        )


def check_start(lora: LoRAConfig, init_from: str | None) -> None:
    """Refuse adapters without a checkpoint of their base weights in `init_from`."""
    if lora.rank is not None and init_from is None:
        raise UserError(
            f"lora.rank={lora.rank} trains adapters of a trained model; name it in init_from, or set "
            "lora.rank=null"
        )


def _matches(pattern: str, linear: Linear, layer: int) -> bool:
    ours = f"encoder.layers.{layer}.{linear.block}."
    names = {ours + linear.name, ours + linear.fused}
    # The two `output.dense` of a layer differ only in the part before it.
    if linear.name != "linear_proj" or not pattern.endswith("output.dense") or "attention" in pattern:
        names.add(f"esm.encoder.layer.{layer}.{linear.hugging_face}")
    return any(fnmatchcase(name, form) for name in names for form in (pattern, f"*.{pattern}"))
