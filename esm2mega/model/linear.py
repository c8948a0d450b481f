"""Defines linears that add their bias within the product, where no tensor parallelism stands between the two.

Legend: ``T`` tokens of a pack, ``i`` and ``o`` inputs and outputs of a linear, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear


class ColumnLinear(ColumnParallelLinear):
    """Computes Megatron-Core's column-parallel linear, in a group of one with the bias in the product.

    Megatron-Core adds a bias to the finished product, which reads and writes all of it once more.
    """

    def forward(self, input_: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, ``[T, 1, o/t]`` of ``[T, 1, i]``, and the bias that the caller adds, if any."""
        if self.tp_group.size() > 1:
            return super().forward(input_, *others, **options)
        return linear(input_, self.weight, self.bias), None


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
