"""Makes a table for each split of a labelled TAPE task from its LMDB files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.data.benchmarks.names import TAPE_TASKS, TapeTask
from esm2mega.data.benchmarks.tables import MASK, TARGET, LabelledRow, LabelledTables
from esm2mega.data.benchmarks.tape_arrays import load_with_arrays, numbers_of
from esm2mega.data.readers.tape import TapeReader
from esm2mega.data.store.staging import check_new
from esm2mega.errors import UserError

_VALID = "valid_mask"


def prepare_tape(name: str, source: str | Path, out: str | Path) -> list[str]:
    """Write a CSV for each split whose file exists, and a manifest.

    Args:
        name: A name in `TAPE_TASKS`.
        source: Directory with the files, such as ``stability_train.lmdb``, or the directory above it.
        out: Directory to make.

    Returns:
        Lines that say what was written.

    Raises:
        UserError: There is no training split, or a record lacks what the task needs.
    """
    check_new(Path(out))
    task = TAPE_TASKS[name]
    found = {
        split: path for split in task.splits if (path := find_split(Path(source), task, split)) is not None
    }
    if "train" not in found:
        raise UserError(
            f"--source {source}: no {task.folder}_train.lmdb in it; name the directory "
            f"with TAPE's files of {name}"
        )
    rows: dict[str, list[LabelledRow]] = {}
    checksums: dict[str, str] = {}
    for split, path in found.items():
        reader = TapeReader(path, load=load_with_arrays)
        rows[split] = [_row(location, key, record, task) for location, key, record in reader.dictionaries()]
        checksums[path.name] = next(iter(reader.checksums.values()))
    missing = [split for split in task.splits if split not in found]
    notes = [f"{source}: no files of the splits {', '.join(missing)}"] if missing else []
    columns = [TARGET, MASK] if task.masked else [TARGET]
    bare = [row.id for of_split in rows.values() for row in of_split if task.masked and not row.labels[1]]
    if bare and len(bare) < sum(map(len, rows.values())):
        raise UserError(
            f"{source}: {len(bare)} records have no {_VALID!r}, first {bare[0]!r}, and others have one; "
            "copy TAPE's files again"
        )
    if bare:
        # The tables then have no mask, rather than one that hides nothing.
        columns = [TARGET]
        rows = {split: [replace(row, labels=row.labels[:1]) for row in rows[split]] for split in rows}
        notes.append(f"{source}: no record has a {_VALID!r}, so the tables have no column {MASK!r}")
    provenance: dict[str, Any] = {"benchmark": "TAPE", "task": name, "kind": task.kind, "sources": checksums}
    classes = TARGET if task.kind.endswith("classification") else None
    tables = LabelledTables(columns, rows, provenance, notes)
    return tables.write(Path(out), task.kind, classes)


def find_split(source: Path, task: TapeTask, split: str) -> Path | None:
    """Return the LMDB of a split, in a directory or in the folder of the task there, if there is one."""
    name = f"{task.folder}_{split}.lmdb"
    return next((path for path in (source / name, source / task.folder / name) if path.exists()), None)


def _row(location: str, name: str, record: dict[str, Any], task: TapeTask) -> LabelledRow:
    sequence = record["primary"]
    values = numbers_of(record.get(task.field))
    if values is None:
        raise UserError(f"{location}: has no numbers {task.field!r}; is this TAPE's {task.folder}?")
    length = len(sequence)
    shapes = {"token_classification": (length,), "contact": (length, 3)}
    expected = shapes.get(task.kind)
    if values.size != 1 if expected is None else values.shape != expected:
        raise UserError(
            f"{location}: {task.field!r} has the shape {list(values.shape)} for {length} residues"
        )
    cells = _CELLS[task.kind](values, f"{location}: {task.field!r}")
    if not task.masked:
        return LabelledRow(name, sequence, (cells,))
    return LabelledRow(name, sequence, (cells, _mask(location, record, length, task)))


def _mask(location: str, record: dict[str, Any], length: int, task: TapeTask) -> str:
    """Return a 0 or 1 for each residue; empty where a record of secondary structure has no mask.

    Raises:
        UserError: The mask has another length, or a record of contacts has none.
    """
    mask = numbers_of(record.get(_VALID))
    if mask is None and record.get(_VALID) is None and task.kind != "contact":
        return ""
    if mask is None or mask.shape != (length,):
        raise UserError(f"{location}: has no {_VALID!r} of {length} residues; is this TAPE's {task.folder}?")
    return "".join("1" if valid else "0" for valid in mask)


def _number(values: Any, location: str) -> str:
    """Return the shortest text of the one number, in its own precision."""
    (number,) = values.reshape(-1)
    if not np.isfinite(number):
        raise UserError(f"{location} is {number}, not a number; remove the record")
    return str(number)


def _class(values: Any, location: str) -> str:
    (number,) = values.reshape(-1)
    if not np.isfinite(number) or number != np.floor(number):
        raise UserError(f"{location} is {number}; a class is a whole number")
    return str(int(number))


def _letters(values: Any, location: str) -> str:
    """Return a digit for each residue."""
    wrong = ~np.isin(values, range(10))
    if wrong.any():
        residue = int(wrong.argmax())
        raise UserError(f"{location} is {values[residue]} at residue {residue}; a class is 0 to 9")
    return "".join(str(int(value)) for value in values)


def _coordinates(values: Any, location: str) -> str:
    there = np.isfinite(values).all(axis=1)
    # Each number gets the shortest text in its own precision.
    return json.dumps(
        [[float(str(x)) for x in row] if ok else None for row, ok in zip(values, there, strict=True)]
    )


_CELLS: dict[str, Callable[[Any, str], str]] = {
    "regression": _number,
    "classification": _class,
    "token_classification": _letters,
    "contact": _coordinates,
}
"""These write the cell of each kind, given numbers of the right shape and their name for messages."""
