"""Writes and holds the optional arrays of a token store that say which rows belong to which cluster.

    clusters.offsets.npy                            int64 [c + 1], where the members of each cluster begin
    clusters.members.npy                            int64 [m], row numbers in the store
    clusters.ids.bin, clusters.ids.offsets.npy      the cluster ids, kept as the ids of the proteins are

A row may be in no cluster; a store made by `prepare uniref` has every row in exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.store import store_files
from esm2mega.data.store.store_files import HashedFile, NumberSpool, npy_header, write_offsets

OFFSETS, MEMBERS = "clusters.offsets.npy", "clusters.members.npy"
IDS, ID_OFFSETS = "clusters.ids.bin", "clusters.ids.offsets.npy"
FILES = (OFFSETS, MEMBERS, IDS, ID_OFFSETS)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Holds the clusters of a store; the members of cluster j are `members[offsets[j]:offsets[j + 1]]`.

    Attributes:
        offsets: where each cluster begins in `members`, and the end of the last one, int64 [c + 1].
        members: row numbers in the store, int64 [m].
    """

    offsets: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


class ClusterWriter:
    """Writes the cluster files of a store, batch by batch, in constant memory."""

    def __init__(self, directory: Path) -> None:
        """Open the files in `directory`, which exists."""
        self._directory = directory
        self._ids = HashedFile(directory / IDS)
        self._id_lengths = NumberSpool(directory / "clusters.ids.lengths", "<i4")
        self._sizes = NumberSpool(directory / "clusters.sizes", "<i4")
        self._members = NumberSpool(directory / "clusters.members", "<i8")

    def append(self, ids: Sequence[str], sizes: npt.NDArray[Any], members: npt.NDArray[np.int64]) -> None:
        """Append n clusters; see `StoreWriter.append_clusters`."""
        if len(ids) != len(sizes) or int(sizes.sum()) != len(members) or (sizes < 1).any():
            raise ValueError(f"{len(ids)} ids, sizes {sizes} and {len(members)} members do not fit")
        encoded_ids = [name.encode("utf-8") for name in ids]
        self._ids.write(b"".join(encoded_ids))
        self._id_lengths.append(np.fromiter(map(len, encoded_ids), dtype=np.int32, count=len(ids)))
        self._sizes.append(sizes)
        self._members.append(members)

    def complete(self, num_sequences: int) -> dict[str, dict[str, Any]]:
        """Write the files that are kept, and return their entries in the manifest.

        Args:
            num_sequences: rows of the store.

        Raises:
            ValueError: A member is not one of these rows.
        """
        files = {IDS: self._ids.close()}
        files[ID_OFFSETS] = write_offsets(self._directory / ID_OFFSETS, self._id_lengths.close())
        files[OFFSETS] = write_offsets(self._directory / OFFSETS, self._sizes.close())
        members = self._members.close()
        kept = HashedFile(self._directory / MEMBERS)
        npy_header(kept, len(members))
        for first in range(0, len(members), store_files.BLOCK):
            block = members[first : first + store_files.BLOCK]
            if block.min() < 0 or block.max() >= num_sequences:
                raise ValueError(f"a cluster has a member outside of the {num_sequences} rows of the store")
            kept.write(block.tobytes())
        files[MEMBERS] = kept.close()
        return files

    def abandon(self) -> None:
        """Close the files, which are to be removed, without regard to errors."""
        for open_file in (self._ids, self._id_lengths, self._sizes, self._members):
            open_file.abandon()
