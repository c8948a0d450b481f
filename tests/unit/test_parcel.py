"""Tensors in one buffer."""

from __future__ import annotations

import torch

from esm2mega.batch import host_borders
from esm2mega.parcel import Parcel


def test_tensors_come_out_as_they_went_in_from_one_buffer() -> None:
    tensors = [
        torch.arange(5),
        torch.tensor([[0, 2, 5]], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([1, -1, 3], dtype=torch.int8),
        torch.tensor([0.5, float("nan")], dtype=torch.float64),
    ]
    parcel = Parcel.of(tensors)
    out = parcel.to("cpu")
    for tensor, found in zip(tensors, out, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))
        assert found.untyped_storage().data_ptr() == parcel.buffer.untyped_storage().data_ptr()


def test_borders_of_segments_and_labels() -> None:
    assert host_borders([2, 3], [1, 0]).tolist() == [[0, 2, 5], [0, 1, 1]]
    assert host_borders([2, 3]).tolist() == [[0, 2, 5]]
