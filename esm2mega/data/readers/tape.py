"""Reads TAPE's LMDB files without running what their pickles ask for; needs the extra `tape`.

Each record is a pickled dict under its number; `num_examples` holds their count. A pickle is a program that
may name any function of the interpreter. Here it may only use the names with which numpy arrays are written,
and even they stand for a class that does nothing: arrays are not needed to read sequences.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm2mega.data.readers.base import Block, ByteProgress, Record, RowSource, SourceOptions
from esm2mega.data.readers.columns import table_record
from esm2mega.data.readers.lmdb_pages import check_pages
from esm2mega.errors import UserError
from esm2mega.files import shortened

if TYPE_CHECKING:
    import lmdb

_BLOCK_RECORDS = 1 << 16
_SEQUENCE, _ID, _COUNT = "primary", "id", b"num_examples"
_ARRAY_NAMES = {
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _Skipped:
    """Stands for an array: it takes whatever it is given and keeps none of it."""

    def __new__(cls, *_: object) -> _Skipped:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


def _encode(text: object, encoding: object) -> bytes:
    """Return the bytes that old pickles write as latin1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something else than bytes")
    return text.encode("latin1")


class RestrictedUnpickler(pickle._Unpickler):
    """Builds text, numbers and containers; in place of numpy's objects it builds `_Skipped`.

    It is the library's implementation in Python: the one in C makes a table as long as the largest number
    under which a pickle keeps an object, and a few bytes can name 4 billion.
    """

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) not in _ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return _Skipped


def load_restricted(data: bytes) -> Any:
    """Load what a pickle holds, with numpy arrays replaced by placeholders.

    Raises:
        ValueError: The bytes are no pickle, or it names anything that is no part of an array.
    """
    try:
        return RestrictedUnpickler(io.BytesIO(data)).load()
    # A damaged or crafted pickle fails in as many ways as its virtual machine has operations.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


class TapeReader(RowSource):
    """Reads the proteins of a TAPE file: `primary` is the sequence; the id is `id`, or else the key."""

    unit = ": record "

    def __init__(
        self,
        path: str | Path,
        progress: ByteProgress | None = None,
        load: Callable[[bytes], Any] | None = None,
    ) -> None:
        """Read the number of records.

        Args:
            path: the directory that holds `data.mdb`, or that file.
            progress: told about bytes of the file.
            load: function that loads a pickle; None for `load_restricted`.
        """
        super().__init__(path, progress)
        self._restricted = load or load_restricted
        self._file = self.path / "data.mdb" if self.path.is_dir() else self.path
        self._check_file(self._file, "LMDB")
        num_entries = check_pages(self._file)
        with self._opened() as transaction:
            count = self._load(transaction, _COUNT)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{self.path}: num_examples is {shortened(count)}, not a number of records")
        if count >= num_entries:  # one entry is the number itself
            raise UserError(
                f"{self.path}: num_examples is {shortened(count)}, but the file has {num_entries - 1} other "
                "entries; is this a complete TAPE file?"
            )
        self._count = count

    def files(self) -> list[Path]:
        return [self._file]

    def records(self, block: Block) -> Iterator[Record]:
        for record, _ in self._rows(block):
            yield record

    def dictionaries(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield location, id and whole dictionary of each record, with its sequence as text."""
        for block in self.blocks():
            for record, row in self._rows(block):
                sequence = record.residues.decode()
                yield self.location(record.line), record.id, {**row, _SEQUENCE: sequence}

    def _rows(self, block: Block) -> Iterator[tuple[Record, Mapping[str, Any]]]:
        options = SourceOptions(sequence_column=_SEQUENCE, set_by="nothing")
        with self._opened() as transaction:
            for number in range(block.line - 1, block.stop - 1):
                row = self._load(transaction, str(number).encode())
                if not isinstance(row, Mapping) or _SEQUENCE not in row:
                    raise UserError(
                        f"{self.location(number)}: is no dict with the key {_SEQUENCE!r}; is this TAPE?"
                    )
                # Messages name keys, which count from 0.
                name, sequence = _text(row.get(_ID, number)), _text(row[_SEQUENCE])
                yield table_record(self, options, number, name, sequence), row

    def _ranges(self) -> list[tuple[int, int]]:
        firsts = range(0, self._count, _BLOCK_RECORDS)
        return [(first, min(first + _BLOCK_RECORDS, self._count)) for first in firsts]

    def _load(self, transaction: lmdb.Transaction, key: bytes) -> Any:
        value = transaction.get(key)
        if value is None:
            raise UserError(f"{self.path}: has no entry {key.decode()!r}; is this a complete TAPE file?")
        try:
            return self._restricted(bytes(value))
        except ValueError as error:
            raise UserError(
                f"{self.path}: record {key.decode()}: the pickle is not read: {error}; TAPE's own files hold "
                "text, numbers and arrays only"
            ) from None

    @contextmanager
    def _opened(self) -> Iterator[lmdb.Transaction]:
        lmdb = require_lmdb(self.path)
        try:
            environment = lmdb.open(str(self._file), subdir=False, readonly=True, lock=False, readahead=False)
            with environment, environment.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise UserError(f"{self.path}: is not a readable LMDB file ({error})") from None


def require_lmdb(path: str | Path) -> Any:
    """Return the module lmdb.

    Args:
        path: What is to be read, for the message.

    Raises:
        UserError: It is not installed.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError(
            f"{path}: reading LMDB needs the lmdb package; install it with `pip install 'esm2mega[tape]'`"
        ) from None
    return lmdb


def _text(value: object) -> object:
    return value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else value
