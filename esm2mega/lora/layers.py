"""Computes an adapter beside a linear, split or whole, and adds its result to the output.

The adapted output is ``W x + s B A x`` (Hu et al. 2021, arXiv:2106.09685); with a magnitude, each of its rows
is scaled by ``m / |W + s B A|``, whose norm counts as a constant (Liu et al. 2024, arXiv:2402.09353).

The factors are split over the tensor-parallel group such that only vectors of the adapter's rank are sent:

* column-parallel: ``A`` is whole on every process; ``B`` and ``m`` are split by rows, as ``W`` is;
* row-parallel: ``A`` is split by columns, as ``W`` is; ``B`` and ``m`` are whole;
* of a linear that every process has whole, such as that of the language model's head, all factors are whole.

Under sequence parallelism a whole factor sees only the tokens of its process. Its attribute
``sequence_parallel`` makes Megatron-Core sum its gradient over the group.

Legend: ``T`` tokens of a pack (``m`` in the last layer), ``t`` tensor-parallel size, ``r`` rank of the
adapter, ``n`` heads, ``d`` head dimension, ``i`` and ``o`` inputs and outputs of the linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from esm2mega.config.schema import LoRAConfig
from esm2mega.lora.dropout import InputDropout

Split = Literal["rows", "columns"] | None
"""Says how a weight is split: by rows in a column-parallel linear, by columns in a row-parallel one."""

_SPLIT: dict[Split, dict[str, int]] = {
    "rows": {"lora_B": 0, "magnitude": 0},
    "columns": {"lora_A": 1},
    None: {},
}
"""This gives the split dimension of each split factor."""


class Adapter(MegatronModule):
    """Holds the trained factors of one linear."""

    def __init__(
        self,
        config: Any,
        weight: Tensor,
        split: Split,
        lora: LoRAConfig,
        position: tuple[int, int] | None,
    ) -> None:
        """Make the factors without values, which `esm2mega.lora.inject` sets.

        Args:
            config: Configuration of the model.
            weight: This rank's part of the adapted weight, ``[o/t, i]``, ``[o, i/t]`` or ``[o, i]``.
            split: How the weight is split.
            lora: Rank and kind of the adapter.
            position: Index of this adapter among those of the same linear in all layers, and their number;
                None for a linear that is in no layer.
        """
        super().__init__(config=config)
        assert lora.rank is not None
        self._position, self._split = position, _SPLIT[split]
        rows, columns = weight.shape
        shapes = {"lora_A": (lora.rank, columns), "lora_B": (rows, lora.rank)}
        if lora.use_dora:
            shapes["magnitude"] = (rows,)  # type: ignore[assignment]
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
            is_split = name in self._split
            set_tensor_model_parallel_attributes(parameter, is_split, self._split.get(name, -1), 1)
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel and not is_split  # type: ignore[attr-defined]
            setattr(self, name, parameter)
        if not lora.use_dora:
            self.magnitude = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Stack the factors over the layers with an adapter; `sharded_offsets` would stack all layers."""
        stack = [] if self._position is None else [(0, *self._position)]
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, self._split, stack
        )


