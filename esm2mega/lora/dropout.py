"""Drops inputs of adapters by keys of their tokens, so that every layout drops the same elements.

An element is dropped by a hash of its token, the adapted linear and its channel in the whole model, see
`esm2mega.model.dropout`. A layer hands the keys to its adapters when its forward pass begins. So they are the
right ones too where the layer is computed again, in the backward pass, after it has seen other micro-batches.

Legend: ``T`` tokens of a pack, or of this rank's part of it under context parallelism, ``m`` of them that get
logits, ``t`` tensor-parallel size, ``i`` inputs of the linear.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from esm2mega.model.context_parallel import own_part
from esm2mega.model.dropout import FIRST_ADAPTER, drop, place_of
from esm2mega.model.packed import PackedSequences

LINEARS_OF_LAYER = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Lists the linears of a layer that have places of their own; adapters of q, k and v share their input."""


class InputDropout:
    """Drops the input of the adapters of one linear, in training."""

    def __init__(self, p: float, place: int, group: Any = None) -> None:
        """Set what is dropped.

        Args:
            p: Probability to drop an element, in [0, 1).
            place: Number of the linear from `esm2mega.model.dropout.place_of`.
            group: Tensor-parallel group over which the channels of the input are split; None if each process
                has all of them.
        """
        self.p, self._place, self._group = p, place, group
        self.keys: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of ``[*, 1, i]`` or ``[*, 1, i/t]``, whose tokens are those of `keys`."""
        if not self.p:
            return x
        assert self.keys is not None  # `ESM2Model.encode` has checked it
        first = 0 if self._group is None else self._group.rank() * x.shape[-1]
        return drop(x, self.p, self.keys[:, None], self._place, first)


def dropout_of_layer(layer: Any, linear: str, p: float, group: Any = None) -> InputDropout:
    """Return the dropout of the adapters of a linear.

    Args:
        layer: The layer that holds it.
        linear: Its name, one of `LINEARS_OF_LAYER`.
        p: Probability to drop an element.
        group: As for `InputDropout`.
    """
    place = place_of(layer.layer_number, FIRST_ADAPTER + LINEARS_OF_LAYER.index(linear))
    return InputDropout(p, place, group)


def dropout_of_lm_head(p: float) -> InputDropout:
    """Return the dropout of the adapter in the masked-language-model head, which counts as layer 0."""
    return InputDropout(p, place_of(0, FIRST_ADAPTER))


def hand_keys_to_layer(layer: Any, dropouts: dict[str, InputDropout]) -> None:
    """Let a layer give its adapters the keys of their tokens, at the beginning of its forward pass.

    Args:
        layer: The layer.
        dropouts: By the names of the linears.
    """
    layer.config.keyed_adapter_dropout = max(dropout.p for dropout in dropouts.values())

    def hand_keys(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.training:
            return
        packed: PackedSequences = kwargs["packed_seq_params"]
        assert packed.hidden_keys is not None and packed.query_keys is not None
        states, gathered = packed.hidden_keys, own_part(packed.query_keys, layer.config)
        rows = packed.rows if layer.layer_number == layer.config.num_layers else None
        for name, dropout in dropouts.items():
            if name == "linear_qkv":
                dropout.keys = states
            elif name == "linear_fc1":
                dropout.keys = states if rows is None else states.index_select(0, rows)
            else:
                # Row-parallel linears see all of them, and scatter outputs under sequence parallelism.
                dropout.keys = gathered if rows is None else gathered.index_select(0, rows)

    layer.register_forward_pre_hook(hand_keys, with_kwargs=True)


def hand_keys_to_lm_head(model: Any, dropout: InputDropout) -> None:
    """Let the last chunk of a model give the adapter in its head the keys of the tokens that get logits."""
    model.config.keyed_adapter_dropout = dropout.p
    signature = inspect.signature(model.forward)

    def hand_keys(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        keys, positions = given["packed"].query_keys, given.get("logit_positions")
        dropout.keys = keys if keys is None or positions is None else keys.index_select(0, positions)

    model.register_forward_pre_hook(hand_keys, with_kwargs=True)
