"""Changes of layout, against literal examples and loops."""

from __future__ import annotations

import torch

from esm2mega.convert import tensors
from esm2mega.model.rotary import rotary_frequencies

HEADS, H = 2, 8


def rows(first: int) -> torch.Tensor:
    """``[8, 1]`` with the numbers of the rows as values."""
    return torch.arange(first, first + H).reshape(H, 1)


def test_fused_rows_are_head_major() -> None:
    q, k, v = rows(0), rows(100), rows(200)
    fused = tensors.fuse_qkv(q, k, v, HEADS)
    literal = [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]
    literal += [4, 5, 6, 7, 104, 105, 106, 107, 204, 205, 206, 207]
    assert fused.flatten().tolist() == literal
    assert [x.tolist() for x in tensors.split_qkv(fused, HEADS)] == [q.tolist(), k.tolist(), v.tolist()]
    assert tensors.fuse_qkv(q[:, 0], k[:, 0], v[:, 0], HEADS).tolist() == literal


def test_interleaved_rows() -> None:
    """Row 2i takes i, row 2i + 1 takes i + d/2, within each head."""
    interleaved = tensors.interleave_rotary(rows(0), HEADS)
    assert interleaved.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(tensors.separate_rotary(interleaved, HEADS), rows(0))


def test_vocabulary_rows() -> None:
    table = torch.randn(33, 3)
    padded = tensors.pad_vocabulary(table, 40)
    assert padded.shape == (40, 3)
    assert not padded[33:].any()
    assert torch.equal(tensors.cut_vocabulary(padded), table)
    bias = tensors.pad_vocabulary(table[:, 0], 128, -1.0)
    assert bias.shape == (128,) and torch.equal(bias[33:], -torch.ones(95))


def test_frequencies_in_words() -> None:
    exact = rotary_frequencies(16, torch.float32)
    assert tensors.frequencies_note(exact, 16) == "the formula in fp32"
    assert tensors.frequencies_note(rotary_frequencies(16, torch.float64), 16) == "the formula in fp64"
    assert tensors.frequencies_note(exact.half().float(), 16) == "the formula rounded to fp16"
    assert tensors.frequencies_note(exact.bfloat16().float(), 16) == "the formula rounded to bf16"
    assert tensors.frequencies_note(exact * 1.01, 16) == "not the formula (up to 1.0e-02 from it)"