class AdaptedLinear:
    """Adds the results of adapters to the output of a linear, as its forward hook.

    The linear remains in its place in the model, so the weights of the base keep their names.
    """

    def __init__(
        self,
        module: Any,
        adapters: Sequence[Adapter | None],
        split: Split,
        lora: LoRAConfig,
        config: Any,
        dropout: InputDropout,
    ) -> None:
        """Take `adapters`, one for each part of the output of `module`; a part without one has None.

        Args:
            module: A parallel linear of Megatron-Core; or, if it is not split, one of PyTorch.
            adapters: The adapters.
            split: How the weight of `module` is split.
            lora: Kind of the adapters.
            config: Configuration of the part of the model that holds `module`.
            dropout: Drops the input of the adapters, in training.
        """
        self._module, self._split, self._scaling = module, split, lora.scaling
        self._group = None if split is None else module.tp_group
        self._adapters = list(adapters)
        self._present = [adapter for adapter in adapters if adapter is not None]
        self._dropout = dropout
        self._sequence_parallel = config.sequence_parallel
        self._heads = config.num_attention_heads // (1 if split is None else module.tp_group.size())
        for part, adapter in enumerate(adapters):
            if adapter is not None and adapter.magnitude is not None:
                with torch.no_grad():
                    # The product of the factors is zero at the start of training, and so it is here.
                    adapter.lora_B.zero_()
                    adapter.lora_A.zero_()
                    adapter.magnitude.copy_(self._norm(part, adapter))

    def __call__(
        self, module: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None] | Tensor
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        """Return the output of the linear plus those of the adapters, ``[T, 1, o/t]`` or ``[T/t, 1, o]``."""
        if isinstance(output, Tensor):  # of PyTorch's linear, which adds its bias itself
            (delta,) = self._deltas(inputs[0])
            return self._combine(output, delta, 0, self._present[0], module.bias)
        value, separate_bias = output
        deltas = iter(self._deltas(inputs[0]))
        # If the caller adds the bias, the output does not contain it.
        bias = module.bias if separate_bias is None else None
        if len(self._adapters) == 1:
            return self._combine(value, next(deltas), 0, self._present[0], bias), separate_bias
        # [T, 1, 3h/t] -> three [T, 1, h/t]
        parts = [self._part(value, number) for number in range(3)]
        for number, adapter in enumerate(self._adapters):
            if adapter is not None:
                own_bias = None if bias is None else self._part(bias, number)
                parts[number] = self._combine(parts[number], next(deltas), number, adapter, own_bias)
        stacked = torch.stack([part.unflatten(-1, (self._heads, -1)) for part in parts], dim=-2)
        # [T, 1, n/t, 3, d] -> [T, 1, 3h/t]
        return stacked.flatten(-3), separate_bias

    def _deltas(self, x: Tensor) -> list[Tensor]:
        """Return ``s B A x`` of each adapter, in the layout of the linear's output."""
        group = self._group
        if self._present[0].training:
            x = self._dropout(x)
        # [T, 1, k r]: one product and one collective for all k adapters
        hidden = linear(x, torch.cat([adapter.lora_A for adapter in self._present]))
        if self._split == "rows" and self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        elif self._split == "rows":
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        elif self._split == "columns" and self._sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=group)
        elif self._split == "columns":
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=group)
        parts = hidden.chunk(len(self._present), dim=-1)
        return [linear(h, a.lora_B) * self._scaling for h, a in zip(parts, self._present, strict=True)]

    def _combine(
        self, value: Tensor, delta: Tensor, part: int, adapter: Adapter, bias: Tensor | None
    ) -> Tensor:
        if adapter.magnitude is None:
            return value + delta
        scale = adapter.magnitude / self._norm(part, adapter)
        return scale * (value + delta) if bias is None else scale * (value - bias + delta) + bias

    @torch.no_grad()
    def _norm(self, part: int, adapter: Adapter) -> Tensor:
        """Return the norm of each row of the adapted weight, in its dtype: ``[o/t]`` or ``[o]``.

        Where each rank holds only some columns, an all-reduce over the tensor-parallel group gives every rank
        the result.
        """
        weight = self._module.weight
        if len(self._adapters) > 1:
            # [3h/t, i] -> [h/t, i]
            weight = self._part(weight.t(), part).t()
        adapted = weight + self._scaling * (adapter.lora_B @ adapter.lora_A)
        wide = adapted if adapted.dtype == torch.float64 else adapted.float()
        squares = wide.square().sum(dim=1)
        if self._split == "columns" and self._module.tp_group.size() > 1:
            dist.all_reduce(squares, group=self._module.tp_group)
        return squares.sqrt().to(weight.dtype)

    def _part(self, fused: Tensor, number: int) -> Tensor:
        """Select the channels of q, k or v from the fused, head-major ones: ``[*, 3h/t] -> [*, h/t]``."""
        return fused.unflatten(-1, (self._heads, 3, -1)).select(-2, number).flatten(-2)
