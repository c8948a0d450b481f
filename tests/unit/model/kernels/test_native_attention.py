"""Our own attention for CPUs against plain softmax attention in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from esm2mega.model.kernels import native
from esm2mega.model.kernels.native_attention import attend

LENGTHS = (33, 1, 340, 70, 9)
QUERIES = (33, 0, 100, 70, 1)  # as in the last layer: a protein without labels has none


@pytest.fixture(autouse=True)
def compiled() -> None:
    if (defect := native.defect()) is not None:
        pytest.skip(defect)


def borders(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def inputs(
    queries: Sequence[int], heads: int, dim: int, dtype: torch.dtype, factor: float = 1.0
) -> list[Tensor]:
    """Return q, k, v, and the gradient of the output; q and k are parts of a larger tensor."""
    generator = torch.Generator().manual_seed(dim)
    tokens, m = sum(LENGTHS), sum(queries)
    k, v, spare = torch.randn(tokens, heads, 3, dim, generator=generator).to(dtype).unbind(2)
    q, grad = (torch.randn(m, heads, dim, generator=generator) * factor for _ in range(2))
    return [q.to(dtype), k, v, grad.to(dtype)]


def attend_with(both: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, *both, 0.2)


def plain(q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each protein, written out."""
    parts = zip(q.split(list(queries)), k.split(list(LENGTHS)), v.split(list(LENGTHS)), strict=True)
    return torch.cat(
        [
            torch.einsum("nqk,knd->qnd", (torch.einsum("qnd,knd->nqk", a, b) * scale).softmax(-1), c)
            for a, b, c in parts
        ]
    )


def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]


# bf16 has 8 bits: outputs around 1 are rounded by 2^-9, gradients, up to 4, by 2^-7. The kernel itself
# computes in fp32 from the rounded inputs, so the second bound is the rounding of the result alone.
@pytest.mark.parametrize("queries", [LENGTHS, QUERIES], ids=["all", "some"])
@pytest.mark.parametrize(("heads", "dim"), [(5, 16), (3, 24), (2, 40), (1, 128)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"]
)
def test_it_equals_plain_attention_in_fp64(
    queries: Sequence[int], heads: int, dim: int, dtype: torch.dtype, bound: float
) -> None:
    tensors, scale = inputs(queries, heads, dim, dtype), dim**-0.5
    ours = results(lambda q, k, v: attend(q, k, v, borders(queries), borders(LENGTHS), scale), tensors)
    expected = results(lambda q, k, v: plain(q, k, v, queries, scale), [x.double() for x in tensors])
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - reference).abs().max() <= bound


def test_scores_of_hundreds_neither_overflow_nor_vanish() -> None:
    """The softmax is nearly a choice of one key, and exponents lie far below those of fp32."""
    tensors = inputs(LENGTHS, 2, 16, torch.float32, factor=60.0)
    ours = results(lambda q, k, v: attend(q, k, v, borders(LENGTHS), borders(LENGTHS), 1.0), tensors)
    expected = results(lambda q, k, v: plain(q, k, v, LENGTHS, 1.0), [x.double() for x in tensors])
    for mine, reference in zip(ours, expected, strict=True):
        # A score of 1,000 is rounded by 3e-5, and its probability by as much of itself; gradients reach 1e3.
        assert (mine - reference).abs().max() <= 2e-3 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_protein_has_the_same_bits_alone_and_in_a_pack(dtype: torch.dtype) -> None:
    tensors = inputs(LENGTHS, 3, 24, dtype)
    packed = results(partial(attend_with, (borders(LENGTHS),) * 2), tensors)
    one = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for i, length in enumerate(LENGTHS):
            both = (borders([length]),) * 2
            alone = results(partial(attend_with, both), [x.split(LENGTHS)[i] for x in tensors])
            for mine, whole in zip(alone, packed, strict=True):
                assert torch.equal(mine, whole.split(LENGTHS)[i])
    finally:
        torch.set_num_threads(one)


def test_a_value_that_is_not_finite_stays_one() -> None:
    q, k, v, _ = inputs(LENGTHS, 2, 16, torch.float32)
    q[40, 1, 3] = float("nan")
    out = attend(q, k, v, borders(LENGTHS), borders(LENGTHS), 0.25)
    assert out[40, 1].isnan().all()
    assert out[:40].isfinite().all() and out[41:].isfinite().all() and out[40, 0].isfinite().all()


def test_pytorch_finds_it_a_whole_operation() -> None:
    """PyTorch's own check: schema, fake tensors, and gradients under its compiler."""
    q, k, v, _ = inputs(QUERIES, 2, 8, torch.float32)
    arguments = (*(x.requires_grad_() for x in (q, k, v)), borders(QUERIES), borders(LENGTHS), 0.3)
    torch.library.opcheck(torch.ops.esm2mega.native_attention.default, arguments)


def test_a_second_derivative_is_refused() -> None:
    """Instead of a gradient of zero, which a penalty on gradients would train with."""
    q, k, v = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(3))
    borders = torch.tensor([0, 5], dtype=torch.int32)
    (first,) = torch.autograd.grad(attend(q, k, v, borders, borders, 0.3).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; set model.attention_backend=sdpa"):
        first.sum().backward()
