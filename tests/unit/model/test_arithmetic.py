"""What a run says of its arithmetic; a GPU is played by a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from esm2mega.model.arithmetic import arithmetic, describe_computing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(precision: str = "fp32", layer_spec: str = "local") -> SimpleNamespace:
    dtype = DTYPES[precision]
    return SimpleNamespace(params_dtype=dtype, layer_spec=layer_spec, packed_attention="sdpa", fp8=None)


@pytest.fixture
def matmul(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("products", "override", "layers", "expected"),
    [
        ("highest", None, "local", "fp32 without TF32"),
        ("high", None, "local", "fp32 with TF32"),
        # Whatever PyTorch is told.
        ("highest", None, "te", "fp32 with TF32 in the linears of Transformer Engine"),
        ("high", "0", "te", "fp32 without TF32"),
    ],
)
def test_fp32_of_a_gpu_says_whether_it_is_tf32(
    matmul: pytest.MonkeyPatch, products: str, override: str | None, layers: str, expected: str
) -> None:
    matmul.setattr(torch, "get_float32_matmul_precision", lambda: products)
    if override is not None:
        matmul.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert arithmetic(config(layer_spec=layers), CUDA) == expected


def test_where_there_is_no_tf32_nothing_is_said_of_it(matmul: pytest.MonkeyPatch) -> None:
    assert arithmetic(config(), CPU) == "fp32"
    assert arithmetic(config("bf16"), CUDA) == "bf16"
    matmul.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert arithmetic(config(), CUDA) == "fp32"


def test_inference_says_how_it_computed_and_what_is_faster(matmul: pytest.MonkeyPatch) -> None:
    asked = describe_computing(config("bf16"), CUDA, "fp32")
    assert asked == "computed in bf16 on cuda, attention sdpa; the checkpoint is in fp32"
    assert describe_computing(config(), CUDA, "fp32") == (
        "computed in fp32 without TF32 on cuda, attention sdpa; infer.precision=bf16 is faster on this device"
    )
    assert describe_computing(config(), CPU, "fp32") == "computed in fp32 on cpu, attention sdpa"
