"""Random tables of labels for Hypothesis: a kind of task, an encoding, a sign for no label, a format of file.

Most tables are plain: their rows are whole and written alike. In the others one row is damaged, or written in
another way.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from esm2mega.config.schema import TaskConfig

_TABLES = ("csv", "tsv", "excel", "label csv", "jsonl", "parquet")
_TEXTS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.dictionary(pa.int32(), pa.string()),
]
_ONE_CHARACTER = (["C", "H", "E"], ["0", "1", "2"])
_WORDS = (*_ONE_CHARACTER, ["0", "1", "10"], ["helix", "NA", "H"], ["007", "8", "x-y"], ["False", "True"])
_NAMES = ("nucleus", "Golgi apparatus", "binding, metal", "0", "NA", "(R)", "007")


@dataclass(frozen=True)
class Table:
    """A table to write.

    Attributes:
        kind: A value of `task.kind`, or ``flags`` for multilabel by columns.
        lengths: Number of residues of each protein.
        meanings: What each row says: a list of labels, or a single one; None among them stands for no label.
        cells: The cell of each row, for flags the cells.
        formats: Formats of files in which such cells can be written.
        damaged: Number of the row that cannot be read; None if all can be.
        is_plain: Whether all rows are whole and written alike.
        classes: The classes that the user declares.
    """

    kind: str
    lengths: list[int]
    meanings: list[Any]
    cells: list[Any]
    formats: Sequence[str]
    damaged: int | None = None
    is_plain: bool = True
    classes: list[str] | None = None

    @property
    def task(self) -> TaskConfig:
        columns = ["u", "v"] if self.kind == "flags" else ["target"]
        kind = "multilabel" if self.kind == "flags" else self.kind
        return TaskConfig(kind=kind, target_columns=columns, classes=self.classes)


def _python(entry: Any) -> str:
    return "nan" if isinstance(entry, float) and math.isnan(entry) else repr(entry)


def _words(between: str, missing: str) -> Callable[[Sequence[Any]], str]:
    return lambda entries: between.join(missing if entry is None else str(entry) for entry in entries)


LISTS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "json": lambda entries: json.dumps(list(entries)),
    "tight json": lambda entries: json.dumps(list(entries), separators=(",", ":")),
    "python": lambda entries: f"[{', '.join(map(_python, entries))}]",
    "tuple": lambda entries: f"({', '.join(map(_python, entries))}{',' if len(entries) == 1 else ''})",
    "numpy": lambda entries: str(np.array(entries, dtype=object if None in entries else None)),
    "native": list,
}
WORDS: dict[str, Callable[[Sequence[Any]], str]] = {
    "words": _words(" ", "null"),
    "commas": _words(", ", "null"),
    "tight commas": _words(",", "None"),
}


def _formats(encoding: str) -> Sequence[str]:
    """A header of a FASTA has no blanks; lists are values in two formats only."""
    if encoding == "native":
        return "jsonl", "parquet"
    if encoding == "characters":
        return *_TABLES, "fasta", "label fasta"
    return (*_TABLES, "fasta") if encoding.startswith("tight") else _TABLES


def _entries(names: Sequence[str | None], filler: Any, typed: bool) -> list[Any]:
    """The names of residues as entries of a list, with the sign for no label.

    Args:
        names: Classes of a protein.
        filler: None, -100 or NaN. Beside NaN pandas makes fractions of whole numbers.
        typed: Whether names that are whole numbers, or True and False, are written as such.
    """
    there = [name for name in names if name is not None]
    entries: list[Any] = list(names)
    if typed and all(name in ("True", "False") for name in there) and filler != -100:
        entries = [None if name is None else name == "True" for name in names]
    elif typed and all(name.isdecimal() and str(int(name)) == name for name in there):
        number = float if isinstance(filler, float) else int
        entries = [None if name is None else number(name) for name in names]
    elif filler == -100:
        filler = "-100"
    return [filler if entry is None else entry for entry in entries]


@st.composite
def _classes_of_residues(draw: st.DrawFn, encoding: str, lengths: list[int]) -> Table:
    pool: list[Any] = list(draw(st.sampled_from(_ONE_CHARACTER if encoding == "characters" else _WORDS)))
    filler, typed = draw(st.sampled_from([None, -100, math.nan])), draw(st.booleans())
    has_blank = encoding not in WORDS and draw(st.integers(0, 3)) == 0
    pool = ["H", "E", " "] if has_blank else pool
    has_missing = encoding != "characters" and draw(st.booleans())
    entry = st.sampled_from([*pool, None] if has_missing else pool)
    meanings = [draw(st.lists(entry, min_size=length, max_size=length)) for length in lengths]
    meanings[0][0] = pool[0]

    def written(names: Sequence[str | None], encoding: str) -> Any:
        if encoding == "characters":
            return "".join(name or "" for name in names)
        entries = _entries(names, filler, typed and encoding in LISTS)
        return {**WORDS, **LISTS}[encoding](entries)

    formats = _TABLES if has_blank and encoding != "native" else _formats(encoding)
    table = Table("token_classification", lengths, meanings, [], formats, classes=pool if has_blank else None)
    table = replace(table, cells=[written(names, encoding) for names in meanings])
    row = draw(st.integers(0, len(lengths) - 1))
    names, cell = meanings[row], table.cells[row]
    other = draw(st.sampled_from([*LISTS] if has_blank else [*WORDS, *LISTS]))
    damages: dict[str, Any] = {
        "less": written(names[:-1], encoding),
        "more": written([*names, pool[0]], encoding),
        "blank": f" {cell[1:]}" if encoding == "characters" and not has_blank else None,
        "blank entry": [" ", *names[1:]] if encoding == "native" and not has_blank else None,
        "bracket": cell[:-1] if isinstance(cell, str) and cell[-1] in "])" else None,
        "dots": f"[{' '.join(['0', '...', *'1234'][: len(names)])}]" if len(names) > 1 else None,
        "gaps": f"[0, {' '.join('1' * (len(names) - 1))}]" if len(names) > 2 else None,
        "nested": str([[0]] * len(names)) if encoding == "json" else None,
        "fraction": [0.5, *names[1:]] if encoding == "native" else None,
        "empty": "",
    }
    if draw(st.integers(0, 3)) == 0:
        formats = [name for name in _formats(other) if name in table.formats]
        return _with_cell(replace(table, formats=formats or ["jsonl"]), row, written(names, other))
    return draw(_perhaps_damaged(table, row, damages))


def _with_cell(table: Table, row: int, cell: Any) -> Table:
    cells = [cell if number == row else each for number, each in enumerate(table.cells)]
    return replace(table, cells=cells, is_plain=cells == table.cells)


@st.composite
def _perhaps_damaged(draw: st.DrawFn, table: Table, row: int, damages: Mapping[str, Any]) -> Table:
    """The table, or now and then the table with another cell, which means nothing.

    Args:
        table: A table that is whole.
        row: Number of the row that may be damaged.
        damages: Cells by what is wrong with them; None where it cannot be.
    """
    cells = [cell for cell in damages.values() if cell is not None]
    cell = draw(st.sampled_from(cells))
    if draw(st.booleans()):
        return table
    if isinstance(cell, str) and table.kind == "token_classification":
        # Less text may be text of another form, which means something where no other row tells.
        fits = table.lengths[row] in (len(cell), len(cell.split()))
        cell = "" if fits and cell.replace(" ", "").isalnum() else cell
    formats = table.formats
    if not isinstance(cell, (str, tuple)):
        formats = [name for name in formats if name in ("jsonl", "parquet")] or ["jsonl"]
    changed = replace(table, formats=formats)
    return replace(_with_cell(changed, row, cell), damaged=row, is_plain=False)


@st.composite
def _numbers_of_residues(draw: st.DrawFn, encoding: str, lengths: list[int]) -> Table:
    missing = draw(st.sampled_from([None, math.nan]))
    number = st.integers(-400, 400).map(lambda value: value / 4)
    entry = draw(st.sampled_from([number, number | st.none()]))
    meanings = [draw(st.lists(entry, min_size=length, max_size=length)) for length in lengths]
    meanings[0][0] = 0.25
    write = {**WORDS, **LISTS}[encoding]

    def written(values: Sequence[Any]) -> Any:
        return write([missing if value is None else value for value in values])

    table = Table("token_regression", lengths, meanings, list(map(written, meanings)), _formats(encoding))
    row = draw(st.integers(0, len(lengths) - 1))
    values = meanings[row]
    damages: dict[str, Any] = {
        "less": written(values[:-1]),
        "more": written([*values, 1.0]),
        "word": written(["high", *values[1:]]),
        # Two commas in place of points for four residues: as many numbers as there should be.
        "decimal comma": " ".join(["0,5"] * max(1, len(values) // 2)) if encoding == "words" else None,
        "empty": "",
    }
    return draw(_perhaps_damaged(table, row, damages))


@st.composite
def _several_names(draw: st.DrawFn, encoding: str, lengths: list[int]) -> Table:
    names = st.lists(st.sampled_from(_NAMES), unique=True, max_size=3)
    meanings = [draw(names) for _ in lengths]
    meanings[0] = meanings[0] or ["0"]

    def written(found: Sequence[str]) -> Any:
        if encoding != "semicolons":
            return LISTS[encoding](found)
        # A name with a comma that stands alone could be two.
        return ";".join(found) + (";" if len(found) == 1 and "," in found[0] else "")

    formats = [name for name in _formats(encoding) if "fasta" not in name]
    table = Table("multilabel", lengths, meanings, list(map(written, meanings)), formats)
    row = draw(st.integers(0, len(lengths) - 1))
    damages: dict[str, Any] = {
        "commas": "a, b",
        "numbers": LISTS[encoding]([0, 1]) if encoding in LISTS else "[0, 1]",
        "without quotes": "[a, b]",
        "missing": LISTS[encoding](["a", None]) if encoding in LISTS else "['a', None]",
    }
    return draw(_perhaps_damaged(table, row, damages))


@st.composite
def _one_label(draw: st.DrawFn, kind: str, lengths: list[int]) -> Table:
    if kind == "classification":
        meanings: list[Any] = [draw(st.sampled_from(_NAMES)) for _ in lengths]
        cells: list[Any] = list(meanings)
        damages = {"empty": "", "text": "[0, 1]", "quotes": "['a']", "list": ["a"], "half": 0.5}
    else:
        number = st.integers(-400, 400).map(lambda value: value / 4)
        meanings = [0.25, *(draw(number | st.none()) for _ in lengths[1:])]
        missing = draw(st.sampled_from(["", "nan", "NA", "null", "N/A"]))
        cells = [missing if value is None else repr(value) for value in meanings]
        damages = {"comma": "1,5", "word": "high", "text": "[0.5]", "inf": "inf", "list": [0.5], "two": "1 2"}
    has_blanks = any(" " in cell for cell in cells)
    table = Table(kind, lengths, meanings, cells, _TABLES if has_blanks else (*_TABLES, "fasta"))
    return draw(_perhaps_damaged(table, draw(st.integers(0, len(lengths) - 1)), damages))


@st.composite
def _flags(draw: st.DrawFn, lengths: list[int]) -> Table:
    flag = st.sampled_from([0.0, 1.0, None])
    meanings = [[draw(flag), draw(flag)] for _ in lengths]
    numbers = [{0.0: "0", 1.0: "1", None: ""}, {0.0: "0.0", 1.0: "1.0", None: "NaN"}]
    texts = draw(st.sampled_from([*numbers, {0.0: "False", 1.0: "True", None: ""}]))
    table = Table("flags", lengths, meanings, [[texts[flag] for flag in pair] for pair in meanings], _TABLES)
    row = draw(st.integers(0, len(lengths) - 1))
    damages = {text: (text, table.cells[row][1]) for text in ("2", "yes", "[0]")}
    return draw(_perhaps_damaged(table, row, damages))


KINDS = {
    "token_classification": ["characters", *WORDS, *LISTS],
    "token_regression": [*WORDS, *LISTS],
    "multilabel": ["semicolons", *LISTS],
    "classification": ["text"],
    "regression": ["text"],
    "flags": ["text"],
}
"""The encodings of each kind of labels."""


@st.composite
def tables(draw: st.DrawFn, kind: str, encoding: str) -> tuple[Table, str, Any]:
    """A table, the format to write it in, and the type of a Parquet column of text."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    strategies = {
        "token_classification": _classes_of_residues(encoding, lengths),
        "token_regression": _numbers_of_residues(encoding, lengths),
        "multilabel": _several_names(encoding, lengths),
        "flags": _flags(lengths),
        **{each: _one_label(each, lengths) for each in ("classification", "regression")},
    }
    table = draw(strategies[kind])
    return table, draw(st.sampled_from(table.formats)), draw(st.sampled_from(_TEXTS))


