"""Hidden states and contacts out of the one model there is, by hooks; its own code knows nothing of them.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``n`` heads, ``t`` tensor-parallel size, ``d`` head
    dimension,
``l`` residues of a sequence, ``s`` its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from esm2mega.infer.windows import Window
from esm2mega.model.esm2 import ESM2Model

_MAP_ELEMENTS = 1 << 24
"""Elements of attention maps held at once: 64 MB in fp32, or one map if that is larger."""


@dataclass(frozen=True)
class Wanted:
    """What to compute.

    Attributes:
        layers: Hidden states, 0 for the embedding, the number of layers for the end, after the final
            LayerNorm.
        logits: Whether the head runs.
        contact_head: Weight ``[L * n]``, layer-major, and bias of the contact head; None for no contacts.
    """

    layers: tuple[int, ...] = ()
    logits: bool = False
    contact_head: tuple[Tensor, float] | None = None


@contextmanager
def hidden_states(model: ESM2Model, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A dictionary that every forward pass fills with the hidden states of this stage: ``[T, h]`` each.

    Args:
        model: The model, or the pipeline stage of it that this rank holds.
        layers: Numbers of states as in `Wanted`; those of other stages are left to them.
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


class ContactMaps:
    """Sums up the contact head's logits over the heads of this rank while a pack passes through the layers.

    ESM-2's contacts are a logistic regression on the attention maps of all layers and heads: of each map the
    residues' part is taken, symmetrised, and corrected by its average product (APC). The regression is a sum
    over maps, so maps are never kept: what remains is one ``[l, l]`` sum per sequence.
    """

    def __init__(self, model: ESM2Model, weight: Tensor) -> None:
        """Args: model: this rank's stage. weight: ``[L * n]``, layer-major."""
        self._weight = weight.view(-1, model.config.num_attention_heads)
        self._windows: Sequence[Window] = ()
        self.sums: list[Tensor] = []
        self._handles = [
            layer.self_attention.core_attention.register_forward_pre_hook(
                self._hook(layer.layer_number), with_kwargs=True
            )
            for layer in model.encoder.layers
        ]

    def begin(self, windows: Sequence[Window]) -> None:
        """Start a pack: its first sequences are these windows, without a pad tail."""
        self._windows, self.sums = windows, []

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer_number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, key = args[0], args[1]
            self._add(query, key, self._weight[layer_number - 1])

        return hook

    def _add(self, query: Tensor, key: Tensor, weight: Tensor) -> None:
        """Add one layer. q and k ``[T, n/t, d]``, after rotary; weight of all heads ``[n]``."""
        heads = query.shape[1]
        rank = parallel_state.get_tensor_model_parallel_rank()
        # At least fp32 from here on, in any model.
        dtype = torch.promote_types(query.dtype, torch.float32)
        own = weight[rank * heads : (rank + 1) * heads].to(query.device, dtype)
        first = 0
        for number, window in enumerate(self._windows):
            tokens = slice(first, first + window.num_tokens)
            # [s, n/t, d] -> [n/t, s, d]
            q, k = (x[tokens].transpose(0, 1).to(dtype) for x in (query, key))
            logits = _weighted_maps(q, k, own, window.residue_tokens)
            if number == len(self.sums):
                self.sums.append(logits)
            else:
                self.sums[number] += logits
            first = tokens.stop


def _weighted_maps(q: Tensor, k: Tensor, weight: Tensor, residues: slice) -> Tensor:
    """Corrected attention maps, weighted and summed over heads: ``[l, l]``.

    Args:
        q, k: ``[n/t, s, d]``.
        weight: ``[n/t]``.
        residues: Which of the ``s`` tokens.
    """
    q = q[:, residues] * q.shape[-1] ** -0.5
    length = q.shape[1]
    result = q.new_zeros(length, length)
    # The number of maps at once follows from the length alone: the sum's order is that of no other protein.
    group = max(1, _MAP_ELEMENTS // (length * k.shape[1]))
    for first in range(0, len(q), group):
        some = slice(first, first + group)
        maps = torch.softmax(q[some] @ k[some].transpose(1, 2), dim=-1)[:, :, residues]
        maps = maps + maps.transpose(1, 2)
        rows = maps.sum(dim=-1)
        average_product = rows.unsqueeze(2) * rows.unsqueeze(1) / rows.sum(dim=-1)[:, None, None]
        result += torch.einsum("n,nij->ij", weight[some], maps - average_product)
    return result
