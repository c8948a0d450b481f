"""Puts adapters beside the linears that the configuration names, and draws their initial values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esm2mega.config.lora import LINEARS, LM_HEAD, is_trained_bias, resolve_targets
from esm2mega.config.schema import LoRAConfig
from esm2mega.lora.dropout import (
    InputDropout,
    dropout_of_layer,
    dropout_of_lm_head,
    hand_keys_to_layer,
    hand_keys_to_lm_head,
)
from esm2mega.lora.layers import AdaptedLinear, Adapter, Split
from esm2mega.model.freezing import ask_for_gradients, freeze
from esm2mega.model.init import draw

SUFFIX = "_lora"
"""The adapter of ``linear_q`` is the module ``linear_q_lora`` beside it."""

_SPLIT: dict[str, Split] = {
    "linear_qkv": "rows",
    "linear_proj": "columns",
    "linear_fc1": "rows",
    "linear_fc2": "columns",
}
"""Says how the weight of each linear of a layer is split over the tensor-parallel group."""


def apply_lora(
    chunks: Sequence[Any],
    lora: LoRAConfig,
    seed: int,
    trained: Callable[[str], bool] = lambda name: False,
    transform: Callable[[Any], Any] | None = None,
) -> None:
    """Freeze a model and put adapters beside its linears, which do not change its outputs yet.

    Call it with the weights of the base in place, before the model is wrapped for data parallelism.

    Args:
        chunks: This rank's chunks of `esm2mega.model.esm2.ESM2Model`.
        lora: Rank, kind and targets.
        seed: Seed of the initial values, which are the same in every layout.
        trained: Tells from their names in the whole model which parameters are trained besides the adapters,
            such as those of a new head.
        transform: Freezes weights of a chunk and adds the adapters; None to go by `trained`.

    Raises:
        UserError: A target matches nothing.
    """
    first = chunks[0]
    targets = resolve_targets(lora.target_modules, first.config.num_layers, first.has_lm_head)
    if transform is None:
        freeze(chunks, lambda name: trained(name) or is_trained_bias(name, lora, targets))
    else:
        ask_for_gradients(chunks)
    for chunk in chunks:
        if transform is not None:
            transform(chunk)
        else:
            for layer in chunk.encoder.layers:
                adapt_layer(layer, lora, targets)
            if chunk.post_process and LM_HEAD.name in targets:
                _adapt_lm_head(chunk, lora)
        for name, parameter in chunk.named_parameters():
            if is_adapter(name):
                _initialize(chunk.global_parameter_name(name), parameter, seed)


def is_adapter(name: str) -> bool:
    """Tell whether this is the name of a parameter of an adapter."""
    return name.rpartition(".")[0].endswith(SUFFIX)


def adapt_layer(layer: Any, lora: LoRAConfig, targets: dict[str, tuple[int, ...]]) -> None:
    """Put adapters, without initial values, beside those linears of a layer that are targets."""
    number = layer.layer_number - 1
    dropouts: dict[str, InputDropout] = {}
    for fused in dict.fromkeys(linear.fused for linear in LINEARS):
        parts = [linear for linear in LINEARS if linear.fused == fused]
        host = getattr(layer, parts[0].block)
        module, split = getattr(host, fused), _SPLIT[fused]
        adapters: list[Adapter | None] = []
        for linear in parts:
            layers = targets.get(linear.name, ())
            if number not in layers:
                adapters.append(None)
                continue
            # The parts of a fused weight have equal numbers of rows.
            weight = module.weight[: module.weight.shape[0] // len(parts)]
            adapter = Adapter(layer.config, weight, split, lora, (layers.index(number), len(layers)))
            setattr(host, f"{linear.name}{SUFFIX}", adapter)
            adapters.append(adapter)
        if any(adapters):
            dropout = dropouts[fused] = dropout_of_layer(
                layer, fused, lora.dropout, module.tp_group if split == "columns" else None
            )
            module.register_forward_hook(AdaptedLinear(module, adapters, split, lora, layer.config, dropout))
    if dropouts and lora.dropout:
        hand_keys_to_layer(layer, dropouts)


def _adapt_lm_head(chunk: Any, lora: LoRAConfig) -> None:
    """Adapt the dense of the masked-language-model head, which every tensor-parallel rank has whole."""
    head, dropout = chunk.lm_head, dropout_of_lm_head(lora.dropout)
    adapter = Adapter(head.config, head.dense.weight, None, lora, None)
    setattr(head, f"dense{SUFFIX}", adapter)
    head.dense.register_forward_hook(AdaptedLinear(head.dense, [adapter], None, lora, head.config, dropout))
    if lora.dropout:
        hand_keys_to_lm_head(chunk, dropout)


@torch.no_grad()
def _initialize(name: str, parameter: Tensor, seed: int) -> None:
    """Set ``B`` to 0 and draw ``A`` uniformly within ``1 / sqrt(i)``, as PEFT does; magnitudes are set.

    ``A`` is drawn whole from (seed, name), and this rank keeps its slice.
    """
    if name.endswith("lora_B"):
        parameter.zero_()
    elif name.endswith("lora_A"):
        parameter.copy_(draw(name, parameter, seed, _uniform))


def _uniform(shape: list[int], generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) / shape[1] ** 0.5


def adapters_line(lora: LoRAConfig, chunks: Sequence[Any]) -> str:
    """Return a line that says what is trained, with the counts of this rank's chunks."""
    kinds = [name for name, on in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if on]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in parameters)
    return (
        f"adapters {' '.join(kinds) or 'LoRA'} of rank {lora.rank} on {', '.join(lora.target_modules)}: "
        f"{trained:,} of {everything:,} parameters of rank 0 are trained"
    )
