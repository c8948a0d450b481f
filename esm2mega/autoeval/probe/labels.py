"""Reads the labels of a probe: a table for each split, one table with a column of splits, or a FASTA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.config.split import SPLITS
from esm2mega.data.labels.dataset import LabelledProteins, agreed_forms, label
from esm2mega.data.labels.rows import Table, read_table
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.data.labels.sets import SPLIT_WORDS
from esm2mega.data.labels.splits import rows_by_split
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.readers.settings import options_of
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError

TRAIN, VALID, TEST = SPLITS

SPLIT_COLUMNS = ("split", "set")
"""Columns that are looked for, in this order, unless one is named."""

_ANY_LENGTH = 1 << 30


def read_splits(
    path: Path, task: TaskConfig, data: DataConfig, split_column: str | None
) -> tuple[dict[str, LabelledProteins], TargetInfo]:
    """Read the labelled proteins of each split that there is; only that for tests may be missing.

    Args:
        path: A folder with files such as ``train.csv``, ``valid.csv`` and ``test.csv``; or a table with a
            column of splits; or a FASTA whose headers have ``SET`` and ``VALIDATION``, as FLIP's.
        task: Columns of the labels.
        data: Columns of sequences and ids.
        split_column: Column that says which split a row belongs to; None for one of `SPLIT_COLUMNS`.

    Raises:
        UserError: A split is missing, or a cell is bad.
    """
    tables = _in_folder(path, task, data) if path.is_dir() else _in_file(path, task, data, split_column)
    for split in (TRAIN, VALID):
        if split not in tables:
            raise UserError(
                f"{path}: has no proteins for {split!r}; the head is fitted to 'train' and chosen by "
                "'valid', so give both"
            )
    forms = agreed_forms(task, list(tables.values()))
    data = replace(data, max_seq_length=_ANY_LENGTH)
    train, info = label(tables.pop(TRAIN), task, data, forms, None)
    others = {split: label(table, task, data, forms, info)[0] for split, table in tables.items()}
    return {TRAIN: train, **others}, info


def read_test_split(path: Path, task: TaskConfig, data: DataConfig) -> tuple[LabelledProteins, TargetInfo]:
    """Read the labelled proteins of a table that has no training split beside it.

    Raises:
        UserError: A cell is bad.
    """
    table = read_table(path, task, data, TEST)
    forms = agreed_forms(task, [table])
    return label(table, task, replace(data, max_seq_length=_ANY_LENGTH), forms, None)


def _in_folder(path: Path, task: TaskConfig, data: DataConfig) -> dict[str, Table]:
    tables = {}
    for split in SPLITS:
        found = sorted(file for file in path.iterdir() if SPLIT_WORDS.get(file.name.split(".")[0]) == split)
        if len(found) > 1:
            raise UserError(
                f"{path}: holds {found[0].name} and {found[1].name}; leave one table for each split"
            )
        if found:
            tables[split] = read_table(found[0], task, data, split)
    return tables


def _in_file(path: Path, task: TaskConfig, data: DataConfig, column: str | None) -> dict[str, Table]:
    source = open_source(path, options_of(data))
    if isinstance(source, FastaReader):
        # The names are those by which a reader of headers knows which split is meant.
        return {split: read_table(path, task, data, f"data.{split}") for split in SPLITS}
    available = getattr(source, "columns", [])
    names = SPLIT_COLUMNS if column is None else (column,)
    if (column := next((name for name in names if name in available), None)) is None:
        raise UserError(
            f"{path}: has no column {' or '.join(map(repr, names))}, which says whether a row is for train, "
            "valid or test; name it with --split-column, or give a folder with a table for each"
        )
    if column in task.target_columns:
        raise UserError(
            f"{path}: the column {column!r} says which split a row belongs to, and is in task.target_columns "
            "too; name another with --split-column"
        )
    whole = read_table(path, replace(task, target_columns=[*task.target_columns, column]), data, "--labels")
    return rows_by_split(whole, column)


def fewer_labels(proteins: LabelledProteins, most: int, seed: int) -> LabelledProteins:
    """Return proteins in which at most `most` residues have labels, chosen by the seed."""
    there = np.flatnonzero(~proteins.is_missing.all(axis=1))
    if len(there) <= most:
        return proteins
    assert proteins.labels is not None
    labels = proteins.labels.copy()
    missing = np.nan if labels.dtype.kind == "f" else IGNORED
    labels[np.random.default_rng(seed).permutation(there)[most:]] = missing
    return replace(proteins, labels=labels)
