"""Describes what an output holds, in every format: an entry per protein, in input order, and arrays."""

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
"""Name of an array, first row, and rows."""


@dataclass(frozen=True)
class Contents(ABC):
    """An output holds values of proteins, which are computed in pieces.

    Attributes:
        store: The proteins.
        attributes: Plain values that decide the content: hashes, versions, settings.
    """

    store: TokenStore
    attributes: dict[str, Any]

    smaller = ""
    """How the user makes an output smaller, for a message; empty if there is no way."""

    def __len__(self) -> int:
        return len(self.store)

    @property
    @abstractmethod
    def lengths(self) -> npt.NDArray[np.int64]:
        """Residues of each protein in the output, ``[n]``."""

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """First row of each protein in arrays of residues, and their total, ``[n + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def contact_offsets(self) -> npt.NDArray[np.int64]:
        """The same for the flattened contact maps of L x L elements."""
        return np.concatenate([[0], np.cumsum(self.lengths**2)])

    @property
    @abstractmethod
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Which proteins lost residues, ``[n]``."""

    @property
    @abstractmethod
    def tables(self) -> Mapping[str, Array]:
        """Small arrays that are known before anything is computed."""

    @property
    @abstractmethod
    def specs(self) -> dict[str, ArraySpec]:
        """The large arrays."""

    @property
    def file_attributes(self) -> Mapping[str, Any]:
        """What an HDF5 file says besides `attributes`."""
        return {}

    @property
    @abstractmethod
    def num_pieces(self) -> int:
        """Pieces of work, which are what processes share out, and what a kill costs each of them."""

    @abstractmethod
    def amount(self, piece: int) -> int:
        """Return how many proteins, or packs, a piece has, for the progress bar."""

    def ids(self, first: int = 0, stop: int | None = None) -> Iterator[str]:
        """Ids in input order, repeats included."""
        return (self.store.id(i) for i in range(first, len(self) if stop is None else stop))
