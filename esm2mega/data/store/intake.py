"""Cuts the input of a store into batches of bounded size, and refuses proteins without a known residue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from esm2mega import vocabulary
from esm2mega.errors import UserError

Item = TypeVar("Item")


class Located(Protocol):
    """Names the location of an item in a file with numbered lines or rows."""

    def location(self, line: int) -> str:
        """Say where an item stands, for messages."""


def in_batches(items: Iterable[Item], size_of: Callable[[Item], int], size: int) -> Iterator[list[Item]]:
    """Yield items in lists, each of which ends when the sizes in it reach `size`."""
    batch: list[Item] = []
    so_far = 0
    for item in items:
        batch.append(item)
        so_far += size_of(item)
        if so_far >= size:
            yield batch
            batch, so_far = [], 0
    if batch:
        yield batch


def check_known(source: Located, line: int, name: str, residues: bytes) -> None:
    """Refuse a protein without any known residue; nothing could be learned from it.

    Args:
        source: the input.
        line: line of the protein.
        name: id of the protein.
        residues: residues of the protein, without white space.
    """
    if not residues.strip(vocabulary.UNKNOWN_BYTES):
        raise UserError(
            f"{source.location(line)}: the sequence of {name!r} has only unknown residues "
            f"({residues[:10].decode()!r}); correct or remove the record"
        )
