"""Attention within each sequence against plain softmax attention, and the choice of a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm2mega.errors import UserError
from esm2mega.model import attention
from esm2mega.model.attention import choose_kernel, sdpa
from esm2mega.model.packed import PackedSequences

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [1, 7, 4]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for each segment and head, written out."""
    outputs = torch.zeros_like(q)
    start = 0
    for length in LENGTHS:
        for head in range(q.shape[1]):
            rows = slice(start, start + length)
            scores = q[rows, head] @ k[rows, head].T * scale
            outputs[rows, head] = scores.softmax(dim=-1) @ v[rows, head]
        start += length
    return outputs


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (sum(LENGTHS), 2, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scale", [6**-0.5, 1.7])
def test_sdpa_equals_plain_attention(scale: float) -> None:
    results = []
    for kernel in (
        lambda *x: sdpa(*x, PackedSequences.from_lengths(LENGTHS), scale),
        lambda *x: _plain(*x, scale),
    ):
        inputs = _inputs()
        out = kernel(*inputs)
        (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() <= 1e-12 * reference.abs().max()


def test_sdpa_at_rows_equals_plain_attention_there() -> None:
    rows = torch.tensor([1, 2, 6, 9])  # none of the first sequence
    packed = PackedSequences.from_lengths([*LENGTHS, 2], row_counts=[0, 3, 1, 0]).with_rows(rows).at_rows()
    results = []
    for kernel in (
        lambda q, k, v: sdpa(q[rows], *(torch.cat([x, x[:2]]) for x in (k, v)), packed, 0.5),
        lambda q, k, v: _plain(q, k, v, 0.5)[rows],
    ):
        inputs = _inputs()
        out = kernel(*inputs)
        (out * torch.arange(out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() <= 1e-12 * reference.abs().max()


def test_sequences_do_not_see_each_other() -> None:
    q, k, v = (x.detach() for x in _inputs())
    packed = PackedSequences.from_lengths(LENGTHS)
    before = sdpa(q, k, v, packed, 0.5)
    k[1:8] += 1.0
    v[1:8] *= 2.0
    after = sdpa(q, k, v, packed, 0.5)
    assert torch.equal(before[:1], after[:1])
    assert torch.equal(before[8:], after[8:])
    assert not torch.equal(before[1:8], after[1:8])


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which packages are found: fill the set."""
    found: set[str] = set()
    monkeypatch.setattr(
        attention, "kernel_defect", lambda name: None if attention.FUSED[name][0] in found else "absent"
    )
    monkeypatch.setattr(attention.native, "defect", lambda: None if "native" in found else "no C++ compiler")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return found


VARLEN, FLASH = "torch.nn.attention.varlen", "flash_attn"


@pytest.mark.parametrize(
    ("found", "device", "dtype", "expected"),
    [
        ({VARLEN, FLASH}, CUDA, torch.bfloat16, "flash"),
        ({VARLEN}, CUDA, torch.bfloat16, "varlen"),
        ({VARLEN}, CUDA, torch.float16, "varlen"),
        (set(), CUDA, torch.bfloat16, "sdpa"),
        ({VARLEN, FLASH}, CUDA, torch.float32, "sdpa"),
        ({VARLEN, FLASH}, CPU, torch.bfloat16, "sdpa"),
        ({"native"}, CPU, torch.bfloat16, "native"),
        ({"native"}, CPU, torch.float32, "native"),
        ({"native"}, CPU, torch.float64, "sdpa"),
        ({"native"}, CPU, torch.float16, "sdpa"),
        ({"native"}, CUDA, torch.float32, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_runs(
    packages: set[str], found: set[str], device: torch.device, dtype: torch.dtype, expected: str
) -> None:
    packages |= found
    assert choose_kernel("auto", device, dtype, 64) == expected


@pytest.mark.parametrize(
    ("head_dim", "capability", "expected"),
    [(24, (9, 0), "flash"), (12, (9, 0), "sdpa"), (264, (9, 0), "sdpa"), (64, (7, 5), "sdpa")],
)
def test_auto_knows_what_the_fused_kernels_take(
    packages: set[str],
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    capability: tuple[int, int],
    expected: str,
) -> None:
    packages |= {VARLEN, FLASH}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_kernel("auto", CUDA, torch.bfloat16, head_dim) == expected


@pytest.mark.parametrize("name", ["sdpa", "varlen", "flash"])
def test_a_named_kernel_is_taken(packages: set[str], name: str) -> None:
    packages |= {VARLEN, FLASH}
    assert choose_kernel(name, CUDA, torch.bfloat16, 64) == name


@pytest.mark.parametrize("name", ["varlen", "flash"])
@pytest.mark.parametrize(
    ("found", "device", "dtype"),
    [
        ({VARLEN, FLASH}, CPU, torch.bfloat16),
        ({VARLEN, FLASH}, CUDA, torch.float32),
        (set(), CUDA, torch.bfloat16),
    ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(
    packages: set[str], found: set[str], device: torch.device, dtype: torch.dtype, name: str
) -> None:
    packages |= found
    with pytest.raises(UserError) as error:
        choose_kernel(name, device, dtype, 64)
    message = str(error.value)
    assert f"model.attention_backend={name}" in message
    assert device.type in message
    assert "model.attention_backend=auto" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("found", "device", "dtype", "head_dim", "reason"),
    [
        (set(), CPU, torch.float32, 64, "no C++ compiler: set"),
        ({"native"}, CPU, torch.float64, 64, "torch.float64"),
        ({"native"}, CPU, torch.float32, 12, "head dimension 12"),
        ({"native"}, CUDA, torch.float32, 64, "this is cuda"),
    ],
)
def test_native_attention_that_cannot_run_is_an_error(
    packages: set[str], found: set[str], device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    packages |= found
    with pytest.raises(UserError) as error:
        choose_kernel("native", device, dtype, head_dim)
    message = str(error.value)
    assert reason in message and "set model.attention_backend=auto" in message
    assert "\n" not in message


def test_the_varlen_kernel_of_this_torch_can_be_called() -> None:
    assert attention.kernel_defect("varlen") is None


@pytest.mark.parametrize(
    ("code", "defect"),
    [
        (None, "no module flash_attn"),
        ("", "module flash_attn has no flash_attn_varlen_func"),
        ("import no_such_part", "no module no_such_part"),
        ("raise OSError('undefined symbol')", "module flash_attn cannot be imported (undefined symbol)"),
        (
            "def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k): pass",
            "flash_attn_varlen_func of flash_attn takes other arguments "
            "(got an unexpected keyword argument 'softmax_scale')",
        ),
        (
            "def flash_attn_varlen_func(q, k, v, *, softmax_scale=None): pass",
            "flash_attn_varlen_func of flash_attn takes other arguments (too many positional arguments)",
        ),
        ("def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None): pass", None),
    ],
)
def test_a_kernel_is_found_only_if_it_can_be_called(
    code: str | None, defect: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is not None:
        (tmp_path / "flash_attn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert attention.kernel_defect("flash") == defect
    sys.modules.pop("flash_attn", None)
