"""Looks at weights as they are converted: values that are not finite are kept and told, none becomes so."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from esm2mega.checkpoint.finite import FiniteCheck
from esm2mega.convert.lazy_weights import Weights, dtype_name
from esm2mega.errors import UserError


def counted(weights: Weights) -> tuple[Weights, FiniteCheck]:
    """Return the same weights, and the count of values that are not finite, which grows as they are read."""
    finite, read = FiniteCheck(), weights.read
    return replace(weights, read=lambda name: finite.add(name, read(name))), finite


def cast_and_counted(weights: Weights, dtype: torch.dtype) -> tuple[Weights, FiniteCheck]:
    """Cast weights as `Weights.cast` does, and count the values of the source that are not finite.

    Reading a tensor raises `UserError` if a finite value is beyond the range of the new dtype.
    """
    source, finite = counted(weights)
    result = source.cast(dtype)

    def read(name: str) -> Tensor:
        value = result.read(name)
        if not bool(value.isfinite().all()) and name not in finite.names:
            raise UserError(
                f"{name}: has values beyond {torch.finfo(dtype).max:g}, the largest of {dtype_name(dtype)}; "
                "give --dtype bf16 or fp32"
            )
        return value

    return (replace(result, read=read) if result is not source else source), finite


def note_not_finite(weights: Weights, finite: FiniteCheck) -> None:
    """Note the values that are not finite, if there are any, for the report on what was written."""
    if finite:
        weights.notes.kept.append(finite.words())
