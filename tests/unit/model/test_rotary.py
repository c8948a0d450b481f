"""Rotary embedding against the formula written out, forward and backward.

Legend: ``T`` tokens, ``n`` heads, ``d`` head dimension.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.model import rotary
from esm2mega.model.build import build_model, transformer_config
from esm2mega.model.kernels import native, native_rotary
from esm2mega.model.packed import PackedSequences
from esm2mega.model.rotary import RotaryTables, best_turn, split_and_rotate, turn

D = 6
PACKED = PackedSequences.from_lengths([3, 1, 1000])
CPU = torch.device("cpu")


def _tables(precision: str) -> RotaryTables:
    shape = ModelConfig(
        num_layers=1, hidden_size=2 * D, ffn_hidden_size=8, num_attention_heads=2, precision=precision
    )
    return RotaryTables(transformer_config(shape, ParallelConfig(), CPU, "sdpa"), CPU)


def _angles(dtype: torch.dtype = torch.float64) -> Tensor:
    """p / 10000^(2i/d) for the positions of `PACKED`: ``[T, d / 2]``."""
    positions = torch.cat([torch.arange(n, dtype=dtype) for n in PACKED.seqlens])
    frequencies = torch.tensor([10000.0 ** (-2 * i / D) for i in range(D // 2)], dtype=dtype)
    return positions[:, None] * frequencies


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pair (i, i + d/2) turned by its angle: ``x [T, n, d]``, cos and sin ``[T, 1, d / 2]``."""
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _qkv(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(PACKED.num_tokens, 2, 3, D, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-12), ("fp32", 1e-4), ("bf16", 1e-4)])
def test_tables_are_cos_and_sin_of_position_times_frequency(precision: str, bound: float) -> None:
    """fp32: an angle of up to 1000 radians has a rounding error of up to 6e-5."""
    tables = _tables(precision)(PACKED)
    assert tables.shape == (2, 1004, 1, D // 2)
    assert tables.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    expected = torch.stack((_angles().cos(), _angles().sin())).unsqueeze(2)
    assert (tables.double() - expected).abs().max() < bound


def test_forward_equals_the_formula() -> None:
    qkv = _qkv(torch.float64)
    q, k, v = split_and_rotate(qkv, _tables("fp64")(PACKED))
    cos, sin = _angles().cos()[:, None], _angles().sin()[:, None]
    assert (q - _rotated(qkv[:, :, 0], cos, sin)).abs().max() < 1e-12
    assert (k - _rotated(qkv[:, :, 1], cos, sin)).abs().max() < 1e-12
    assert torch.equal(v, qkv[:, :, 2])
    assert all(x.is_contiguous() for x in (q, k, v))


def test_first_token_of_each_sequence_is_not_rotated() -> None:
    qkv = _qkv(torch.float64)
    q, _, _ = split_and_rotate(qkv, _tables("fp64")(PACKED))
    assert torch.equal(q[[0, 3, 4]], qkv[[0, 3, 4], :, 0])
    assert not torch.equal(q[1], qkv[1, :, 0])


def test_backward_equals_autograd_of_the_formula() -> None:
    ours, reference = _qkv(torch.float64).requires_grad_(), _qkv(torch.float64).requires_grad_()
    cos, sin = _angles().cos()[:, None], _angles().sin()[:, None]
    theirs = (
        _rotated(reference[:, :, 0], cos, sin),
        _rotated(reference[:, :, 1], cos, sin),
        reference[:, :, 2],
    )
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(theirs[0].shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    for leaf, outputs in ((ours, split_and_rotate(ours, _tables("fp64")(PACKED))), (reference, theirs)):
        torch.autograd.backward(outputs, weights)
        assert leaf.grad is not None
    assert (ours.grad - reference.grad).abs().max() < 1e-12


def test_backward_passes_gradcheck() -> None:
    packed = PackedSequences.from_lengths([2, 3])
    tables = _tables("fp64")(packed)
    qkv = _qkv(torch.float64)[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, tables), (qkv,))


def test_bf16_is_rounded_once() -> None:
    """Computed in fp32: the one rounding, at the end, is at most 2^-8 of the result, whatever cancels."""
    qkv, tables = _qkv(torch.bfloat16), _tables("bf16")(PACKED)
    qkv.requires_grad_()
    outputs = split_and_rotate(qkv, tables)
    weight = _qkv(torch.bfloat16)[:, :, 1]
    outputs[0].backward(weight)
    assert [x.dtype for x in outputs] == [torch.bfloat16] * 3
    cos, sin = tables.double()
    for number in (0, 1):
        exact = _rotated(qkv[:, :, number].detach().double(), cos, sin)
        assert ((outputs[number].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    exact = _rotated(weight.double(), cos, -sin)
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.bfloat16
    assert ((qkv.grad[:, :, 0].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_frequencies_do_not_follow_a_cast(world: None) -> None:
    """Rounded frequencies would turn distant residues by wrong angles."""
    shape = ModelConfig(
        num_layers=1,
        hidden_size=2 * D,
        ffn_hidden_size=8,
        num_attention_heads=2,
        precision="fp32",
        layer_spec="local",
    )
    (model,) = build_model(shape, ParallelConfig(), CPU, seed=1)
    before = model.rotary.inv_freq.clone()
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.float64)):
        cast()
        assert model.rotary.inv_freq.dtype == torch.float32
        assert torch.equal(model.rotary.inv_freq, before)
    assert model.lm_head.dense.weight.dtype == torch.float64


def test_frequencies_are_saved_and_loaded() -> None:
    """Published weights bring frequencies of their own."""
    source, target = _tables("fp32"), _tables("fp32")
    with torch.no_grad():
        source.inv_freq.mul_(1.5)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.inv_freq, source.inv_freq)
    assert list(source.state_dict()) == ["inv_freq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_bit_is_that_of_the_products_with_cos_plus_those_with_sin(dtype: torch.dtype) -> None:
    """In that order, and in the dtype of the tables: fewer passes must not change a number."""
    tables = _tables({torch.float64: "fp64"}.get(dtype, "fp32"))(PACKED)
    qkv = _qkv(dtype).requires_grad_()
    outputs = split_and_rotate(qkv, tables)
    weights = _qkv(dtype).flip(0).unbind(dim=2)
    torch.autograd.backward(outputs, weights)
    assert qkv.grad is not None
    for number in (0, 1):
        for x, actual, sign in (
            (qkv.detach()[:, :, number], outputs[number], 1),
            (weights[number], qkv.grad[:, :, number], -1),
        ):
            (cos, sin), (first, second) = tables, x.to(tables.dtype).chunk(2, dim=-1)
            left = torch.addcmul(first * cos, second, sin * sign, value=-1)
            right = torch.addcmul(second * cos, first, sin * sign)
            assert torch.equal(actual, torch.cat((left, right), dim=-1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_computes_the_formula(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In Triton's interpreter, which cuts numbers off to bf16 where a GPU rounds them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="no Triton")
    from esm2mega.model.kernels.triton_rotary import turn as kernel

    generator = torch.Generator().manual_seed(4)
    wide = torch.promote_types(dtype, torch.float32)
    # Numbers of heads and channels that are no powers of two, and more heads than a program takes.
    for tokens, heads, channels in ((7, 3, 6), (2, 33, 128)):
        tables = torch.randn(2, tokens, 1, channels // 2, generator=generator, dtype=wide)
        parts = torch.randn(3, tokens, heads, channels, generator=generator, dtype=wide).to(dtype)
        apart = parts.transpose(0, 1).reshape(tokens, 3, heads, channels).transpose(1, 2).unbind(dim=2)
        other = parts.transpose(2, 3).contiguous().transpose(2, 3)
        for sources, back in ((apart, False), (parts, True), (other, True)):
            targets = torch.empty(tokens, heads, 3, channels, dtype=dtype).unbind(dim=2)
            kernel(sources, targets, tables, back)
            cos, sin = tables[0], -tables[1] if back else tables[1]
            for x, actual in zip(parts[:2], targets[:2], strict=True):
                first, second = x.to(wide).chunk(2, dim=-1)
                exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
                if dtype == torch.bfloat16:
                    exact = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
                assert torch.equal(actual, exact.to(dtype))
            assert torch.equal(targets[2], parts[2])


@pytest.mark.parametrize("dim", [6, 16, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_compiled_turn_has_the_bits_of_pytorchs(dtype: torch.dtype, dim: int) -> None:
    """Forward from a part of the projection, backward from gradients that are expanded or transposed."""
    if (defect := native.defect()) is not None:
        pytest.skip(defect)
    generator = torch.Generator().manual_seed(dim)
    wide = torch.promote_types(dtype, torch.float32)
    tables = torch.randn(2, 37, 1, dim // 2, generator=generator, dtype=wide)
    qkv = torch.randn(37, 3, 3, dim, generator=generator, dtype=wide).to(dtype).unbind(dim=2)
    grads = (qkv[0][:1].expand(37, 3, dim), qkv[1].transpose(0, 1).contiguous().transpose(0, 1), qkv[2])
    for sources, back in ((qkv, False), (grads, True)):
        ours, theirs = torch.zeros(2, 37, 3, 3, dim, dtype=dtype)
        native_rotary.turn(sources, ours.unbind(dim=2), tables, back)
        turn(sources, theirs.unbind(dim=2), tables, back)
        assert torch.equal(ours, theirs)


def test_the_processor_has_the_compiled_turn() -> None:
    if (defect := native.defect()) is not None:
        pytest.skip(defect)
    assert best_turn(CPU, torch.float32) is native_rotary.turn
    assert best_turn(CPU, torch.float16) is turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_is_off_is_found(dtype: torch.dtype) -> None:
    def other_way(sources: Any, targets: Any, tables: Tensor, back: bool = False) -> None:
        turn(sources, targets, tables, not back)

    assert rotary._defect(turn, CPU, dtype) is None
    assert (rotary._defect(other_way, CPU, dtype) or "").startswith("it is off by ")


def test_tables_of_another_precision_are_converted() -> None:
    """A model that was cast keeps its tables; the kernel gets pointers, and would read past their end."""
    if (defect := native.defect()) is not None:
        pytest.skip(defect)
    tables = torch.randn(2, 5, 1, 8)
    qkv = torch.randn(5, 3, 3, 16, dtype=torch.float64).unbind(dim=2)
    ours, theirs = torch.zeros(2, 5, 3, 3, 16, dtype=torch.float64)
    native_rotary.turn(qkv, ours.unbind(dim=2), tables)
    turn(qkv, theirs.unbind(dim=2), tables.double())
    assert torch.equal(ours, theirs)
