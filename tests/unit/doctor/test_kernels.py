"""A package counts only with its kernels; packages and a GPU are played by stand-ins."""

import sys
import types

import pytest
import torch

from esm2mega.doctor import kernels
from esm2mega.doctor.finding import FAILED, MISSING, OK
from esm2mega.doctor.kernels import (
    check_attention,
    fused_finding,
    native_finding,
    sdpa_finding,
    te_findings,
)
from esm2mega.model import attention
from esm2mega.model.kernels import native

CPU = torch.device("cpu")
HOPPER, TURING = (9, 0), (7, 5)


def wrong(q, k, v, packed, scale):
    """Attention across the borders of the pack."""
    return torch.einsum("nqk,knd->qnd", (torch.einsum("qnd,knd->nqk", q, k) * scale).softmax(-1), v)


def refused(q, k, v, packed, scale):
    raise RuntimeError("no kernel image is available for execution on the device\nmore")


def test_the_attention_of_every_device_is_computed():
    assert sdpa_finding(CPU).state == OK


@pytest.mark.parametrize(
    ("kernel", "text"), [(wrong, "an output is off by"), (refused, "no kernel image is available")]
)
def test_attention_that_computes_something_else_fails(monkeypatch, kernel, text):
    for name in ("sdpa", "native", "varlen"):
        monkeypatch.setitem(attention.KERNELS, name, kernel)
    monkeypatch.setattr(native, "defect", lambda: None)
    for finding in (sdpa_finding(CPU), native_finding(), fused_finding("varlen", "cure", CPU, HOPPER)):
        assert finding.state == FAILED
        assert text in finding.what and "\n" not in finding.what


def test_native_attention_without_a_compiler_is_missing(monkeypatch):
    monkeypatch.setattr(native, "defect", lambda: "no C++ compiler")
    finding = native_finding()
    assert finding.state == MISSING
    assert "no C++ compiler" in finding.what and "install g++" in finding.cure


def test_varlen_needs_a_device_of_compute_capability_8(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "varlen", attention.sdpa)
    assert fused_finding("varlen", "cure", CPU, None).cure == "it needs a CUDA device"
    old = fused_finding("varlen", "cure", CPU, TURING)
    assert old.state == MISSING
    assert old.cure == "it needs compute capability 8.0, and this machine has 7.5"
    assert fused_finding("varlen", "cure", CPU, (8, 0)).state == OK


def test_varlen_without_a_scale_is_missing_and_not_chosen(monkeypatch):
    """As in the first releases of torch that have the function."""
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    finding = fused_finding("varlen", kernels.VARLEN_CURE, CPU, HOPPER)
    assert finding.state == MISSING
    assert "takes other arguments (got an unexpected keyword argument 'scale')" in finding.what
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert attention.choose_kernel("auto", torch.device("cuda"), torch.bfloat16, 64) == "sdpa"


def test_the_weakest_device_of_the_machine_decides(monkeypatch):
    monkeypatch.setattr(kernels, "cuda_device", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [HOPPER, TURING].__getitem__)
    _, varlen, _ = check_attention()
    assert "this machine has 7.5" in varlen.cure


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules that stand in for a package, and forget them at the end."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**files: str) -> None:
        for name, code in files.items():
            path = tmp_path / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)

    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformer_engine":
            del sys.modules[name]


TE = """
import torch
class LayerNormLinear(torch.nn.Linear):
    def __init__(self, inputs, outputs, params_dtype, device):
        super().__init__(inputs, outputs, dtype=params_dtype, device=device)
class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, qkv_format, attn_mask_type):
        super().__init__()
    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        return q * {factor}
"""


@pytest.mark.parametrize(
    ("code", "device", "state", "text"),
    [
        ("", CPU, MISSING, "without its kernels (module 'transformer_engine.pytorch' has no attribute"),
        ("raise ImportError('libcublas.so.12')", CPU, MISSING, "without its kernels (libcublas.so.12)"),
        (TE.format(factor=1), None, MISSING, "found"),
        (TE.format(factor=1), CPU, OK, "computed a layer and attention"),
        (TE.format(factor="float('nan')"), CPU, FAILED, "an output is not finite"),
    ],
)
def test_transformer_engine_is_real_when_it_computes(package, monkeypatch, code, device, state, text):
    package(transformer_engine__pytorch=code)
    monkeypatch.setattr(kernels, "cuda_device", lambda: device)
    (finding,) = te_findings()
    assert finding.state == state, finding
    assert text in finding.what


@pytest.mark.gpu
def test_kernels_compute_on_a_real_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    findings = [*check_attention(), *kernels.check_transformer_engine()]
    assert [finding for finding in findings if finding.state == FAILED] == []


def test_transformer_engine_is_tried_only_if_it_is_there_and_then_apart(monkeypatch, package):
    tried = []
    monkeypatch.setattr(kernels, "run_apart", lambda module, function, *rest: tried.append(function) or [])
    (te,) = kernels.check_transformer_engine()
    assert te.state == MISSING and te.what.endswith("no module transformer_engine")
    package(transformer_engine____init__="")
    assert list(kernels.check_transformer_engine()) == []
    assert tried == ["te_findings"]
