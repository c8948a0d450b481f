"""Checks the pages of an LMDB file before the library reads it, which follows whatever they say.

LMDB maps its file and trusts it: a damaged or crafted page can make it read behind the end of the mapping,
which kills the process. Here the tree of the one unnamed database is followed from its root, and every
offset, size and page number in it is compared with the file. The layout is that of LMDB 0.9 on machines of
64 bits, little-endian, as its `mdb.c` describes it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.errors import UserError

_META = struct.Struct("<16xIIQQ48sIHHQQQQQQQ")
"""Page header, magic, version, address, map size, free database (its first field is the page size), main
database (unused, flags, depth, branch, leaf and overflow pages, entries, root), last page, transaction."""

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEAD, _NODE = 16, 8
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG = 1  # flag of a node whose value lies on pages of its own
_NO_PAGE = (1 << 64) - 1
_MOST_LEVELS = 32
_PAGES = 512
"""So many pages are checked at once: some megabytes."""

Numbers = npt.NDArray[np.int64]


def check_pages(file: Path) -> int:
    """Check all pages that the library may come to, and return the number of entries.

    Raises:
        UserError: The file is no LMDB file, is truncated, or its pages contradict each other.
        OSError: It cannot be read.
    """
    size, flags, depth, root, last = _newest_meta(file)
    pages = np.memmap(file, np.uint8, "r", shape=(last + 1, size)).view(np.ndarray)
    if flags or depth > _MOST_LEVELS:
        raise _damaged(file, "the database is of another kind")
    if root == _NO_PAGE:
        return 0
    seen = np.zeros(last + 1, dtype=bool)
    level, entries = np.array([root], dtype=np.uint64), 0
    while len(level):
        found = []
        for first in range(0, len(level), _PAGES):
            numbers = level[first : first + _PAGES]
            _check(file, (numbers > 1) & (numbers <= last), "a page does not exist")
            numbers = numbers.astype(np.int64)
            _check(file, ~seen[numbers], "pages refer to each other")
            seen[numbers] = True
            children, leaves = _check_block(file, pages, pages[numbers])
            found.append(children)
            entries += leaves
        level = np.concatenate(found)
        _check(file, np.diff(np.sort(level)) > 0, "pages refer to each other")
    return entries


def _newest_meta(file: Path) -> tuple[int, ...]:
    """Return page size, flags, depth and root of the main database, and the number of the last page."""
    found: list[tuple[int, ...]] = []
    with open(file, "rb") as stream:
        for number in range(2):
            stream.seek(number * found[0][0] if found else 0)
            head = stream.read(_META.size)
            if len(head) < _META.size:
                raise _damaged(file, "it has no head")
            magic, version, _, _, free, _, flags, depth, _, _, _, _, root, last, transaction = _META.unpack(
                head
            )
            size = int.from_bytes(free[:4], "little")
            if (magic, version) != (_MAGIC, _VERSION) or size & (size - 1) or not 256 <= size <= 1 << 16:
                raise _damaged(file, "it has no head")
            found.append((size, flags, depth, root, last, transaction))
    size, flags, depth, root, last, _ = max(found, key=lambda meta: meta[-1])
    expected, there = (last + 1) * size, file.stat().st_size
    if there < expected or size != found[0][0]:
        raise UserError(f"{file}: has {there} bytes instead of {expected} (truncated); copy it again")
    return size, flags, depth, root, last


def _check_block(
    file: Path, pages: npt.NDArray[np.uint8], block: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint64], int]:
    """Check pages of a level of the tree; return the numbers of those below them, and count their entries.

    Args:
        file: path of the file, for messages.
        pages: all pages of the file, [p, page size].
        block: pages to check, [k, page size].
    """
    size = block.shape[1]
    kinds, lower, upper = (_number(block[:, at : at + 2]) for at in (10, 12, 14))
    _check(file, (kinds == _BRANCH) | (kinds == _LEAF), "a page is of another kind")
    _check(file, (lower >= _HEAD) & (lower <= upper) & (upper <= size), "a page has no room for its entries")
    counts = (lower - _HEAD) // 2
    _check(file, counts >= np.where(kinds == _BRANCH, 2, 1), "a page has too few entries")
    rows = np.repeat(np.arange(len(block)), counts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)

    def read(starts: Numbers, width: int) -> Numbers:
        """Return little-endian numbers of the pages `rows`, at `starts`."""
        return _number(block[rows[:, None], starts[:, None] + np.arange(width)])

    nodes = read(_HEAD + 2 * places, 2)
    _check(file, (nodes >= upper[rows]) & (nodes <= size - _NODE), "an entry lies outside of its page")
    low, flags, key = read(nodes, 4), read(nodes + 4, 2), read(nodes + 6, 2)
    is_leaf = kinds[rows] == _LEAF
    _check(file, ~is_leaf | (flags & ~_BIG == 0), "an entry is of another kind")
    is_big = is_leaf & (flags == _BIG)
    ends = nodes + _NODE + key + np.where(is_leaf, np.where(is_big, 8, low), 0)
    _check(file, ends <= size, "an entry does not end in its page")
    if is_big.any():
        starts, rows = (nodes + _NODE + key)[is_big], rows[is_big]
        first = block[rows[:, None], starts[:, None] + np.arange(8)].copy().view("<u8")[:, 0]
        _check_values(file, pages, first, low[is_big])
    below = (low + (flags << 32))[~is_leaf].astype(np.uint64)
    return below, int(is_leaf.sum())


def _check_values(
    file: Path, pages: npt.NDArray[np.uint8], first: npt.NDArray[np.uint64], sizes: Numbers
) -> None:
    """Check that values of `sizes` bytes, [n], which begin on the pages `first`, lie on such pages."""
    _check(file, (first > 1) & (first < len(pages)), "a value lies outside of the file")
    begin = first.astype(np.int64)
    heads = pages[begin, :_HEAD]
    counts = _number(heads[:, 12:16])
    fits = (begin + counts <= len(pages)) & (_HEAD + sizes <= counts * pages.shape[1])
    _check(file, (_number(heads[:, 10:12]) == _OVERFLOW) & fits, "a value lies outside of its pages")


def _number(digits: npt.NDArray[np.uint8]) -> Numbers:
    """Return little-endian numbers, [n], of bytes, [n, at most 4]."""
    total: Any = sum(digits[:, place].astype(np.int64) << 8 * place for place in range(digits.shape[1]))
    return total


def _check(file: Path, holds: npt.NDArray[np.bool_], otherwise: str) -> None:
    if not holds.all():
        raise _damaged(file, otherwise)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: is not a readable LMDB file ({reason}); copy it again")
