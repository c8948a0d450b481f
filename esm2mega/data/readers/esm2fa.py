"""Reads the shards of ESM2-FA: data sets of tokens that Hugging Face's `datasets` saved to disk.

A shard is a directory with ``state.json``, which names its Arrow files; a data set is one shard, or a
directory with several, ``shard-00000`` and so on. Two columns are read: ``id``, a header of FASTA, and
``input_ids``, tokens of ESM-2 with padding. The batches that ``batch_id`` makes are not kept, since packing
makes others. A file is a stream of Arrow: a schema, and batches of rows. It is mapped and not decompressed,
so reading takes no more memory than the file has bytes. Needs the extra `parquet`, which installs pyarrow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.data.readers.arrow import readable
from esm2mega.data.readers.base import (
    LONGEST_TEXT,
    Block,
    ByteProgress,
    Record,
    RowSource,
    check_id,
    check_length,
    require_columns,
)
from esm2mega.errors import UserError
from esm2mega.files import parse_json, shortened

if TYPE_CHECKING:
    import pyarrow

_STATE = "state.json"
_SHARDS = "shard-*"
_COLUMNS = ("id", "input_ids")
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends a stream of Arrow; a file without it has been cut short."""

_BLOCK_ROWS = 1 << 16
_UNKNOWN = ord("J")  # a letter without a token in ESM-2's vocabulary stands for <unk>
_BEFORE = (vocabulary.CLS,)
_BEHIND = (vocabulary.EOS, vocabulary.PAD)


def is_data_set(path: Path) -> bool:
    """Tell whether a directory is a data set that `datasets` saved to disk, or holds shards of one."""
    return (path / _STATE).is_file() or next(path.glob(f"{_SHARDS}/{_STATE}"), None) is not None


