"""Resolves which linears `lora.target_modules` means, and checks the rules of the section `lora`.

It is pure Python, like `esm2mega.config.validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from esm2mega.config.presets import shape_of
from esm2mega.config.schema import LoRAConfig, ModelConfig, Run
from esm2mega.errors import UserError


@dataclass(frozen=True)
class Linear:
    """Describes a linear that can have an adapter; q, k and v are parts of the fused ``linear_qkv``.

    Attributes:
        name: Last part of its name.
        block: Part of a layer that holds it.
        fused: Name of the module that computes it.
        hugging_face: Its name within a layer of `transformers`' ESM. For `LM_HEAD`, which is in no layer, all
            names are the whole one.
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

LM_HEAD = Linear("lm_head.dense", "", "lm_head.dense", "lm_head.dense")
"""Is the linear of the masked-language-model head that can have an adapter; it counts as layer 0."""

_BESIDE = ("contact_head.", "pooler.")
"""The names of tensors that lie beside a model, and are never trained with it, begin so."""

ALL_LINEAR = "all-linear"
"""This pattern means every linear, as in peft."""

Targets = dict[str, tuple[int, ...]]
"""Maps the name of a linear to the layers, counted from 0 and ascending, in which it has an adapter."""


def targets_of(run: Run) -> Targets:
    """Return the linears that a run adapts, see `resolve_targets`."""
    return resolve_targets(
        run.lora.target_modules, shape_of(run.model).num_layers, has_lm_head=run.task.kind is None
    )


def resolve_targets(patterns: Sequence[str], num_layers: int, has_lm_head: bool = False) -> Targets:
    """Return the linears that `patterns` name.

    A pattern is a whole name or its last parts, ours or Hugging Face's, with ``*``, ``?`` and ``[…]`` as in
    file names: ``linear_qkv``, ``encoder.layers.3.mlp.linear_fc?``, ``query``, ``attention.output.dense``.
    ``output.dense`` means the second linear of the feed-forward block only, ``dense`` all that end so, that
    of the masked-language-model head included. ``all-linear`` means every linear.

    Args:
        patterns: `lora.target_modules`.
        num_layers: Number of layers of the model.
        has_lm_head: Whether the model has the masked-language-model head, and not that of a task.

    Raises:
        UserError: There are no patterns, or one of them matches nothing.
    """
    if not patterns:
        raise UserError("lora.target_modules=[] leaves nothing to adapt; name linears, such as linear_qkv")
    found: dict[str, list[int]] = {}
    unused = dict.fromkeys(patterns)
    for linear in (*LINEARS, LM_HEAD) if has_lm_head else LINEARS:
        for layer in range(1 if linear is LM_HEAD else num_layers):
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
            f"{', and lm_head.dense' * has_lm_head}"
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
    return patterns + [LM_HEAD.name] * (LM_HEAD.name in targets)


def is_trained_bias(name: str, lora: LoRAConfig, targets: Targets) -> bool:
    """Tell whether `lora.bias` trains the parameter or tensor of this name.

    A bias is trained in all layers or in none: where a linear has an adapter in some layers, all of its
    biases are trained, and those of q, k and v, which are one tensor, together.
    """
    if lora.bias == "none" or not name.endswith("bias") or name.startswith(_BESIDE):
        return False
    hosts = [linear.fused for linear in (*LINEARS, LM_HEAD) if linear.name in targets]
    return lora.bias == "all" or any(f".{name}".endswith(f".{host}.bias") for host in hosts)


def check_lora(lora: LoRAConfig, model: ModelConfig, has_lm_head: bool) -> None:
    """Check the values of `lora`, that the patterns match linears, and that the model can have adapters."""
    if lora.rank is None:
        return
    if lora.alpha is not None and lora.alpha <= 0:
        raise UserError(f"lora.alpha={lora.alpha} must be greater than 0")
    resolve_targets(lora.target_modules, shape_of(model).num_layers, has_lm_head)
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
    if pattern == ALL_LINEAR:
        return True
    if linear is LM_HEAD:
        return any(fnmatchcase(linear.name, form) for form in (pattern, f"*.{pattern}"))
    ours = f"encoder.layers.{layer}.{linear.block}."
    names = {ours + linear.name, ours + linear.fused}
    # The two `output.dense` of a layer differ only in the part before it.
    if linear.name != "linear_proj" or not pattern.endswith("output.dense") or "attention" in pattern:
        names.add(f"esm.encoder.layer.{layer}.{linear.hugging_face}")
    return any(fnmatchcase(name, form) for name in names for form in (pattern, f"*.{pattern}"))
