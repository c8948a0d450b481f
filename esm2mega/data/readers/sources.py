"""Chooses the reader of an input by its name, or by the format that the user gave."""

from __future__ import annotations

import difflib
from pathlib import Path

from esm2mega.data.readers.base import ByteProgress, RecordSource, SourceOptions
from esm2mega.data.readers.esm2fa import Esm2faReader, is_data_set
from esm2mega.data.readers.excel import ExcelReader
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.readers.megatron import MegatronReader
from esm2mega.data.readers.parquet import ParquetReader
from esm2mega.data.readers.tables import CsvReader, JsonLinesReader
from esm2mega.data.readers.tape import TapeReader
from esm2mega.errors import UserError
from esm2mega.files import split_sheet

TABLES = ("csv", "jsonl", "parquet", "excel")
"""Names the formats with columns among `FORMATS`."""

FORMATS = ("fasta", "csv", "jsonl", "parquet", "excel", "megatron", "tape", "esm2fa")

_COMPRESSION_ENDINGS = (".gz", ".zst")
_FORMAT_OF_ENDING = {
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods"), "excel"),
    **dict.fromkeys((".idx", ".bin"), "megatron"),
    **dict.fromkeys((".lmdb", ".mdb"), "tape"),
}


def open_source(
    path: str | Path, options: SourceOptions, progress: ByteProgress | None = None
) -> RecordSource:
    """Return the reader of an input, whose head is checked at once.

    Args:
        path: a file; for TAPE also the directory that holds `data.mdb`, for ESM2-FA a shard or a directory of
            shards.
        options: how to read it. Without a format, the ending of the name decides; files with other endings
            are read as FASTA.
        progress: told about bytes of the input as they are read.

    Raises:
        UserError: The file is missing, lacks a column, or is of another format.
    """
    kind = options.format or format_of(Path(path))
    if options.wild_type is not None and kind not in TABLES:
        raise UserError(
            f"{path}: data.wild_type is set, and variants are read from tables ({', '.join(TABLES)}), not "
            f"from {kind}; give a table with a column of variants, or data.wild_type=null"
        )
    if kind == "fasta":
        return FastaReader(path, progress)
    if kind == "csv":
        return CsvReader(path, options, progress)
    if kind == "jsonl":
        return JsonLinesReader(path, options, progress)
    if kind == "parquet":
        return ParquetReader(path, options, progress)
    if kind == "excel":
        return ExcelReader(path, options, progress)
    if kind == "megatron":
        return MegatronReader(path, progress)
    if kind == "tape":
        return TapeReader(path, progress)
    if kind == "esm2fa":
        return Esm2faReader(path, progress)
    near = difflib.get_close_matches(kind, FORMATS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--format {kind} is not one of {', '.join(FORMATS)}{hint}")


def format_of(path: Path) -> str:
    """Return the format that the name of an input implies."""
    if (path / "data.mdb").is_file():
        return "tape"
    if is_data_set(path):
        return "esm2fa"
    return _FORMAT_OF_ENDING.get(_ending(path), "fasta")


def is_known_ending(path: Path) -> bool:
    """Tell whether the ending of a name decides the format."""
    return _ending(path) in _FORMAT_OF_ENDING


def _ending(path: Path) -> str:
    """Return the ending of a name in lower case, without those of compression."""
    endings = [ending.lower() for ending in split_sheet(path)[0].suffixes]
    while endings and endings[-1] in _COMPRESSION_ENDINGS:
        endings.pop()
    return endings[-1] if endings else ""