class Esm2faReader(RowSource):
    """Reads the rows of all shards in the order of their names."""

    def __init__(self, path: str | Path, progress: ByteProgress | None = None) -> None:
        """Find the files of all shards, and check the columns of the first.

        Args:
            path: a shard, or a directory of shards.
            progress: told about bytes of the files.
        """
        super().__init__(path, progress)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such directory; give one that `datasets` saved, or one with shards")
        shards = [self.path] if (self.path / _STATE).is_file() else sorted(self.path.glob(_SHARDS))
        self._files = [file for shard in shards for file in _files_of(shard)]
        if not self._files:
            raise UserError(f"{path}: holds neither {_STATE} nor {_SHARDS} directories with one")
        with _opened(self._files[0]) as (schema, _):
            _check_columns(self._files[0], schema)

    def files(self) -> list[Path]:
        return self._files

    def notes(self) -> list[str]:
        return [
            f"{self.path}: pieces of long proteins, such as ID/1-684, are proteins of their own here, with "
            "<cls> and <eos>; to keep them together, prepare the FASTA and train with data.crop=chunk"
        ]

    def records(self, block: Block) -> Iterator[Record]:
        letters = _letters()
        number = int(np.searchsorted(self._ends, block.line - 1, side="right"))
        row = 1 + (self._ends[number - 1] if number else 0)
        with _opened(self._files[number]) as (schema, batches):
            _check_columns(self._files[number], schema)
            for batch in batches:
                if row >= block.stop:
                    return
                if row >= block.line:
                    yield from self._records_of(batch, row, letters)
                row += batch.num_rows

    def _records_of(
        self, batch: pyarrow.RecordBatch, row: int, letters: npt.NDArray[np.uint8]
    ) -> Iterator[Record]:
        """Yield the records of a batch whose first row has the number `row`."""
        ids, tokens = (batch.column(name) for name in _COLUMNS)
        for column in (ids, tokens):
            # Nothing in a file is believed: offsets may lead out of it.
            column.validate(full=True)
        if tokens.values.null_count:
            last = row + batch.num_rows - 1
            raise UserError(f"{self.path}: rows {row} to {last} hold an empty token; make the shards again")
        offsets, values = tokens.offsets.to_numpy(), tokens.values.to_numpy()
        for index in range(batch.num_rows):
            name, start, stop = ids[index], int(offsets[index]), int(offsets[index + 1])
            check_length(stop - start, self.location(row), "this row")
            if not name.is_valid or name.as_buffer().size > LONGEST_TEXT:
                raise UserError(f"{self.location(row)}: has no id; make the shards again")
            words = name.as_py().removeprefix(">").split(None, 1)
            if not words:
                raise UserError(f"{self.location(row)}: the id {shortened(name.as_py())} is blank")
            residues = self._residues(values[start:stop], letters, row)
            yield Record(check_id(self, row, words[0]), residues, row)
            row += 1

    def _residues(self, tokens: npt.NDArray[Any], letters: npt.NDArray[np.uint8], row: int) -> bytes:
        """Return the letters of token ids, [length], without the special tokens before and behind them."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(letters):
            wrong = tokens[(tokens < 0) | (tokens >= len(letters))][0]
            raise UserError(
                f"{self.location(row)}: has the token id {wrong}; ids of ESM-2 are 0 to {len(letters) - 1}: "
                "shards of other vocabularies are not read, so give the FASTA that they were made from"
            )
        tokens = tokens[int(len(tokens) > 0 and tokens[0] in _BEFORE) :]
        inside = np.flatnonzero(~np.isin(tokens, _BEHIND))
        if not len(inside):
            raise UserError(f"{self.location(row)}: has no residues; make the shards again without it")
        tokens = tokens[: inside[-1] + 1]
        residues = letters[tokens]
        if not residues.all():
            token = vocabulary.VOCAB[tokens[residues == 0][0]]
            raise UserError(
                f"{self.location(row)}: has {token} between its residues; make the shards again with one "
                "protein in a row and without masks"
            )
        return residues.tobytes()

    @cached_property
    def _batch_rows(self) -> list[list[int]]:
        """Hold the number of rows of each batch of each file; only their heads are read for it."""
        counts = []
        for file in self._files:
            with _opened(file) as (_, batches):
                counts.append([batch.num_rows for batch in batches])
        return counts

    @cached_property
    def _ends(self) -> list[int]:
        """Hold the number of rows up to the end of each file."""
        return np.cumsum([sum(counts) for counts in self._batch_rows]).tolist()

    def _ranges(self) -> list[tuple[int, int]]:
        ranges, first = [], 0
        for counts, end in zip(self._batch_rows, self._ends, strict=True):
            row = first
            for count in counts:
                row += count
                if row - first >= _BLOCK_ROWS or (row == end and row > first):
                    ranges.append((first, row))
                    first = row
        if not ranges:
            raise UserError(f"{self.path}: has no rows; give a data set with proteins")
        return ranges

    def _name_of(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()


def _letters() -> npt.NDArray[np.uint8]:
    """Return the residue letter of each token id, [33]; 0 where a token stands for none."""
    table = [ord(token) if len(token) == 1 else 0 for token in vocabulary.VOCAB]
    table[vocabulary.UNK] = _UNKNOWN
    return np.array(table, dtype=np.uint8)


def _files_of(shard: Path) -> list[Path]:
    """Return the Arrow files of a shard, which lie in it and nowhere else."""
    state = shard / _STATE
    try:
        content = parse_json(state.read_bytes())
        names = [entry["filename"] for entry in content["_data_files"]]
        if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
            raise ValueError("it names a file outside of its directory")
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{state}: does not list the files of a data set ({reason}); copy the shard again"
        ) from None
    files = [shard / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such Arrow file, but {state} names it; copy the shard again")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]]:
    """Open a file; give its schema and its batches, whose buffers are those of the mapped file.

    Raises:
        UserError: pyarrow is not installed, or the file turns out, anywhere in the block, to be damaged.
    """
    with readable(file, "Arrow", "ipc", "copy the shard again") as ipc:
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            if source.size() < len(_END) or source.read_at(len(_END), source.size() - len(_END)) != _END:
                raise UserError(f"{file}: is no Arrow stream, or cut short; copy the shard again")
            schema = ipc.read_schema(source)
            yield schema, _batches(file, source, schema)


def _batches(
    file: Path, source: pyarrow.MemoryMappedFile, schema: pyarrow.Schema
) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    while source.tell() < source.size() - len(_END):
        message = pyarrow.ipc.read_message(source)
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise UserError(
                f"{file}: has {'compressed' if message.type == 'record batch' else message.type} data, which "
                "`datasets` does not write to disk; save the data set again"
            )
        yield pyarrow.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Tell whether the head of a batch says that its buffers are compressed, and so of any size.

    The head is a FlatBuffer: a table begins with the distance back to the list of its fields' places, in
    which 0 stands for an absent field.

    Raises:
        struct.error: A place in it lies outside.
    """

    def field(table: int, number: int) -> int:
        places = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, places)[0]
        place = 4 + 2 * number
        return struct.unpack_from("<H", metadata, places + place)[0] if place < size else 0

    message = struct.unpack_from("<I", metadata)[0]
    header = message + field(message, 2)
    return field(header + struct.unpack_from("<I", metadata, header)[0], 3) != 0


def _check_columns(file: Path, schema: pyarrow.Schema) -> None:
    import pyarrow.types as kinds

    cure = "give shards of ESM2-FA; other data sets are read as Parquet, which their `to_parquet` writes"
    require_columns(str(file), schema.names, _COLUMNS, cure)
    name, tokens = (schema.field(column).type for column in _COLUMNS)
    is_list = kinds.is_list(tokens) or kinds.is_large_list(tokens)
    for column, kind, fits in (
        ("id", name, kinds.is_string(name) or kinds.is_large_string(name)),
        ("input_ids", tokens, is_list and kinds.is_integer(tokens.value_type)),
    ):
        if not fits:
            raise UserError(f"{file}: the column {column!r} holds {kind}; {cure}")
