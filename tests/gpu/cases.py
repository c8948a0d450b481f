"""What the tests of this folder run on: devices with precisions and kernels, and a batch of training."""

from __future__ import annotations

import pytest
import torch

from esm2mega.batch import PackedBatch
from tests.parity import references

KERNELS = [
    ("cpu", "fp32", "sdpa"),
    ("cpu", "bf16", "sdpa"),
    ("cuda", "fp32", "sdpa"),
    ("cuda", "bf16", "sdpa"),
    ("cuda", "bf16", "varlen"),
]

all_kernels = pytest.mark.parametrize(
    ("ranks", "precision", "attention"),
    [
        pytest.param(*kernel, id="-".join(kernel), marks=[pytest.mark.gpu] if kernel[0] == "cuda" else [])
        for kernel in KERNELS
    ],
    indirect=["ranks"],
)
"""Parametrises by (device, precision, attention); what needs CUDA has the marker `gpu`."""


def packed_batch() -> PackedBatch:
    """The batch of the parity tests as training has it."""
    batch = references.batch()
    keep = batch.attention_mask.bool()
    lengths = batch.attention_mask.sum(1).tolist()
    labels = batch.labels[keep]
    positions = (labels != -100).nonzero().flatten()
    return PackedBatch(
        input_ids=batch.input_ids[keep],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        seqlens=lengths,
        max_seqlen=max(lengths),
        label_positions=positions,
        labels=labels[positions],
        label_counts=(batch.labels != -100).sum(1).tolist(),
        num_tokens=sum(lengths),
        num_residues=sum(lengths) - 2 * len(lengths),
        num_sequences=len(lengths),
    )
