"""Devices, and bf16 that is computed; a GPU is played by stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from esm2mega import processor
from esm2mega.doctor import devices
from esm2mega.doctor.devices import bf16_defect, check_cpu, check_devices
from esm2mega.doctor.finding import FAILED, MISSING, OK, WARNING

CPU = torch.device("cpu")


def test_the_cpu_has_cores():
    assert str(check_cpu()).startswith("ok       cpu: ")


def test_bf16_is_computed_here():
    assert bf16_defect(CPU) is None


def test_a_wrong_product_is_noticed(monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        return right(a, b) * (1.1 if a.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    defect = bf16_defect(CPU)
    assert defect is not None and defect.startswith("a product is off by 1")


@pytest.fixture
def refused(monkeypatch):
    """A device whose products fail."""

    def refuse(a, b):
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)


def test_a_device_that_cannot_multiply_fails(refused):
    assert bf16_defect(CPU) == "no kernel image is available"
    finding = next(check_devices())
    assert finding.state == FAILED
    assert finding.what == "bf16 on cpu: no kernel image is available"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("flags : fpu avx512_bf16 amx_bf16", "with amx_bf16, avx512_bf16"),
        ("flags : fpu", "without instructions"),
    ],
)
def test_instructions_of_the_cpu_are_named(tmp_path, monkeypatch, flags, text):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    finding = next(check_devices())
    assert finding.state == OK and text in finding.what


@pytest.mark.parametrize(
    ("capability", "defect", "state", "text"),
    [
        ((9, 0), None, OK, "bf16 on cuda:0: computed"),
        ((7, 5), None, WARNING, "compute capability 8.0 is the first with bf16"),
        ((9, 0), "out of memory", FAILED, "bf16 on cuda:0: out of memory"),
    ],
)
def test_each_cuda_device_is_tried(monkeypatch, capability, defect, state, text):
    properties = SimpleNamespace(
        name="Card", total_memory=80 * 2**30, major=capability[0], minor=capability[1]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(devices, "bf16_defect", lambda device: defect if device.type == "cuda" else None)
    _, card, bf16, *fp32 = check_devices()
    assert card.what == f"cuda:0: Card, 80 GiB, compute capability {capability[0]}.{capability[1]}"
    assert bf16.state == state and text in bf16.what
    # A card that can round to TF32 is said not to.
    words = "fp32 on cuda:0: without TF32; TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 turns it on"
    assert [line.what for line in fp32] == [words] * (capability >= (8, 0))


def test_no_cuda_device_is_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, cuda = check_devices()
    assert cuda.state == MISSING
