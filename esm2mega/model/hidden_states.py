"""Takes hidden states out of the model by hooks; the model's own code knows nothing of them.

Legend: ``T`` tokens of a pack, ``h`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esm2mega.model.esm2 import ESM2Model


@contextmanager
def hidden_states(model: ESM2Model, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A dictionary that every forward pass fills with the hidden states of this stage: ``[T, h]`` each.

    Args:
        model: The model, or the pipeline stage of it that this rank holds.
        layers: Numbers of states: 0 for the embedding, the number of layers for the end, after the final
            LayerNorm. Those of other stages are left to them.
    """
    found: dict[int, Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, layer: int) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            # A transformer layer returns (hidden states, context). [T, 1, h] -> [T, h]
            found[layer] = (output[0] if isinstance(output, tuple) else output).squeeze(1)

        handles.append(module.register_forward_hook(hook))

    last = model.config.num_layers
    # Post-LN is written with the names of pre-LN: what TAPE's layer gives has passed through the LayerNorm
    # that here belongs to the next layer.
    if model.config.family == "proteinbert_postln":
        states = {layer.layer_number - 1: layer.input_layernorm for layer in model.encoder.layers}
    else:
        states = {layer.layer_number: layer for layer in model.encoder.layers}
        if model.pre_process:
            states[0] = model.embedding
    if model.post_process:
        states[last] = model.encoder
    for number, module in states.items():
        if number in layers:
            keep(module, number)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
