"""Reads proteins that a program holds in memory: pairs, rows, and tables of pandas, polars or Hugging Face.

Three forms are taken, each of many types:

    pairs     ``(sequence, value)``: a list, an array, a map-style data set of torch, a generator
    rows      dictionaries of cells by column: a list, a streamed data set
    tables    cells by column: a dictionary of lists, a data frame, an Arrow table, a data set of Hugging Face

Cells of rows and tables have the columns that the configuration names, as those of a file have. Rows are
numbered by their place, whatever the index of a data frame says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.config.task import masks_of
from esm2mega.data.labels.rows import Row, Table
from esm2mega.data.labels.tokenised import INPUT_IDS, tokens_of_ids
from esm2mega.data.readers.base import require_columns, residues_of
from esm2mega.data.readers.columns import refuse_variant, variant_at
from esm2mega.data.readers.settings import options_of
from esm2mega.errors import UserError

Proteins = Any
"""Stands for proteins in one of the three forms."""

_ROWS = "rows {column: cell}, or a table of columns, such as a data frame or a dictionary of lists"
_PAIRS = f"give pairs (sequence, value), {_ROWS}"
_SEQUENCES = f"give a list of sequences, {_ROWS}"
_CURE = (
    "correct data.sequence_column (with data.wild_type: data.mutation_column), task.target_columns or "
    "task.mask_column, or rename it"
)


def table_in_memory(given: Proteins, task: TaskConfig, data: DataConfig, name: str) -> Table:
    """Return every protein with the cells of its labels, as `esm2mega.data.labels.rows.read_table` does.

    The arguments are those of `labelled_in_memory`.
    """
    for option in ("label_file", "mask_file"):
        if getattr(task, option) is not None:
            raise UserError(f"{name}: pairs hold their labels themselves; set task.{option}=null")
    rows = list(labelled_in_memory(given, task, data, name))
    if not rows:
        raise UserError(f"{name}: holds no proteins; give some")
    return Table(Path(name), name, rows, [])


def labelled_in_memory(given: Proteins, task: TaskConfig, data: DataConfig, name: str) -> Iterator[Row]:
    """Yield every protein with the cells of its labels, in the form of the rows of a table.

    With several target columns the value of a pair is a sequence of values, one for each.

    Args:
        given: Proteins with labels.
        task: Columns of labels and masks.
        data: Columns of sequences and ids.
        name: Name of `given` for the user, such as ``data.train``.

    Raises:
        UserError: It has none of the forms, or an entry is bad; the message names the entry.
    """
    masks = [mask for mask in masks_of(task) if mask is not None]
    options = options_of(data)
    column = options.sequence_column
    required = [column, *task.target_columns, *dict.fromkeys(masks)]
    optional = [] if column != INPUT_IDS else ["attention_mask"]
    optional += [data.id_column or "id"]
    for number, entry in enumerate(_entries(given, required, optional, name, _PAIRS)):
        location = f"{name}[{number}]"
        if isinstance(entry, Mapping):
            require_columns(location, list(entry), required, _CURE)
            cells = {column: _cell(value) for column, value in entry.items()}
        else:
            sequence, value = _pair(entry, location)
            if masks:
                raise UserError(
                    f"{location}: a pair has no column for task.mask_column={task.mask_column}; give rows or "
                    "a table, or set task.mask_column=null"
                )
            cells = {column: sequence, **_by_column(_cell(value), task, location)}
        identifier = cells.get(data.id_column or "id")
        if identifier is None:
            identifier = number if options.wild_type is None else cells[column]
        identifier = str(identifier)
        if column == INPUT_IDS:
            yield location, identifier, tokens_of_ids(cells, location), cells
            continue
        text = _text(cells[column], location)
        if options.wild_type is not None:
            text = variant_at(location, text, options)
        else:
            refuse_variant(location, text, column)
        yield location, identifier, vocabulary.encode_residues(residues_of(text, location, identifier)), cells


def sequences_in_memory(given: Proteins, column: str, name: str = "sequences") -> list[str]:
    """Return sequences without labels: a list of them, or the column of sequences of rows or a table.

    Args:
        given: The sequences.
        column: Column of the sequences: `data.sequence_column`.
        name: Name of `given` for the user.

    Raises:
        UserError: It is something else, or an entry is.
    """
    found = []
    for number, entry in enumerate(_entries(given, [column], [], name, _SEQUENCES)):
        location = f"{name}[{number}]"
        if isinstance(entry, Mapping):
            require_columns(location, list(entry), [column], "correct data.sequence_column, or rename it")
            entry = entry[column]
        found.append(_text(entry, location))
    return found


def _entries(
    given: Any, required: Sequence[str], optional: Sequence[str], name: str, forms: str
) -> Iterator[Any]:
    """Yield pairs or sequences as they are, and the rows of a table as dictionaries; `forms` is the cure."""
    if isinstance(given, (str, bytes, PathLike)):
        raise UserError(f"{name} is the text {str(given)!r}; {forms}; {_of_files(name)}")
    columns = _columns(given)
    if columns is not None and (isinstance(given, Mapping) or hasattr(type(given), "__len__")):
        require_columns(name, columns, required, _CURE)
        wanted = [*required, *(column for column in optional if column in columns)]
        cells = {column: _column(given, column, name) for column in dict.fromkeys(wanted)}
        lengths = {column: len(values) for column, values in cells.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{column!r} has {count}" for column, count in lengths.items())
            raise UserError(
                f"{name}: its columns have different lengths: {shown}; give each protein all cells"
            )
        for row in zip(*cells.values(), strict=True):
            yield dict(zip(cells, row, strict=True))
    elif hasattr(given, "batch_sampler"):
        raise UserError(f"{name} is a {type(given).__name__}, which yields batches; give its data set")
    elif hasattr(type(given), "__iter__"):
        yield from given
    elif hasattr(type(given), "__len__") and hasattr(type(given), "__getitem__"):
        # A map-style data set of torch need not end by itself, so it is asked for its length.
        for number in range(len(given)):
            yield given[number]
    else:
        raise UserError(f"{name} is of type {type(given).__name__}; {forms}")


def _columns(given: Any) -> list[Any] | None:
    """Return the names of the columns of a table; None if it is no table."""
    if isinstance(given, Mapping):
        return list(given)
    for attribute in ("column_names", "columns"):
        names = getattr(given, attribute, None)
        if isinstance(names, Iterable) and not isinstance(names, str):
            return list(names)
    return None


def _column(given: Any, column: str, name: str) -> list[Any]:
    values = given[column]
    for method in ("to_pylist", "to_list", "tolist"):
        if callable(getattr(values, method, None)):
            return list(getattr(values, method)())
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise UserError(f"{name}: the column {column!r} is one {type(values).__name__}; give a list of cells")
    return list(values)


def _pair(entry: Any, location: str) -> tuple[Any, Any]:
    """Return sequence and value of a pair; text of two letters is none."""
    is_row = hasattr(type(entry), "__len__") and hasattr(type(entry), "__getitem__")
    if not is_row or isinstance(entry, (str, bytes)) or len(entry) != 2:
        shown = repr(entry) if len(repr(entry)) < 60 else f"{repr(entry)[:56]}…"
        raise UserError(f"{location} is {shown}, not a pair; {_PAIRS}")
    return _cell(entry[0]), entry[1]


def _by_column(value: Any, task: TaskConfig, location: str) -> dict[str, Any]:
    """Return the value of a pair as cells by column."""
    columns = task.target_columns
    if isinstance(value, Mapping):
        require_columns(location, list(value), columns, "correct task.target_columns, or rename it", "key")
        return {column: _cell(value[column]) for column in columns}
    values = value if len(columns) > 1 and isinstance(value, list) else [value]
    if len(values) != len(columns):
        raise UserError(
            f"{location}: {len(values)} values for task.target_columns={columns}; give one for each"
        )
    return dict(zip(columns, values, strict=True))


def _text(value: Any, location: str) -> str:
    if not isinstance(value, str):
        what = "missing" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{location}: the sequence is {what}, not text; give its letters as str")
    if not value.strip():
        raise UserError(f"{location} is empty; give residues")
    return value


def _cell(value: Any) -> Any:
    """Return a cell in Python's own types, a missing value as None."""
    value = _plain(value)
    is_missing = type(value).__name__ in ("NAType", "NaTType")  # of pandas
    return None if is_missing or (isinstance(value, float) and math.isnan(value)) else value


def _plain(value: Any) -> Any:
    """Return arrays and tensors as lists or numbers, also within lists."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [entry if type(entry) in (str, int, float) else _plain(entry) for entry in value]
    return value


def _of_files(name: str) -> str:
    if name.startswith("data."):
        return f"a file is named by {name}=FILE"
    return "files are read by `esm2mega predict` and `esm2mega embed`"
