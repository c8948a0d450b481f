"""Describes hidden states, logits and contacts as arrays of an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esm2mega.config.infer import absolute_layers
from esm2mega.config.presets import shape_of
from esm2mega.config.schema import InferConfig, ModelConfig
from esm2mega.errors import UserError
from esm2mega.infer.arrays import ArraySpec
from esm2mega.infer.contents import Array, Contents, Write
from esm2mega.infer.maps import row_blocks
from esm2mega.infer.proteins import Lengths, Values
from esm2mega.model.build import DTYPES
from esm2mega.model.esm2 import VOCAB_SIZE

STORED = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "fp64": "float64"}
"""Maps each `infer.dtype` to a numpy dtype; numpy and HDF5 have no bfloat16, so its bits are stored."""

MOST_PIECE_TOKENS, LEAST_PIECE_TOKENS = 1 << 16, 1 << 12
"""Bound the tokens of a piece of the input."""

_PIECES = 64


@dataclass(frozen=True)
class Embeddings(Contents):
    """Describes hidden states, logits and contacts as contents of an output.

    Attributes:
        infer: Outputs that are stored, and their dtype.
        model: Shape of the model.
        limits: Treatment of long proteins.
    """

    infer: InferConfig
    model: ModelConfig
    limits: Lengths

    smaller = "store less (--include pooled, --dtype fp16) or "

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of residues of each protein in the output, ``[n]``."""
        return self.limits.kept(self.store.lengths)

    @cached_property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Return whether each protein lost residues, ``[n]``."""
        return self.lengths < self.store.lengths

    @cached_property
    def num_windows(self) -> npt.NDArray[np.int32]:
        """Return the number of overlapping windows that each protein is the mean of, ``[n]``."""
        return self.limits.counts(self.store.lengths)

    @cached_property
    def columns(self) -> dict[str, Array]:
        """Return the small arrays with one value per protein, by name."""
        return {
            "lengths": self.lengths.astype(np.int32),
            "original_lengths": self.store.lengths,
            "truncated": self.truncated,
            "num_windows": self.num_windows,
        }

    @property
    def tables(self) -> Mapping[str, Array]:
        tables = {**self.columns, "offsets": self.offsets}
        return tables | ({"contact_offsets": self.contact_offsets} if "contacts" in self.specs else {})

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """Return shape and dtype of the large arrays, by name."""
        outputs, hidden = self.infer.outputs, shape_of(self.model).hidden_size
        stored, total, count = STORED[self.infer.dtype], int(self.offsets[-1]), len(self)
        specs = {}
        for layer in absolute_layers(self.infer, self.model):
            if "residue" in outputs:
                specs[f"residue/layer_{layer}"] = ArraySpec((total, hidden), stored)
            if "pooled" in outputs:
                specs[f"pooled/layer_{layer}"] = ArraySpec((count, hidden), stored)
        if "logits" in outputs:
            specs["logits"] = ArraySpec((total, VOCAB_SIZE), stored)
        if "contacts" in outputs:
            specs["contacts"] = ArraySpec((int(self.contact_offsets[-1]),), stored)
        return specs

    @cached_property
    def _piece_numbers(self) -> npt.NDArray[np.int64]:
        """Return the piece of each protein, ascending, ``[n]``; it depends on the lengths alone."""
        tokens = self.lengths + 2
        size = min(max(int(tokens.sum()) // _PIECES, LEAST_PIECE_TOKENS), MOST_PIECE_TOKENS)
        return (np.cumsum(tokens) - tokens) // size

    @property
    def num_pieces(self) -> int:
        return int(self._piece_numbers[-1]) + 1

    def proteins(self, piece: int) -> range:
        """Return the proteins of a piece; there may be none, where one protein fills several pieces."""
        first, stop = np.searchsorted(self._piece_numbers, [piece, piece + 1])
        return range(int(first), int(stop))

    def amount(self, piece: int) -> int:
        return len(self.proteins(piece))

    def rows(self, name: str, number: int) -> slice:
        """Return which rows of array `name` belong to protein `number`."""
        if name.startswith("pooled/"):
            return slice(number, number + 1)
        offsets = self.contact_offsets if name == "contacts" else self.offsets
        return slice(int(offsets[number]), int(offsets[number + 1]))

    def stored(self, number: int, values: Values) -> Iterator[Write]:
        """Yield all rows of a protein in the dtype of the output.

        Raises:
            UserError: A value is beyond the range of the dtype.
        """
        dtype = self.infer.dtype
        for name, value in values.items():
            start = self.rows(name, number).start
            for first, block in row_blocks(value):
                row = block.reshape(1, -1) if name.startswith("pooled/") else block
                row = row.flatten() if name == "contacts" else row
                row = row.to(DTYPES[dtype])
                if bool(row.isinf().any()):
                    raise self._overflow(number, name)
                before = first * value.shape[1] if name == "contacts" else first
                yield name, start + before, to_numpy(row, dtype)

    def _overflow(self, number: int, name: str) -> UserError:
        dtype = self.infer.dtype
        cure = {"fp16": "set --dtype bf16 or fp32", "bf16": "set --dtype fp32"}
        return UserError(
            f"{self.store.id(number)}: {name} has values beyond {torch.finfo(DTYPES[dtype]).max:g}, "
            f"the largest of {dtype}; {cure.get(dtype, 'train with a smaller optim.lr')}"
        )


def to_numpy(values: Tensor, dtype: str) -> Array:
    """Round values to `infer.dtype`, and return them as the numpy dtype of `STORED`."""
    rounded = values.to(DTYPES[dtype]).cpu()
    return (rounded.view(torch.uint16) if dtype == "bf16" else rounded).numpy()


def to_tensor(values: Array, dtype: str) -> Tensor:
    """Invert `to_numpy`, and return a copy."""
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if dtype == "bf16" else tensor
