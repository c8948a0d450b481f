"""Rebuilds the numpy arrays in TAPE's pickles without numpy's own unpickling.

A pickled array is a shape, the name of a type and bytes. Only numbers of fixed size are rebuilt; anything
else stays a placeholder.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from esm2mega.data.readers.tape import RestrictedUnpickler

_NUMBERS = re.compile(r"(b1|[iu][1248]|f[248])")


class _Type:
    """Stands for a `numpy.dtype`, and keeps its name and byte order."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        # The state is (version, byte order, ...); the byte order of single bytes is "|".
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "="):
            self.order = state[1]

    def array(self, data: object, shape: object, order: str) -> Any:
        """Return the numbers; None where they are of another type or do not fill the shape."""
        if not isinstance(self.name, str) or not _NUMBERS.fullmatch(self.name):
            return None
        if isinstance(data, str):
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
            return None
        if not all(type(size) is int and size >= 0 for size in shape):
            return None
        kind = np.dtype(self.order + self.name)
        if len(data) != math.prod(shape) * kind.itemsize:
            return None
        return np.frombuffer(bytes(data), kind).reshape(shape, order="F" if order == "F" else "C")


class PickledArray:
    """Stands for a pickled array; `values` holds its numbers, or None where it holds anything else."""

    def __init__(self, *_: object) -> None:
        self.values: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Type):
            _, shape, kind, is_fortran, data = state
            self.values = kind.array(data, shape, "F" if is_fortran else "C")


def _scalar(kind: object = None, data: object = b"", *_: object) -> PickledArray:
    found = PickledArray()
    found.values = kind.array(data, (), "C") if isinstance(kind, _Type) else None
    return found


def _from_buffer(
    data: object = b"", kind: object = None, shape: object = (), order: object = "C"
) -> PickledArray:
    found = PickledArray()
    found.values = kind.array(data, shape, str(order)) if isinstance(kind, _Type) else None
    return found


class _ArrayUnpickler(RestrictedUnpickler):
    """Builds the classes above where a pickle names those of numpy."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        found = super().find_class(module, name)
        ours: dict[str, Callable[..., object]] = {
            "dtype": _Type,
            "_reconstruct": PickledArray,
            "ndarray": PickledArray,
            "scalar": _scalar,
            "_frombuffer": _from_buffer,
        }
        return ours.get(name, found)


def load_with_arrays(data: bytes) -> Any:
    """Load what a pickle holds, with `PickledArray` in the place of arrays and of numpy's numbers.

    Raises:
        ValueError: The pickle is refused, as by `esm2mega.data.readers.tape.load_restricted`.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # see `load_restricted`
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def numbers_of(value: object) -> Any:
    """Return an array of numbers, whatever it was pickled as; None for anything else."""
    if isinstance(value, PickledArray):
        return value.values
    if isinstance(value, (bool, int, float)):
        return np.asarray(value)
    if isinstance(value, (list, tuple)):
        try:
            found = np.array([numbers_of(entry) for entry in value])
        except ValueError:
            return None
        return found if found.dtype.kind in "biuf" else None
    return None
