"""Writes and reads token stores: directories of memory-mapped proteins, written once, never loaded whole.

A store holds::

    tokens.bin, tokens.idx     megatron-core IndexedDataset of uint8 token ids: residues, one item per protein
      or tokens-00000.bin, …   the same bytes in files of limited size, under the one index
    ids.bin, ids.offsets.npy   the ids in UTF-8 back to back, and int64 [n + 1] where each begins (and ends)
    clusters.*                 in a store with clusters: which rows belong together, see `clusters.py`
    manifest.json              format, tokenizer hash, counts, sources, size and SHA-256 of the other files,
                               and the SHA-256 of all this
    .verified.json             which large files were found to agree with that, see `verification.py`

`lengths` count residues; a protein of L residues has L + 2 tokens with `<cls>` and `<eos>`, which are added
when it is read for the model. A store has a name that `TokenStore` refuses until it is complete.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data.store import clusters, store_files
from esm2mega.data.store.manifest import (
    CHECKSUM,
    FORMAT,
    FORMAT_VERSION,
    ID_OFFSETS,
    IDS,
    INDEX,
    MANIFEST,
    PARTIAL_SUFFIX,
    TOKEN_FILES,
    TOKENS,
    StoreCounts,
    damaged,
    read_manifest,
    sealed,
)
from esm2mega.data.store.shards import SHARD_BYTES, ShardWriter, map_files
from esm2mega.data.store.store_files import HashedFile, NumberSpool, offset_blocks, write_offsets
from esm2mega.data.store.verification import verify_file, verify_small
from esm2mega.errors import DamagedError, UserError
from esm2mega.version import __version__

# Head of a megatron-core index: magic, version 1, dtype code 1 (uint8), number of sequences, number of
# document bounds. Behind it: int32 lengths, int64 byte offsets, int64 document bounds (one for each).
_INDEX_HEAD = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_VERSION = 1
_INDEX_UINT8 = 1


def partial_path(path: Path) -> Path:
    """Return a new name beside `path` for an unfinished store, which `TokenStore` refuses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}{PARTIAL_SUFFIX}")


