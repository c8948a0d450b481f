"""Takes hidden states out of the model by hooks, so that the model's own code need not return them.

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
    """Yield a dictionary that every forward pass fills with hidden states of this stage, ``[T, h]`` each.

    Args:
        model: The model, or the pipeline stage of it that this rank holds.
        layers: Numbers of the states: 0 for the embedding, the number of layers for the output after the
            final LayerNorm. Numbers that belong to other stages are ignored.
    """
    found: dict[int, Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, layer: int) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            # A transformer layer returns (hidden states, context). [T, 1, h] -> [T, h]
            found[layer] = (output[0] if isinstance(output, tuple) else output).squeeze(1)

        handles.append(module.register_forward_hook(hook))

    last = model.config.num_layers
    # Post-LN weights have the names of pre-LN: the LayerNorm that ends a layer of TAPE belongs here to the
    # next layer, so its output is the state that TAPE's layer returns.
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