def write(table: Table, format: str, text_type: Any, folder: Path) -> tuple[Path, TaskConfig, list[str]]:
    """Write the table; return the file to read, how it is read, and what a message says for each row."""
    columns, task = table.task.target_columns, table.task
    sequences = ["M" * length for length in table.lengths]
    rows = [list(cell) if len(columns) > 1 else [cell] for cell in table.cells]
    names = [f"p{number}" for number in range(len(rows))]
    if format == "parquet":
        try:
            return (
                _write_parquet(folder / "t.parquet", columns, names, sequences, rows, text_type),
                task,
                [f"{folder}/t.parquet: row {number}: " for number in range(1, len(rows) + 1)],
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            format = "jsonl"  # a column has one type
    if format == "jsonl":
        lines = [
            json.dumps({"id": name, "sequence": sequence, **dict(zip(columns, row, strict=True))})
            for name, sequence, row in zip(names, sequences, rows, strict=True)
        ]
        (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
        return folder / "t.jsonl", task, [f"{folder}/t.jsonl:{line}: " for line in range(1, len(rows) + 1)]
    if format == "fasta":
        headers = [
            f">{name} {columns[0]}={row[0]}\n{sequence}\n"
            for name, sequence, row in zip(names, sequences, rows, strict=True)
        ]
        (folder / "t.fasta").write_text("".join(headers))
        return folder / "t.fasta", task, [f"{folder}/t.fasta:{2 * n + 1}: " for n in range(len(rows))]
    bare = "".join(f">{name}\n{sequence}\n" for name, sequence in zip(names, sequences, strict=True))
    if format == "label fasta":
        (folder / "t.fasta").write_text(bare)
        (folder / "l.fasta").write_text(
            "".join(f">{n}\n{row[0]}\n" for n, row in zip(names, rows, strict=True))
        )
        task = replace(task, label_file=str(folder / "l.fasta"))
        return folder / "t.fasta", task, [f"{folder}/l.fasta:{2 * n + 1}: " for n in range(len(rows))]
    delimiter = {"csv": ",", "label csv": ",", "tsv": "\t", "excel": ";"}[format]
    path = folder / ("l.csv" if format == "label csv" else "t.csv")
    # Where decimals have commas, spreadsheets write semicolons, Windows line ends and a mark at the start.
    with path.open("w", newline="", encoding="utf-8-sig" if format == "excel" else "utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n" if format == "excel" else "\n")
        writer.writerow(["id", "sequence", *columns])
        writer.writerows([n, s, *row] for n, s, row in zip(names, sequences, rows, strict=True))
    if format == "label csv":
        (folder / "t.fasta").write_text(bare)
        task = replace(task, label_file=str(path))
        return folder / "t.fasta", task, [f"{path}:{line}: " for line in range(2, len(rows) + 2)]
    return path, task, [f"{path}:{line}: " for line in range(2, len(rows) + 2)]


def _write_parquet(
    path: Path,
    columns: Sequence[str],
    names: Sequence[str],
    sequences: Sequence[str],
    rows: Sequence[Sequence[Any]],
    text_type: Any,
) -> Path:
    arrays: dict[str, Any] = {"id": names, "sequence": pa.array(sequences, pa.string()).cast(text_type)}
    for number, column in enumerate(columns):
        values = [row[number] for row in rows]
        array = pa.array(values)
        is_list = pa.types.is_list(array.type)
        arrays[column] = array if is_list or not pa.types.is_string(array.type) else array.cast(text_type)
        if is_list and pa.types.is_string(array.type.value_type) and not pa.types.is_dictionary(text_type):
            arrays[column] = array.cast(pa.list_(text_type))
    pq.write_table(pa.table(arrays), path)
    return path
