"""Linears in FP8, of the stand-in for Transformer Engine: what they get and give, and who is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esm2mega.config.load import load_run
from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.errors import UserError
from esm2mega.model import layer_spec
from esm2mega.model.arithmetic import arithmetic
from esm2mega.model.build import build_model
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.kernels.fp8 import check_fp8, whole_blocks
from esm2mega.model.packed import PackedSequences
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import train_step
from tests import te_stub
from tests.gpu.cases import packed_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = 3
SHAPE = ModelConfig(
    num_layers=LAYERS, hidden_size=96, ffn_hidden_size=160, num_attention_heads=3, precision="bf16"
)
PRODUCTS = 4 * LAYERS
"""Linears of the layers."""


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Layers of the stand-in, which refuses rows and columns that products in FP8 do not take."""
    monkeypatch.setattr(layer_spec, "choose_layer_spec", lambda name, device, dtype: "te")
    with te_stub.transformer_engine(), process_groups(ParallelConfig(), seed=1) as ranks:
        yield ranks


def _model(**changes: str | None) -> ESM2Model:
    (model,) = build_model(replace(SHAPE, **changes), ParallelConfig(), CPU, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _outcome(model: ESM2Model) -> dict[str, Tensor]:
    """Logits of 3 of 14 tokens, neither a multiple of 16, and the gradient of every parameter."""
    ids = torch.tensor([0, 5, 32, 2, 0, 6, 9, 32, 4, 8, 2, 0, 11, 2])
    packed = PackedSequences.from_lengths([4, 7, 3], row_counts=[1, 2, 0])
    logits = model(ids, packed, torch.tensor([2, 7, 9]))
    logits.float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_the_linears_of_the_layers_multiply_in_fp8(te: Ranks, recipe: str, recompute: str) -> None:
    expected = _outcome(_model())
    assert te_stub.Autocast.entered == []
    actual = _outcome(_model(fp8="hybrid", fp8_recipe=recipe, recompute=recompute))
    assert set(te_stub.Autocast.entered) == {("hybrid", recipe)}
    computed = 2 * PRODUCTS if recompute == "full" else PRODUCTS
    assert len(te_stub.Autocast.firsts) == computed
    assert not torch.equal(actual["logits"], expected["logits"])
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # e4m3 has 3 bits behind the first: 2**-4 in each factor, through 12 linears one behind the other.
        # What has nothing to do with the expected value is off by 1.
        assert (actual[name] - value).norm() <= 0.4 * value.norm(), name


def test_weights_are_quantized_anew_in_every_step_and_once(te: Ranks) -> None:
    overrides = ["model.precision=bf16", "model.fp8=e4m3", "schedule.warmup_steps=0"]
    run = load_run("pretrain_esm2_tiny", overrides)
    chunks = build_model(run.model, run.parallel, CPU, run.seed)
    assert arithmetic(chunks[0].config, CUDA) == (
        "bf16 with FP8 (e4m3, tensorwise) in the linears of Transformer Engine"
    )
    state = train_state(run, chunks, MLMLossReduction(), te, None)
    products = 4 * len(chunks[0].encoder.layers)
    for _ in range(2):
        te_stub.Autocast.firsts.clear()
        assert train_step(state, [packed_batch(), packed_batch()]).is_finite
        assert te_stub.Autocast.firsts == [True] * products + [False] * products
    assert set(te_stub.Autocast.entered) == {("e4m3", "tensorwise")}


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize("rows", [1, 16, 32, 37])
def test_rows_that_are_added_change_nothing(recipe: str, multiple: int, rows: int) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.weight = torch.nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
            self.bias = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            assert x.shape[0] % multiple == 0
            return F.linear(x, self.weight, self.bias), None

    linear = whole_blocks(Linear, recipe)()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 1, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(rows, 1, 6, generator=generator, dtype=torch.float64)
    output, _ = linear(x)
    (output * upstream).sum().backward()
    found = [output, x.grad, linear.weight.grad, linear.bias.grad]
    weight = linear.weight.detach().clone().requires_grad_()
    bias, plain = linear.bias.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = F.linear(plain, weight, bias)
    (expected * upstream).sum().backward()
    for one, other in zip(found, [expected, plain.grad, weight.grad, bias.grad], strict=True):
        # Sums over rows may be taken in another order.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("layers", "recipe", "version", "capability", "message"),
    [
        ("local", "tensorwise", True, (9, 0), "needs CUDA and Transformer Engine .*; set model.fp8=null"),
        ("te", "tensorwise", False, (9, 0), "needs Transformer Engine 2.2.0 or later; update it"),
        (
            "te",
            "tensorwise",
            True,
            (8, 6),
            "needs compute capability 8.9, and this GPU has 8.6; set model.fp8=",
        ),
        ("te", "mxfp8", True, (9, 0), "capability 10.0, .* has 9.0; set model.fp8_recipe=tensorwise"),
        ("te", "mxfp8", True, (8, 0), "capability 10.0, .* has 8.0; set model.fp8=null"),
    ],
)
def test_refused_where_a_machine_lacks_it(
    monkeypatch: pytest.MonkeyPatch,
    layers: str,
    recipe: str,
    version: bool,
    capability: tuple[int, int],
    message: str,
) -> None:
    monkeypatch.setattr("esm2mega.model.kernels.fp8.is_te_min_version", lambda wanted: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=message):
        check_fp8(replace(SHAPE, fp8="hybrid", fp8_recipe=recipe), layers, CUDA)
    check_fp8(SHAPE, layers, CUDA)


@pytest.mark.parametrize(("recipe", "capability"), [("tensorwise", (8, 9)), ("mxfp8", (10, 0))])
def test_accepted_where_a_machine_has_it(
    monkeypatch: pytest.MonkeyPatch, recipe: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr("esm2mega.model.kernels.fp8.is_te_min_version", lambda wanted: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_fp8(replace(SHAPE, fp8="e4m3", fp8_recipe=recipe), "te", CUDA)
