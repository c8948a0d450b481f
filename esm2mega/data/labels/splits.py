"""Cuts one table of labelled proteins into splits: by chance, by clusters of relatives, or by a column.

Equal sequences never come into different splits, except where a column names the split of each row. What is
drawn depends on `data.split_seed`, the shares and the proteins, and not on their order or the seed of the
run: models of several seeds are tested on the same proteins.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.config.split import CLUSTER, RANDOM, SPLITS, part_names, split_column, split_shares
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.numbers import write_number
from esm2mega.data.labels.rows import MASK_FILE, Row, Table
from esm2mega.data.labels.sets import SPLIT_WORDS
from esm2mega.data.leakage.clusters import divide_apart
from esm2mega.errors import UserError
from esm2mega.files import replacing
from esm2mega.parallel.errors import on_one_rank

Numbers = npt.NDArray[np.int64]

TRAIN, VALID, TEST = SPLITS

FOLDER = "splits"
"""Holds, in the directory of a run, the splits of its table as tables of their own."""

MASKS = "masks.fasta"
"""Names the file of masks beside the tables, which `task.mask_file` takes; only where it was set."""


def with_split_column(task: TaskConfig, data: DataConfig) -> TaskConfig:
    """Return the section with the column by which rows are split among those that are read."""
    column = split_column(data)
    if column is None:
        return task
    if column in task.target_columns:
        raise UserError(
            f"data.split_by={column} is in task.target_columns too: labels cannot say which split a row is "
            "of; name another column"
        )
    return replace(task, target_columns=[*task.target_columns, column])


def cut(table: Table, data: DataConfig) -> dict[str, Table]:
    """Cut a table into splits as the section says; all ranks call this together.

    Args:
        table: The table, read with `with_split_column`.
        data: The section, in which one table is to be cut.

    Raises:
        UserError: A split would be empty, or a cell does not say a split.
    """
    column, shares = split_column(data), split_shares(data)
    if shares is None:
        assert column is not None
        found = rows_by_split(table, column)
        if TRAIN not in found:
            raise UserError(f"data.split_by={column}: no row of {table.path} has train there; give some")
        return found
    texts = [_text(tokens) for _, _, tokens, _ in table.rows]
    sequences = sorted(set(texts))
    place = {text: number for number, text in enumerate(sequences)}
    owners = np.array([place[text] for text in texts], dtype=np.int64)
    counts = np.bincount(owners, minlength=len(sequences))

    def divide(groups: Numbers) -> Numbers:
        return _divided(groups, counts, shares, data.split_seed)

    if column is not None:
        groups = _groups_of(table, column, owners, len(sequences))
        parts, words = divide(groups), f"whole groups of the column {column!r}"
    elif data.split_by == RANDOM:
        groups = np.arange(len(sequences))
        parts, words = divide(groups), "at random"
    else:
        identity = float(data.split_by.removeprefix(CLUSTER))
        parts, groups, method = on_one_rank(lambda: divide_apart(sequences, identity, divide))
        words = f"whole clusters of {identity:g} identity (by {method})"
    names = np.array(part_names(data))
    num_groups = len(np.unique(groups))
    for number, name in enumerate(names.tolist()):
        if number not in parts:
            raise UserError(
                f"data.split={data.split}: no protein is left for part {number + 1} ({name}), since the "
                f"{len(table.rows)} proteins of {table.path} are {num_groups} groups that "
                f"data.split_by={data.split_by} keeps together; give more proteins, or another data.split_by"
            )
    chosen = {
        split: np.flatnonzero(names[parts[owners]] == split).tolist() for split in SPLITS if split in names
    }
    sizes = " / ".join(str(len(rows)) for rows in chosen.values())
    note = f"{table.path} is split into {sizes} proteins, {words}, of which there are {num_groups}"
    if data.split_by == RANDOM:
        note = f"{table.path} is split into {sizes} proteins at random, equal sequences together"
    return {
        name: Table(table.path, f"data.{name}", [_without(table.rows[row], column) for row in rows], notes)
        for (name, rows), notes in zip(chosen.items(), ([*table.notes, note], [], []), strict=False)
    }


def rows_by_split(table: Table, column: str) -> dict[str, Table]:
    """Give each row to the split that a column names.

    Args:
        table: The table, with cells of the column.
        column: The column.
    """
    rows: dict[str, list[Row]] = {}
    for row in table.rows:
        word = str(row[3][column]).strip().lower()
        if word not in SPLIT_WORDS:
            raise UserError(f"{row[0]}: {column}={row[3][column]!r} is not one of {', '.join(SPLIT_WORDS)}")
        rows.setdefault(SPLIT_WORDS[word], []).append(_without(row, column))
    ordered = {split: rows[split] for split in SPLITS if split in rows}
    notes = {TRAIN: table.notes}
    return {
        split: Table(table.path, f"data.{split}", found, notes.get(split, []))
        for split, found in ordered.items()
    }


def write_splits(
    run_dir: str, tables: Mapping[str, Table], columns: Sequence[str], numbers: str, is_resumed: bool
) -> None:
    """Write the splits as tables that `evaluate` reads, and masks of `task.mask_file` beside them.

    The tables hold ids, sequences and labels. One process calls this.

    Args:
        run_dir: Directory of the run.
        tables: The splits, from `cut`.
        columns: Columns of labels and masks.
        numbers: How `evaluate` will read numbers from the text: `data.numbers`.
        is_resumed: Whether the run goes on, with which another split would mix training and test.

    Raises:
        UserError: The run goes on, and its splits were others.
    """
    folder = Path(run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        path = split_file(run_dir, split)
        before = path.read_bytes() if path.is_file() and is_resumed else None
        with replacing(path) as partial:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["id", "sequence", *columns])
                for _, name, tokens, cells in table.rows:
                    writer.writerow(
                        [name, _text(tokens), *(_cell(cells[column], numbers) for column in columns)]
                    )
            if before is not None and partial.read_bytes() != before:
                raise UserError(
                    f"{path}: the run was begun with another split than data.train and data.split give now; "
                    "set the keys of data back, have MMseqs2 as it was, or choose another run_dir"
                )
    rows = [row for table in tables.values() for row in table.rows]
    if MASK_FILE in rows[0][3]:
        # Proteins that a table repeats have one mask.
        masks = {name: cells[MASK_FILE] for _, name, _, cells in rows}
        with replacing(folder / MASKS) as partial:
            partial.write_text("".join(f">{name}\n{mask}\n" for name, mask in masks.items()), "utf-8")


def split_file(run_dir: str | Path, split: str) -> Path:
    """Return the table that `write_splits` writes for a split."""
    return Path(run_dir) / FOLDER / f"{split}.csv"


def training_table(run_dir: Path) -> Path | None:
    """Return the table of the proteins that a run was trained on, if `write_splits` wrote it."""
    path = split_file(run_dir, TRAIN)
    return path if path.is_file() else None


def num_in_table(proteins: LabelledProteins, table: Path) -> int:
    """Return how many proteins have their sequence in a table that `write_splits` wrote.

    Raises:
        UserError: The table has no sequences any more.
    """
    try:
        with table.open(newline="", encoding="utf-8") as file:
            there = {row["sequence"] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(f"{table}: cannot be read as the table that the run wrote; put it back") from None
    return sum(_text(proteins.residues(row)) in there for row in range(len(proteins)))


def _text(tokens: npt.NDArray[np.uint8]) -> str:
    # J is read as <unk> again; X has a token of its own.
    return vocabulary.decode(tokens).replace("<unk>", "J")


def with_masks_beside(task: TaskConfig, path: str | Path) -> TaskConfig:
    """Return the section with the masks that `write_splits` wrote beside a table, unless others are set."""
    masks = Path(path).parent / MASKS
    is_written = masks.parent.name == FOLDER and masks.is_file()
    if not is_written or task.mask_file is not None or task.mask_column is not None:
        return task
    return replace(task, mask_file=str(masks))


def _groups_of(table: Table, column: str, owners: Numbers, count: int) -> Numbers:
    """Return the group of each distinct sequence, ``[count]``, as a column says."""
    groups = np.full(count, -1, dtype=np.int64)
    numbers: dict[str, int] = {}
    for owner, (location, _, _, cells) in zip(owners.tolist(), table.rows, strict=True):
        cell = cells[column]
        if cell is None or not str(cell).strip():
            raise UserError(f"{location}: the column {column!r} of groups is empty; complete the row")
        number = numbers.setdefault(str(cell).strip(), len(numbers))
        if groups[owner] == -1:
            groups[owner] = number
        elif groups[owner] != number:
            raise UserError(
                f"{location}: the sequence is in another group of the column {column!r} already; equal "
                "sequences must be of one group"
            )
    return groups


def _divided(groups: Numbers, counts: Numbers, shares: Sequence[float], seed: int) -> Numbers:
    """Return the part of each sequence, so that no group is divided and the parts come near the shares.

    Large groups are placed first, groups of one size in drawn order, each into the part that lacks most.

    Args:
        groups: Group of each sequence, ``[n]``.
        counts: Number of proteins with that sequence, ``[n]``.
        shares: Share of each part.
        seed: Seed of the order.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    sizes = np.bincount(numbers, weights=counts).astype(np.int64)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    order = drawn[np.argsort(-sizes[drawn], kind="stable")]
    lacks = np.array(shares) * counts.sum()
    part_of = np.zeros(len(sizes), dtype=np.int64)
    for group in order.tolist():
        part = int(np.argmax(lacks))
        part_of[group] = part
        lacks[part] -= sizes[group]
    return part_of[numbers]


def _without(row: Row, column: str | None) -> Row:
    location, name, tokens, cells = row
    return location, name, tokens, {key: cell for key, cell in cells.items() if key != column}


def _cell(cell: object, numbers: str) -> object:
    if cell is None:
        return ""
    # A spreadsheet has numbers, which this table has as text.
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return write_number(cell, numbers)
    return json.dumps(cell) if isinstance(cell, (list, dict)) else cell
