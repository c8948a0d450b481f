"""Linears with the bias in the product, against Megatron-Core's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from esm2mega.config.schema import ParallelConfig
from esm2mega.model.build import transformer_config
from esm2mega.model.linear import ColumnLinear, RowLinear, with_bias
from tests.ranks import run_ranks
from tests.unit.runs import tiny_run

KINDS = [
    (ColumnLinear, ColumnParallelLinear, {}),
    (RowLinear, RowParallelLinear, {"input_is_parallel": True}),
]


def results(linear: torch.nn.Module, x: Tensor, weights: dict[str, Tensor]) -> list[Tensor | None]:
    """The output, and the gradients of input, weight and bias."""
    linear.load_state_dict(weights, strict=False)
    x = x.clone().requires_grad_()
    output = with_bias(*linear(x))
    (output * torch.linspace(-1.0, 1.0, output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
    return [output.detach(), x.grad, linear.weight.grad, linear.bias.grad]


@pytest.mark.parametrize(("ours", "megatrons", "settings"), KINDS, ids=["column", "row"])
@pytest.mark.parametrize("skip_bias_add", [True, False])
def test_it_computes_what_megatron_core_does(
    world: None, ours: type, megatrons: type, settings: dict[str, bool], skip_bias_add: bool
) -> None:
    config = transformer_config(tiny_run().model, ParallelConfig(), torch.device("cpu"), "sdpa")
    settings = {"init_method": config.init_method, "bias": True, "skip_bias_add": skip_bias_add, **settings}
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=config.params_dtype)
        for shape in ((7, 1, 6), (10, 6), (10,))
    )
    theirs, own = (kind(6, 10, config=config, **settings) for kind in (megatrons, ours))
    assert own(x)[1] is None, "nothing is left to add"
    weights = {"weight": weight, "bias": bias}
    for actual, expected in zip(results(own, x, weights), results(theirs, x, weights), strict=True):
        assert expected.abs().max() > 0.1
        # The bias is added before the products or after them.
        assert (actual - expected).abs().max() < 1e-13


def test_columns_of_a_group_have_their_bias_in_the_product(tmp_path: Path) -> None:
    """With the sum of input gradients over ranks, with sequence parallelism, and with frozen weights."""
    run_ranks(["-m", "tests.unit.model.linear_ranks"], 2, tmp_path)


def test_another_form_of_megatron_cores_linear_is_an_error(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformer_config(tiny_run().model, ParallelConfig(), torch.device("cpu"), "sdpa")
    linear = ColumnLinear(6, 10, config=config, init_method=config.init_method, bias=True)
    monkeypatch.setattr(
        ColumnParallelLinear, "_forward_impl", lambda self, x, w, bias, **others: x @ w.t() + bias
    )
    with pytest.raises(RuntimeError, match="0 products and 0 sums, not one of each"):
        linear._forward_impl(torch.ones(2, 1, 6, dtype=config.params_dtype), linear.weight, linear.bias)
