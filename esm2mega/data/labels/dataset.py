"""Reads proteins with labels into memory, from a table or from what a program holds, for fine-tuning.

`LabelledProteins` offers what samples and packs need of a token store, so that order, crops and packs of
labelled proteins are made by the same code as those of pretraining.

Legend: ``n`` proteins, ``k`` outputs, ``m`` target columns, ``L`` residues of a protein.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig, TaskConfig
from esm2mega.config.task import classes_of_columns
from esm2mega.data.labels.degenerate import SplitLabels, label_notes
from esm2mega.data.labels.forms import column_form
from esm2mega.data.labels.in_memory import Proteins, table_in_memory
from esm2mega.data.labels.readers import TargetReader, join_labels, target_reader
from esm2mega.data.labels.repeats import repeat_notes
from esm2mega.data.labels.rows import Table, limited, read_table, with_mask_file
from esm2mega.data.labels.schema import IGNORED, TargetInfo
from esm2mega.data.readers.base import residues_of
from esm2mega.errors import UserError
from esm2mega.parallel.errors import on_one_rank


@dataclass(frozen=True, eq=False)
class LabelledProteins:
    """Holds proteins, their ids and their labels.

    Attributes:
        path: Where the proteins come from, for messages.
        ids: Ids of the n proteins, repeats allowed.
        tokens: Residues of all proteins back to back, uint8 ``[sum L]``.
        offsets: Where each protein begins in `tokens`, and the end, int64 ``[n + 1]``.
        labels: For labels of proteins float64 ``[n, k]`` or int64 ``[n]``; for labels of residues either
            type, ``[sum L, m]``; None where there are no labels, for prediction.
        per_residue: Whether labels are stored by residue.
        per_pair: Whether the labels are coordinates, float64 ``[sum L, 3]``, from which the labels of pairs
            of residues follow.
        notes: What the user should know about how the proteins were read.
    """

    path: Path
    ids: Sequence[str]
    tokens: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[Any] | None = None
    per_residue: bool = False
    per_pair: bool = False
    notes: list[str] = field(default_factory=list)

    clusters = None
    """This is None because labelled proteins are not sampled by clusters."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Return where each protein begins in `tokens`, ``[n]``."""
        return self.offsets[:-1]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of residues of each protein, ``[n]``."""
        return np.diff(self.offsets)

    def id(self, row: int) -> str:
        """Return the id of a protein."""
        return self.ids[row]

    def residues(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the token ids of a protein's residues, ``[L]``."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def num_missing(self) -> int:
        """Return the number of labels that are missing or masked."""
        if self.labels is None:
            return 0
        return int((self.is_missing.any(axis=1) if self.per_pair else self.is_missing).sum())

    @property
    def is_missing(self) -> npt.NDArray[np.bool_]:
        """Return whether each label is missing or masked, in the shape of `labels`, which may not be None."""
        assert self.labels is not None
        return np.isnan(self.labels) if self.labels.dtype.kind == "f" else self.labels == IGNORED

    @property
    def fingerprint(self) -> str:
        """Return a hash that is equal for equal proteins and labels in the same order; ids do not count."""
        digest = hashlib.sha256(self.offsets.tobytes() + self.tokens.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def select(self, rows: npt.NDArray[np.int64], notes: Sequence[str] = ()) -> LabelledProteins:
        """Return the proteins of these rows, in the order of `rows`."""
        kept = [self.residues(row) for row in rows.tolist()]
        labels = self.labels
        if labels is not None and not self.per_residue:
            labels = labels[rows]
        elif labels is not None:
            spans = [labels[self.offsets[row] : self.offsets[row + 1]] for row in rows.tolist()]
            labels = np.concatenate(spans) if spans else labels[:0]
        return LabelledProteins(
            self.path,
            [self.ids[row] for row in rows.tolist()],
            np.concatenate(kept) if kept else self.tokens[:0],
            _offsets(map(len, kept)),
            labels,
            self.per_residue,
            self.per_pair,
            [*self.notes, *notes],
        )


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)


@dataclass(frozen=True)
class _Row:
    """Holds one protein of a table."""

    location: str
    id: str
    tokens: npt.NDArray[np.uint8]
    label: Any


def read_labelled(
    path: str | Path,
    task: TaskConfig,
    data: DataConfig,
    info: TargetInfo | None,
    key: str,
    loaded: TargetInfo | None = None,
) -> tuple[LabelledProteins, TargetInfo]:
    """Read proteins with labels; too long ones are refused, dropped or kept as in `apply_length_policy`.

    All ranks call this together.

    Args:
        path: CSV, JSON lines, Parquet or FASTA file, also compressed.
        task: Section that says which columns hold what.
        data: Columns of sequences and ids, and the greatest length.
        info: Targets of the training data, whose classes and scale hold here too; None to learn them here.
        key: Name of `path` for the user, such as ``data.train``.
        loaded: Targets of a head that was trained before; see `TargetReader.learn`.

    Raises:
        UserError: The file is no such table, or a cell is bad.
    """
    table = read_table(path, task, data, key)
    return label(table, task, data, agreed_forms(task, [table], info), info, loaded)


def proteins_of_pairs(
    given: Proteins,
    task: TaskConfig,
    info: TargetInfo | None,
    name: str,
    data: DataConfig | None = None,
    loaded: TargetInfo | None = None,
) -> tuple[LabelledProteins, TargetInfo]:
    """Make labelled proteins of what a program holds in memory; the arguments are those of `read_labelled`.

    Without `data`, proteins may have any length.
    """
    table = table_in_memory(given, task, data or DataConfig(), name)
    return label(table, task, data, agreed_forms(task, [table], info), info, loaded)


def agreed_forms(task: TaskConfig, tables: Sequence[Table], info: TargetInfo | None = None) -> list[str]:
    """Return the form of each column of classes of residues; rank 0 decides, all ranks call this together.

    Args:
        task: Section that names the columns.
        tables: All splits.
        info: Targets of the training data; None if they are among `tables`.

    Raises:
        UserError: Cells of a column have several forms; see `esm2mega.data.labels.forms`.
    """
    if task.kind != "token_classification":
        return []
    known = [] if info is None else info.forms
    return on_one_rank(
        lambda: [
            column_form(
                column,
                (
                    (location, cells[column], len(tokens))
                    for table in tables
                    for location, _, tokens, cells in table.rows
                ),
                known[number] if number < len(known) else None,
                classes_of_columns(task)[number] or (),
            )
            for number, column in enumerate(task.target_columns)
        ]
    )


def label(
    table: Table,
    task: TaskConfig,
    data: DataConfig | None,
    forms: Sequence[str],
    info: TargetInfo | None,
    loaded: TargetInfo | None = None,
) -> tuple[LabelledProteins, TargetInfo]:
    """Read the labels of a table; `forms` is from `agreed_forms`, the rest as for `read_labelled`."""
    written = DataConfig.numbers if data is None else data.numbers
    table = limited(table, data)
    reader = target_reader(with_mask_file(task), forms, written)
    rows = [
        _Row(location, name, tokens, reader.read(cells, location, len(tokens)))
        for location, name, tokens, cells in table.rows
    ]
    notes = list(table.notes)
    if data is not None:
        rows = _fitting(rows, data, table.key, notes)
    return _numbered(table.path, rows, reader, info, loaded, table.key, notes)


def _fitting(rows: list[_Row], data: DataConfig, key: str, notes: list[str]) -> list[_Row]:
    """Return the rows that the length policy keeps; nothing is learned from the labels of the others."""
    lengths = np.array([len(row.tokens) for row in rows])
    kept, note = _choose(lengths, lambda number: rows[number].id, data, key)
    if note is not None:
        notes.append(note)
    return [rows[number] for number in kept.tolist()]


def _numbered(
    path: Path,
    rows: Sequence[_Row],
    reader: TargetReader,
    known: TargetInfo | None,
    loaded: TargetInfo | None,
    key: str,
    notes: list[str],
) -> tuple[LabelledProteins, TargetInfo]:
    """Return rows as labelled proteins with the meaning of their labels, which is learned unless `known`."""
    info = known or reader.learn([row.label for row in rows], loaded)
    labels = join_labels((reader.encode(row.label, info, row.location) for row in rows), info.per_residue)
    offsets = _offsets(len(row.tokens) for row in rows)
    split = SplitLabels(key, labels, offsets, [row.location for row in rows], trains=known is None)
    notes += label_notes(split, info, reader.task.target_columns)
    ids, tokens = [row.id for row in rows], np.concatenate([row.tokens for row in rows])
    notes += repeat_notes(split, tokens, info.per_residue)
    return LabelledProteins(path, ids, tokens, offsets, labels, info.per_residue, info.per_pair, notes), info


def proteins_of_sequences(sequences: Sequence[str]) -> LabelledProteins:
    """Make proteins to predict from text; their ids are their numbers."""
    tokens = [
        vocabulary.encode_residues(residues_of(sequence, f"sequences[{number}]", str(number)))
        for number, sequence in enumerate(sequences)
    ]
    for number, residues in enumerate(tokens):
        if not len(residues):
            raise UserError(f"sequences[{number}] is empty; give residues")
    if not tokens:
        raise UserError("sequences holds no proteins; give some")
    ids = [str(number) for number in range(len(tokens))]
    return LabelledProteins(Path("sequences"), ids, np.concatenate(tokens), _offsets(map(len, tokens)))


def apply_length_policy(proteins: LabelledProteins, data: DataConfig, key: str) -> LabelledProteins:
    """Refuse, drop or keep (for cropping) the proteins that are too long, as `data.too_long` says.

    Raises:
        UserError: A protein is too long, or all are dropped.
    """
    kept, note = _choose(proteins.lengths, proteins.id, data, key)
    return proteins if note is None else proteins.select(kept, [note])


def _choose(
    lengths: npt.NDArray[np.int64], id_of: Callable[[int], str], data: DataConfig, key: str
) -> tuple[npt.NDArray[np.int64], str | None]:
    """Return the numbers of the proteins that are kept, and a note for the user or None."""
    limit = data.max_seq_length - 2
    long = np.flatnonzero(lengths > limit)
    kept = np.arange(len(lengths))
    if not len(long):
        return kept, None
    count = f"{len(long)} of {len(lengths)} proteins of {key} have more than {limit} residues"
    if data.too_long == "error":
        first = int(long[0])
        raise UserError(
            f"{count}, first {id_of(first)!r} with {lengths[first]}; set data.too_long=crop or drop, "
            f"or raise data.max_seq_length={data.max_seq_length}"
        )
    if data.too_long == "crop":
        return kept, f"{count} and are cropped ({data.crop})"
    kept = np.flatnonzero(lengths <= limit)
    if not len(kept):
        raise UserError(f"{count}, so none is left; raise data.max_seq_length={data.max_seq_length}")
    return kept, f"{count} and are left out"
