"""Describes what an output holds in every format: an entry per protein, in input order, and arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.store.token_store import TokenStore
from esm2mega.infer.arrays import ArraySpec

Array = npt.NDArray[Any]

Write = tuple[str, int, Array]
"""Names an array, the first row to write, and the rows."""


@dataclass(frozen=True)
class Contents(ABC):
    """Describes an output that holds values of proteins, which are computed in pieces.

    Attributes:
        store: The proteins.
        attributes: Plain values that decide the content: hashes, versions, settings.
    """

    store: TokenStore
    attributes: dict[str, Any]

    smaller = ""
    """Tells the user in a message how to make the output smaller; empty if there is no way."""

    def __len__(self) -> int:
        return len(self.store)

    @property
    @abstractmethod
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of residues of each protein in the output, ``[n]``."""

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Return the first row of each protein in arrays of residues, and the number of rows, ``[n + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def contact_offsets(self) -> npt.NDArray[np.int64]:
        """Return the first element of each protein's flattened contact map, and their number, ``[n + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths**2)])

    @property
    @abstractmethod
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Return whether each protein lost residues, ``[n]``."""

    @property
    @abstractmethod
    def tables(self) -> Mapping[str, Array]:
        """Return the small arrays that are known before anything is computed, by name."""

    @property
    @abstractmethod
    def specs(self) -> dict[str, ArraySpec]:
        """Return shape and dtype of the large arrays, by name."""

    @property
    def file_attributes(self) -> Mapping[str, Any]:
        """Return the attributes of an HDF5 file besides `attributes`."""
        return {}

    @property
    @abstractmethod
    def num_pieces(self) -> int:
        """Return the number of pieces of work; processes share them out, and a kill spares finished ones."""

    @abstractmethod
    def amount(self, piece: int) -> int:
        """Return the number of proteins, or of packs, in a piece, for the progress bar."""

    def ids(self, first: int = 0, stop: int | None = None) -> Iterator[str]:
        """Yield the ids from `first` to `stop`, exclusive, in input order, repeats included."""
        return (self.store.id(i) for i in range(first, len(self) if stop is None else stop))
