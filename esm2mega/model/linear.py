"""Defines linears that add their bias within the product, where no sum over ranks stands between the two.

Legend: ``T`` tokens of a pack, ``i`` and ``o`` inputs and outputs of a linear, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class ColumnLinear(ColumnParallelLinear):
    """Computes Megatron-Core's column-parallel linear with the bias in the product.

    Megatron-Core adds a bias to the finished product, which reads and writes all of it once more, or leaves
    that to the caller. Here a bias is this rank's own, as its columns are.
    """

    def __init__(self, *sizes: int, skip_bias_add: bool = False, **others: Any) -> None:
        """Make the linear; `skip_bias_add` is not needed, since no caller can add a bias more cheaply."""
        super().__init__(*sizes, skip_bias_add=False, **others)

    def forward(self, input_: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``[T, 1, o/t]`` of ``[T, 1, i]``, and the bias that the caller adds: none."""
        if self.tp_group.size() > 1:
            return super().forward(input_, *others, **options)
        return linear(input_, self.weight, self.bias), None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
        """Compute the product between Megatron-Core's exchanges of a group, forward and backward."""
        if bias is None or not weight.requires_grad:
            # With frozen weights Megatron-Core gives no gradient to a bias that it adds itself.
            output = super()._forward_impl(input, weight, bias=None, **settings)
            return with_bias(output, bias)
        with _BiasWithin(bias) as within:
            output = super()._forward_impl(input, weight, bias=bias, **settings)
        within.check()
        return output


class _BiasWithin(TorchFunctionMode):
    """Lets a product that is followed by the addition of `bias` be one operation."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias, self.products, self.sums = bias, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul:
            self.products += 1
            values, transposed = args
            return linear(values, transposed.t(), self.bias)
        if self.products and getattr(func, "__name__", "") in ("add", "__add__"):
            self.sums += 1
            return args[0]
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Check that there was one product and one sum, as in all known releases of Megatron-Core."""
        if (self.products, self.sums) != (1, 1):
            raise RuntimeError(
                f"Megatron-Core's linear has {self.products} products and {self.sums} sums, not one of each"
            )


class RowLinear(RowParallelLinear):
    """Computes Megatron-Core's row-parallel linear, in a group of one with the bias in the product.

    In a larger group the bias is added once, to the sum over the ranks.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``[T, 1, o]`` of ``[T, 1, i/t]``, and the bias that the caller adds, if any."""
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return linear(input_, self.weight, self.bias), None


def with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a linear computes from the two values that it has returned."""
    return output if bias is None else output + bias
