"""Reads embeddings from HDF5 files, of this package or in the layout of BioNeMo 1, by the ids of proteins.

Legend: ``n`` proteins, ``L`` residues of a protein, ``h`` hidden size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from esm2mega.errors import UserError
from esm2mega.infer import hdf5_checksums
from esm2mega.infer.embeddings import to_tensor
from esm2mega.infer.hdf5 import read_attributes

Array = npt.NDArray[Any]

POOLED, RESIDUE = "pooled", "residue"

_OURS = re.compile(rf"({POOLED}|{RESIDUE})/(layer_\d+)")
_ONLY = "embeddings"
"""Names the one layer of files that do not say which it is."""

_DAMAGES = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""Lists what h5py raises for a file that is damaged or has another layout."""


class EmbeddingFile:
    """Holds one open file.

    Attributes:
        path: The file.
        ids: The id of each protein, in the order of the file.
        layers: Names of the layers for each kind, `POOLED` and `RESIDUE`.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, and compare it with its checksums if it has any.

        Raises:
            UserError: It is missing, damaged, or holds no embeddings.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file; give an HDF5 file as `esm2mega embed` writes it")
        self.path = path
        self.layers: dict[str, list[str]] = {POOLED: [], RESIDUE: []}
        try:
            attributes = read_attributes(path)
            hdf5_checksums.verify(path)
            self._file: Any = h5py.File(path)
            self._is_bf16 = attributes.get("dtype") == "bf16"
            if "ids" in self._file:
                self._open_ours()
            else:
                self._open_bionemo()
        except _DAMAGES as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: is not a readable HDF5 file ({reason}); make it again") from error
        if not any(self.layers.values()):
            raise UserError(
                f"{path}: holds no embeddings of proteins; make them with `esm2mega embed --include "
                f"{POOLED},{RESIDUE}`"
            )

    def _open_ours(self) -> None:
        self.ids: list[str] = self._file["ids"].asstr()[:].tolist()
        offsets = self._offsets = self._file["offsets"][:]
        if offsets.shape != (len(self.ids) + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError(f"its offsets are not those of {len(self.ids)} proteins")
        names: list[str] = []
        self._file.visit(names.append)
        num_rows = {POOLED: len(self.ids), RESIDUE: int(offsets[-1])}
        for name in names:
            if found := _OURS.fullmatch(name):
                kind, layer = found.groups()
                self._check_numbers(name, 2)
                if len(self._file[name]) != num_rows[kind]:
                    raise ValueError(
                        f"{name} has {len(self._file[name])} rows, where its ids and offsets say "
                        f"{num_rows[kind]}"
                    )
                self.layers[kind].append(layer)
        for layers in self.layers.values():
            layers.sort(key=lambda layer: int(layer.rpartition("_")[2]))

    def _open_bionemo(self) -> None:
        """Take a data set for each protein, named by its number; its rank tells which kind it is."""
        numbers = sorted((name for name in self._file if name.isdecimal() and self._is_data(name)), key=int)
        self._names = numbers
        names = [self._file[name].attrs.get("original_id", name) for name in numbers]
        self.ids = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        if numbers:
            rank = min(self._file[numbers[0]].ndim, 2)
            for name in numbers:
                self._check_numbers(name, rank)
            self.layers[POOLED if rank == 1 else RESIDUE] = [_ONLY]

    def _is_data(self, name: str) -> bool:
        """Tell whether a name is that of a data set in this file; a link may lead to another one."""
        is_here = isinstance(self._file.get(name, getlink=True), h5py.HardLink)
        return is_here and isinstance(self._file[name], h5py.Dataset)

    def _check_numbers(self, name: str, rank: int) -> None:
        """Refuse what holds no vectors: other ranks, no channels, or values that are no numbers."""
        data = self._file[name]
        if data.ndim != rank or not data.shape[-1] or data.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {data.dtype} {list(data.shape)}, in place of vectors of numbers")
        if self._is_bf16 and data.dtype.itemsize != 2:
            raise ValueError(f"{name} is {data.dtype}, in place of 16 bits for each bf16 number")

    def pooled(self, layer: str, numbers: Sequence[int]) -> Array:
        """Return the vectors of some proteins, fp32 ``[n, h]``."""
        if layer == _ONLY:
            vectors = [self._values(self._file[self._names[number]][()]) for number in numbers]
            for vector in vectors:
                _check_width(self.path, len(vector), len(vectors[0]))
            return np.stack(vectors)
        # HDF5 is slow at single rows; a file of vectors is small.
        return self._values(self._file[f"{POOLED}/{layer}"][()][list(numbers)])

    def residues(self, layer: str, number: int) -> Array:
        """Return the vectors of a protein's residues, fp32 ``[L, h]``."""
        if layer == _ONLY:
            return self._values(self._file[self._names[number]][()])
        first, stop = self._offsets[number : number + 2]
        return self._values(self._file[f"{RESIDUE}/{layer}"][first:stop])

    def num_residues(self, number: int) -> int:
        """Return the number of residues of a protein that the file holds vectors of."""
        if self.layers[RESIDUE] == [_ONLY]:
            return int(self._file[self._names[number]].shape[0])
        return int(self._offsets[number + 1] - self._offsets[number])

    def close(self) -> None:
        self._file.close()

    def _values(self, stored: Array) -> Array:
        values = to_tensor(stored, "bf16").float().numpy() if self._is_bf16 else stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: holds a value that is not finite; embed these proteins again")
        return values


