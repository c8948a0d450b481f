"""Compares the linears with Megatron-Core's in a tensor-parallel group of two: run by `test_linear`.

python -m tests.unit.model.linear_ranks
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from esm2mega.config.schema import ParallelConfig
from esm2mega.model import linear as module
from esm2mega.model.build import transformer_config
from esm2mega.model.linear import ColumnLinear
from esm2mega.parallel.initialize import Ranks, process_groups
from tests.unit.model.test_linear import results
from tests.unit.runs import tiny_run


def check(parallel: ParallelConfig, ranks: Ranks, is_frozen: bool) -> None:
    shape = replace(tiny_run().model, num_attention_heads=4, hidden_size=24)
    config = transformer_config(shape, parallel, ranks.device, "sdpa")
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=config.params_dtype)
        for size in ((8, 1, 6), (10, 6), (10,))
    )
    # Each rank has its columns, and under sequence parallelism its tokens.
    weights = {name: value.chunk(2)[ranks.rank] for name, value in {"weight": weight, "bias": bias}.items()}
    x = x.chunk(2)[ranks.rank] if parallel.sequence_parallel else x
    found: list[list[Tensor | None]] = []
    products: list[Tensor | None] = []

    def product(values: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(bias)
        return torch.nn.functional.linear(values, matrix, bias)

    with patch.object(module, "linear", product):
        for kind in (ColumnParallelLinear, ColumnLinear):
            made = kind(6, 10, config=config, init_method=config.init_method, bias=True, skip_bias_add=True)
            made.weight.requires_grad_(not is_frozen)
            found.append(results(made, x, weights))
    # Of frozen weights a bias that is not frozen has its gradient only if it is added behind the product.
    assert [bias is not None for bias in products] == ([] if is_frozen else [True])
    assert made(x)[1] is None, "nothing is left to add"
    for expected, actual in zip(*found, strict=True):
        if expected is None:
            assert actual is None
            continue
        assert expected.abs().max() > 0.1
        # The bias is added before the products or after them.
        assert (actual - expected).abs().max() < 1e-13


for sequence_parallel in (False, True):
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    with process_groups(layout, seed=1) as ranks:
        check(layout, ranks, is_frozen=False)
        if not sequence_parallel:
            check(layout, ranks, is_frozen=True)
