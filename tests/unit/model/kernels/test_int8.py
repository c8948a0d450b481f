"""Linears that multiply in int8: the formula, bits that depend on one token, machines without them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from esm2mega import processor
from esm2mega.errors import MachineError, UserError
from esm2mega.model.kernels import int8
from esm2mega.model.kernels.int8 import GELU_SHIFT, Int8Linear, Int8MLP, check_products


@pytest.fixture
def machine() -> None:
    """Skip a test that multiplies where the processor cannot."""
    try:
        check_products()
    except MachineError as error:
        pytest.skip(str(error))


def linear(inputs: int, outputs: int, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(outputs, inputs, generator=generator)
    return SimpleNamespace(weight=weight, bias=torch.randn(outputs, generator=generator))


def rows_of(count: int, width: int) -> Tensor:
    """Tokens of very different size, as hidden states are."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.logspace(-3, 2, count)[:, None]
    return sizes * torch.randn(count, width, generator=generator)


def by_formula(rows: Tensor, weight: Tensor, bias: Tensor, shift: float | None) -> Tensor:
    """Round to levels and multiply in fp64, which holds all sums of the levels exactly."""
    x, w = rows.double(), weight.double()
    scales = w.abs().amax(1) / 127
    levels = (w / scales[:, None]).round()
    added, count = (0.0, 127) if shift is None else (shift, 255)
    scale = (x + added).abs().amax(1, keepdim=True) / count
    return (
        scale * scales * (((x + added) / scale).round() @ levels.t())
        + bias.double()
        - added * scales * levels.sum(1)
    )


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("shift", [None, GELU_SHIFT])
def test_the_formula_of_the_docstring(shift: float | None) -> None:
    given = linear(96, 72)
    rows = rows_of(40, 96) if shift is None else gelu(rows_of(40, 96))
    found, nothing = Int8Linear(given, shift)(rows[:, None])
    assert nothing is None and found.shape == (40, 1, 72)
    expected = by_formula(rows, given.weight, given.bias, shift)
    # A level that lies half between two may go the other way in fp32, which is one step of one input.
    step = (rows.abs().amax(1) + (shift or 0)) / 127 * given.weight.abs().max()
    assert ((found[:, 0] - expected).abs() <= 1.01 * step[:, None]).all()
    assert ((found[:, 0] - expected).abs() <= 1e-5 * (1 + expected.abs())).double().mean() > 0.95
    exact = rows.double() @ given.weight.double().t() + given.bias.double()
    assert ((found[:, 0] - exact).norm(dim=1) <= 0.02 * exact.norm(dim=1)).all()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_the_same_bits_alone_and_among_others(threads: int) -> None:
    mlp = Int8MLP(Int8Linear(linear(48, 104)), gelu, Int8Linear(linear(104, 48, 1), GELU_SHIFT))
    rows = rows_of(2 * int8.ROWS + 33, 48)[:, None]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together, _ = mlp(rows)
        for start, stop in ((0, 1), (7, 8), (100, 103), (250, 327), (540, 545)):
            alone, _ = mlp(rows[start:stop])
            assert torch.equal(alone, together[start:stop])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("machine")
def test_tokens_of_zeros_and_tokens_that_are_not_finite() -> None:
    given = linear(32, 32)
    rows = torch.zeros(5, 32)
    rows[1, 3], rows[2, 3], rows[3, 3] = torch.nan, torch.inf, -torch.inf
    found = Int8Linear(given)(rows)[0]
    assert torch.equal(found[0], given.bias) and torch.equal(found[4], given.bias)
    assert not found[1:4].isfinite().any()
    found = Int8Linear(given, GELU_SHIFT)(rows[[0, 1, 2]])[0]
    # A shift that is taken off again leaves the rounding of fp32.
    assert torch.allclose(found[0], given.bias, rtol=0, atol=1e-5)
    assert not found[1:].isfinite().any()


@pytest.mark.usefixtures("machine")
def test_weights_that_are_not_finite_are_refused() -> None:
    given = linear(32, 32)
    given.weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Int8Linear(given)


def test_a_processor_without_the_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu avx2 avx512f")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    with pytest.raises(MachineError, match="AVX-512 VNNI.*--precision fp32"):
        check_products()


@pytest.mark.usefixtures("machine")
def test_kernels_that_are_missing_or_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*unused: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_pointwise'")

    def overflowing(activations: Tensor, zero: int, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        # As two products of uint8 and int8 do that are added in 16 bits: 2 * 255 * 127 is above 32,767.
        return torch.full((len(activations), len(scales)), 128.0 * 32767)

    monkeypatch.setattr(int8, "_products", missing)
    with pytest.raises(MachineError, match="qlinear_pointwise.*--precision fp32"):
        check_products()
    monkeypatch.setattr(int8, "_products", overflowing)
    with pytest.raises(MachineError, match="overflow"):
        check_products()