class StoreWriter:
    """Writes one token store: the end of the `with` block completes it, and an exception removes all of it.

    `provenance` goes into the manifest (sources, split) and may be filled until the block is left.

    It grows under a name that `TokenStore` refuses, another one for each writer, so that nobody waits for a
    dead one; under the name that `files.appearing` gives it would be read.
    """

    def __init__(self, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Name the store; nothing is created before the `with` block is entered.

        Args:
            path: directory of the finished store; must not exist.
            shard_bytes: largest size of a file of tokens, a multiple of `shards.SHARD_UNIT`.
        """
        self._shard_bytes = shard_bytes
        self.path = Path(path)
        self.counts = StoreCounts()
        self.provenance: dict[str, Any] = {"sources": []}
        self._partial = partial_path(self.path)
        self._clusters: clusters.ClusterWriter | None = None
        if self.path.exists():
            raise UserError(f"{self.path}: exists already; name another directory or remove it")

    def __enter__(self) -> StoreWriter:
        self._partial.mkdir(parents=True)
        self._tokens = ShardWriter(self._partial, TOKENS, self._shard_bytes, HashedFile)
        self._ids = HashedFile(self._partial / IDS)
        self._lengths = NumberSpool(self._partial / "tokens.lengths", "<i4")
        self._id_lengths = NumberSpool(self._partial / "ids.lengths", "<i4")
        return self

    def append(self, ids: Sequence[str], residues: Sequence[bytes]) -> None:
        """Append a batch of proteins; larger batches are faster, up to a few MiB of residues.

        Args:
            ids: n ids, repeats allowed.
            residues: n sequences of residue bytes without white space, none empty.
        """
        joined = b"".join(residues)
        encoded_ids = [name.encode("utf-8") for name in ids]
        self.append_encoded(
            vocabulary.encode_residues(joined),
            np.fromiter(map(len, residues), dtype=np.int32, count=len(residues)),
            b"".join(encoded_ids),
            np.fromiter(map(len, encoded_ids), dtype=np.int32, count=len(ids)),
        )
        self.counts.add(len(residues), vocabulary.byte_histogram(joined))

    def append_encoded(
        self,
        tokens: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.int32],
        ids: bytes,
        id_lengths: npt.NDArray[np.int32],
    ) -> None:
        """Append proteins that are token ids already; the caller updates `counts`.

        Args:
            tokens: residues of n proteins back to back, [sum of lengths].
            lengths: residues of each protein, [n].
            ids: the ids in UTF-8 back to back.
            id_lengths: bytes of each id, [n].
        """
        self._tokens.write(tokens.tobytes())
        self._ids.write(ids)
        self._lengths.append(lengths)
        self._id_lengths.append(id_lengths)

    def append_clusters(
        self, ids: Sequence[str], sizes: npt.NDArray[Any], members: npt.NDArray[np.int64]
    ) -> None:
        """Append a batch of clusters; the store has cluster arrays from the first call on.

        Args:
            ids: n cluster ids.
            sizes: members of each cluster, at least one, integer [n].
            members: rows of the members, cluster after cluster, [sum of sizes]. Rows may be appended later.
        """
        if self._clusters is None:
            self._clusters = clusters.ClusterWriter(self._partial)
        self._clusters.append(ids, sizes, members)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._complete()
                os.rename(self._partial, self.path)
        finally:
            if self._partial.exists():
                self._remove_partial()

    def _complete(self) -> None:
        """Write the index files and the manifest."""
        if not self.counts.sequences:
            raise UserError(f"{self.path}: a token store needs at least one sequence")
        token_files, tokens_sha256 = self._tokens.close()
        files = {**token_files, IDS: self._ids.close()}
        files[INDEX] = self._write_index(self._lengths.close())
        files[ID_OFFSETS] = write_offsets(self._partial / ID_OFFSETS, self._id_lengths.close())
        if self._clusters is not None:
            files.update(self._clusters.complete(self.counts.sequences))
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_by": f"esm2mega {__version__}",
            "tokenizer_hash": vocabulary.TOKENIZER_HASH,
            **asdict(self.counts),
            **self.provenance,
            "tokens_sha256": tokens_sha256,
            "files": files,
        }
        with open(self._partial / MANIFEST, "x", encoding="utf-8") as stream:
            json.dump(sealed(manifest), stream, indent=1, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _write_index(self, lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
        count = len(lengths)
        index = HashedFile(self._partial / INDEX)
        index.write(_INDEX_HEAD.pack(_INDEX_MAGIC, _INDEX_VERSION, _INDEX_UINT8, count, count + 1))
        for first in range(0, count, store_files.BLOCK):
            index.write(lengths[first : first + store_files.BLOCK].tobytes())
        for starts in offset_blocks(lengths):
            index.write(starts.astype("<i8").tobytes())
        for first in range(0, count + 1, store_files.BLOCK):
            index.write(np.arange(first, min(first + store_files.BLOCK, count + 1), dtype="<i8").tobytes())
        return index.close()

    def _remove_partial(self) -> None:
        for open_file in (self._tokens, self._ids, self._lengths, self._id_lengths):
            open_file.abandon()
        if self._clusters is not None:
            self._clusters.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)


class TokenStore:
    """Reads a store by memory map; only the pages that are touched are loaded.

    Attributes:
        manifest: the content of manifest.json.
        lengths: residues of each protein, int32 [n].
        starts: position of each protein's first residue in `tokens`, int64 [n].
        tokens: all residues back to back as token ids, uint8 [residues].
        clusters: which rows form a cluster; None for a store without clusters.
    """

    def __init__(self, path: str | Path, staged: bool = False) -> None:
        """Open the store, compare its small files with their checksums, and check that all fit each other.

        Large files, such as the tokens, are not read; `verify` and `verification.py` compare those.

        Args:
            path: directory of the store.
            staged: whether to accept a finished store in an unfinished directory, which is refused otherwise.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path, staged)
        self._check_sizes()
        verify_small(self)
        self._token_files = sorted(name for name in self.manifest["files"] if TOKEN_FILES.fullmatch(name))
        self.tokens: npt.NDArray[np.uint8] = map_files([self.path / name for name in self._token_files])
        self.lengths, self.starts = self._map_index()
        self._ids = _Ids(self.path / IDS, self.path / ID_OFFSETS, len(self))
        self.clusters = self._map_clusters() if self._has_clusters else None

    def __len__(self) -> int:
        return len(self.lengths)

    def residues(self, i: int) -> npt.NDArray[np.uint8]:
        """Return the token ids of protein `i` without special tokens, [L], as a view of the file."""
        start = self.starts[i]
        return self.tokens[start : start + self.lengths[i]]

    def id(self, i: int) -> str:
        """Return the id of protein `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"protein {i} of a store of {len(self)}")
        return self._ids[i]

    def encoded_ids(self, first: int, stop: int) -> tuple[bytes, npt.NDArray[np.int32]]:
        """Return the ids of proteins `first` to `stop`, exclusive: joined UTF-8, and bytes of each, [n]."""
        return self._ids.encoded(first, stop)

    def first(self, count: int) -> TokenStore:
        """Return a view of the first proteins, without clusters, as a store of its own."""
        if count >= len(self):
            return self
        view = copy.copy(self)
        view.lengths, view.starts, view.clusters = self.lengths[:count], self.starts[:count], None
        return view

    @property
    def _is_view(self) -> bool:
        return len(self) < int(self.manifest["sequences"])

    @property
    def counts(self) -> StoreCounts:
        """Return the counts that the manifest states."""
        return StoreCounts(**{entry.name: self.manifest[entry.name] for entry in fields(StoreCounts)})

    @property
    def token_counts(self) -> npt.NDArray[np.int64]:
        """Return how often each token id occurs, [33]; `<cls>` and `<eos>` are not stored and count 0."""
        if self._is_view:
            end = int(self.starts[-1] + self.lengths[-1])
            return np.bincount(self.tokens[:end], minlength=len(vocabulary.VOCAB))
        return np.asarray(self.manifest["token_counts"], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the proteins and their order; ids, clusters and sources do not matter."""
        hashes = [self.manifest["tokens_sha256"], self.manifest["files"][INDEX]["sha256"]]
        if self._is_view:
            hashes.append(str(len(self)))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def is_sealed(self) -> bool:
        """Return whether the manifest holds a checksum of itself; those of earlier versions do not."""
        return CHECKSUM in self.manifest

    def verify(self) -> None:
        """Read every byte, and raise DamagedError when a file differs from what was written."""
        for name in self.manifest["files"]:
            verify_file(self, name)

    def wrong_token(self, row: int) -> DamagedError | None:
        """Return an error if protein `row` has a token that is not of the vocabulary, else None."""
        if self.residues(row).max() < len(vocabulary.VOCAB):
            return None
        ends = np.cumsum([self.manifest["files"][name]["bytes"] for name in self._token_files])
        name = self._token_files[int(np.searchsorted(ends, self.starts[row], side="right"))]
        return damaged(self.path / name, f"protein {self.id(row)!r} has tokens outside of the vocabulary")

    @property
    def _has_clusters(self) -> bool:
        return any(name in self.manifest["files"] for name in clusters.FILES)

    def _check_sizes(self) -> None:
        for name in clusters.FILES if self._has_clusters else ():
            if name not in self.manifest["files"]:
                raise damaged(self.path / MANIFEST, f"lists other cluster files, but not {name}")
        for name in self.manifest["files"]:
            file = self.path / name
            if not file.is_file():
                raise damaged(file, "is missing")
            expected, found = self.manifest["files"][name]["bytes"], file.stat().st_size
            if found != expected:
                raise damaged(file, f"has {found} bytes, its manifest says {expected}")

    def _map_index(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Map the lengths, [n], and starts, [n], in tokens.idx."""
        file = self.path / INDEX
        count = int(self.manifest["sequences"])
        expected, found = _INDEX_HEAD.size + 20 * count + 8, self.manifest["files"][INDEX]["bytes"]
        if found != expected:
            raise damaged(file, f"has {found} bytes; an index of {count} sequences has {expected}")
        with open(file, "rb") as stream:
            head = stream.read(_INDEX_HEAD.size)
        if head != _INDEX_HEAD.pack(_INDEX_MAGIC, _INDEX_VERSION, _INDEX_UINT8, count, count + 1):
            raise damaged(file, f"is not a uint8 megatron-core index of {count} sequences")
        lengths = _map(file, np.dtype("<i4"), count, _INDEX_HEAD.size)
        starts = _map(file, np.dtype("<i8"), count, _INDEX_HEAD.size + lengths.nbytes)
        if starts[-1] + lengths[-1] != len(self.tokens):
            raise damaged(file, f"ends at residue {starts[-1] + lengths[-1]} of {len(self.tokens)}")
        return lengths, starts

    def _map_clusters(self) -> clusters.Clusters:
        """Map the cluster arrays; rows and offsets were checked when they were written."""
        offsets = _map_npy(self.path / clusters.OFFSETS)
        members = _map_npy(self.path / clusters.MEMBERS)
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(members):
            raise damaged(self.path / clusters.OFFSETS, f"does not divide {len(members)} members")
        # This refuses a number of ids that is not that of the clusters.
        _Ids(self.path / clusters.IDS, self.path / clusters.ID_OFFSETS, len(offsets) - 1)
        return clusters.Clusters(offsets, members)


class _Ids:
    """Reads ids that lie back to back in a file, by their offsets."""

    def __init__(self, text: Path, offsets: Path, count: int) -> None:
        self._file = text
        self._text = _map(text, np.uint8)
        self._offsets = _map_npy(offsets)
        if len(self._offsets) != count + 1:
            raise damaged(offsets, f"has {len(self._offsets)} offsets for {count} ids")

    def __getitem__(self, i: int) -> str:
        try:
            return self._text[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self._file, f"id {i + 1} is not UTF-8") from None

    def encoded(self, first: int, stop: int) -> tuple[bytes, npt.NDArray[np.int32]]:
        offsets = self._offsets[first : stop + 1]
        return self._text[offsets[0] : offsets[-1]].tobytes(), np.diff(offsets).astype(np.int32)


def _map_npy(file: Path) -> npt.NDArray[np.int64]:
    """Map a `.npy` file of int64, [n], read-only, as a plain array."""
    try:
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            begin = stream.tell()
    except OSError:
        raise
    # The head is text that numpy parses as Python; a damaged one fails there in many ways.
    except Exception:
        shape, dtype, begin = (), np.dtype(np.uint8), 0
    if dtype != np.int64 or len(shape) != 1 or begin + 8 * shape[0] != file.stat().st_size:
        raise damaged(file, "is not a .npy file of int64 numbers in one row")
    return _map(file, np.dtype("<i8"), shape[0], begin)


def _map(file: Path, dtype: npt.DTypeLike, count: int | None = None, offset: int = 0) -> npt.NDArray[Any]:
    """Map a file read-only as a plain array: slices of `np.memmap` itself cost several times more."""
    shape = None if count is None else (count,)
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)