class Embeddings:
    """Finds the embeddings of proteins in several files by their ids.

    Attributes:
        files: The files.
        layers: Names of the layers that all files have, for each kind.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files.

        Raises:
            UserError: A file cannot be read, or the files have no layer in common.
        """
        with ExitStack() as stack:
            self.files = []
            for path in paths:
                self.files.append(EmbeddingFile(path))
                stack.callback(self.files[-1].close)
            self._opened = stack.pop_all()
        self.layers = {
            kind: [
                name for name in self.files[0].layers[kind] if all(name in f.layers[kind] for f in self.files)
            ]
            for kind in (POOLED, RESIDUE)
        }
        self._places: dict[str, tuple[EmbeddingFile, int]] = {}
        counts: Counter[str] = Counter()
        for file in self.files:
            counts.update(file.ids)
            self._places |= {name: (file, number) for number, name in enumerate(file.ids)}
        self._repeated = {name for name, count in counts.items() if count > 1}
        self._width: int | None = None  # of vectors of residues, once one is read
        if not any(self.layers.values()):
            raise UserError(f"{', '.join(map(str, paths))}: have no layer in common; embed all of them alike")

    def __enter__(self) -> Embeddings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def check(self, ids: Sequence[str], location: str, lengths: Sequence[int] | None) -> None:
        """Refuse proteins that are not in the files, are there twice, or have other lengths there.

        Args:
            ids: Ids of the proteins.
            location: File of the labels, for messages.
            lengths: Number of residues of each; None if they do not matter.

        Raises:
            UserError: The first such protein.
        """
        missing = [name for name in ids if name not in self._places]
        files = ", ".join(str(file.path) for file in self.files)
        if missing:
            raise UserError(
                f"{location}: {len(missing)} of {len(ids)} proteins, first {missing[0]!r}, have no embedding "
                f"in {files}; embed all of them with the same ids"
            )
        for number, name in enumerate(ids):
            if name in self._repeated:
                raise UserError(
                    f"{location}: the id {name!r} is there more than once in {files}; give every protein an "
                    "id of its own, and embed them again"
                )
            if lengths is not None:
                file, place = self._places[name]
                if (found := file.num_residues(place)) != lengths[number]:
                    raise UserError(
                        f"{location}: {name!r} has {lengths[number]} residues, of which {file.path} holds "
                        f"{found}; embed it whole, with --max-seq-length or --too-long chunk"
                    )

    def vectors(self, layer: str, ids: Sequence[str]) -> Array:
        """Return a vector for each protein, fp32 ``[n, h]``: the pooled one, else the mean over residues."""
        if layer not in self.layers[POOLED]:
            return np.stack(
                [self.residues(layer, name).mean(axis=0, dtype=np.float64) for name in ids]
            ).astype(np.float32)
        found: Array | None = None
        for file in self.files:
            rows = [row for row, name in enumerate(ids) if self._places[name][0] is file]
            if rows:
                values = file.pooled(layer, [self._places[ids[row]][1] for row in rows])
                found = np.empty((len(ids), values.shape[1]), np.float32) if found is None else found
                _check_width(file.path, values.shape[1], found.shape[1])
                found[rows] = values
        assert found is not None
        return found

    def residues(self, layer: str, name: str) -> Array:
        """Return the vectors of a protein's residues, fp32 ``[L, h]``."""
        file, number = self._places[name]
        values = file.residues(layer, number)
        self._width = values.shape[1] if self._width is None else self._width
        _check_width(file.path, values.shape[1], self._width)
        return values


def _check_width(path: Path, width: int, others: int) -> None:
    """Refuse vectors of a file that are wider or narrower than those of other proteins."""
    if width != others:
        raise UserError(
            f"{path}: its vectors have {width} channels, those of another protein {others}; embed all "
            "proteins with one model"
        )
