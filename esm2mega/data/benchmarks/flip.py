"""Makes a table for each split of a FLIP task from its published files.

A task with labels of proteins has one FASTA file with the headers

    >Sequence12 TARGET=-1.25e-05 SET=train VALIDATION=False

or a CSV with the same content in the columns ``sequence,target,set,validation``. A task with labels of
residues has the sequences in one file and the labels in another, which has ``SET`` and ``VALIDATION`` in its
headers and a character for each residue; one task has a mask in a third file. A value is everything up to the
next white space: exponents, slashes and leading zeros stay.

Validation proteins have ``SET=train VALIDATION=True``, training proteins any other ``SET=train``, and test
proteins ``SET=test``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esm2mega.config.split import SPLITS
from esm2mega.data.benchmarks.names import FLIP_TASKS, FlipTask, differing
from esm2mega.data.benchmarks.tables import MASK, TARGET, LabelledRow, LabelledTables
from esm2mega.data.labels.cells import LARGEST, check_marks
from esm2mega.data.labels.numbers import plain_number
from esm2mega.data.labels.rows import ResidueStrings
from esm2mega.data.labels.sets import split_of
from esm2mega.data.readers.base import SourceOptions, require_columns, residues_of
from esm2mega.data.readers.fasta import FastaReader, attributes, check_blanks, read_entries
from esm2mega.data.readers.tables import CsvReader
from esm2mega.data.store.staging import check_new
from esm2mega.errors import UserError

_SEQUENCES, _MASKS = ["sequences"], ["resolved", "mask"]
_ENDINGS = (".fasta", ".fasta.gz", ".fasta.zst", ".csv", ".csv.gz", ".csv.zst")


def prepare_flip(
    task_name: str, source: str | Path, out: str | Path, split: str | None = None, other_sizes: bool = False
) -> list[str]:
    """Write ``train.csv``, ``valid.csv``, ``test.csv`` and a manifest of one split of a task.

    Args:
        task_name: A name in `FLIP_TASKS`.
        source: Directory with the files of that task, as published.
        out: Directory to make.
        split: Name of one of the task's splits; None for its default.
        other_sizes: Whether numbers of proteins other than the published ones are accepted, with a note.
            They are refused otherwise: results on another data set are not those of the benchmark, and a
            truncated file looks like another data set.

    Returns:
        Lines that say what was written.

    Raises:
        UserError: A file is missing or not as described above, or sizes differ.
    """
    check_new(Path(out))
    task = FLIP_TASKS[task_name]
    split = split or task.default
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(
            f"--source {source}: is not a directory; name the directory with the files of {task_name}"
        )
    check_split(task_name, split)
    path = _find(folder, sequence_files(task, split)[0])
    read = _read_residue_task if task.per_residue else _read_protein_task
    rows, provenance, notes = read(path, folder, task)
    tables = LabelledTables([TARGET, MASK] if task.masked else [TARGET], rows, provenance, notes)
    found = {name: len(rows[name]) for name in SPLITS}
    other = differing(task.splits[split], found)
    if other and not other_sizes:
        raise UserError(
            f"{path}: {'; '.join(other)}; get the files again, or give --allow-other-sizes if these are meant"
        )
    if not found["train"]:
        raise UserError(f"{path}: no protein with SET=train; is this a file of FLIP?")
    notes += [f"{path}: {text}, taken as it is" for text in other]
    kind = task.kind_of(split)
    classes = None if kind == "regression" else TARGET
    provenance |= {"benchmark": "FLIP", "task": task_name, "split": split, "kind": kind}
    return tables.write(Path(out), kind, classes)


def check_split(task_name: str, split: str | None) -> None:
    """Refuse a split that a task does not have; None means its default."""
    splits = FLIP_TASKS[task_name].splits
    if split is not None and split not in splits:
        raise UserError(
            f"--split {split} is none of {task_name}, which has {', '.join(splits)}; name one of them"
        )


def sequence_files(task: FlipTask, split: str | None = None) -> list[list[str]]:
    """Return the files of one split of a task, each as the names, without ending, that it may have.

    The first is that of the labels; the first name of each is that of the single files that are published.
    """
    split = split or task.default
    names = [[task.files.get(split, split), split]]
    if task.per_residue:
        names.append(_SEQUENCES)
    return [*names, _MASKS] if task.masked else names


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the first of the files that exists, in the folder or its ``splits``; None if there is none."""
    for location in (folder, folder / "splits"):
        for stem in stems:
            for ending in _ENDINGS:
                if (path := location / f"{stem}{ending}").is_file():
                    return path
    return None


def _find(folder: Path, stems: Sequence[str]) -> Path:
    if (path := find_file(folder, stems)) is not None:
        return path
    names = " or ".join(f"{stem}.fasta" for stem in dict.fromkeys(stems))
    raise UserError(
        f"{folder}: no {names} (nor .csv) in it; name the directory with FLIP's files by --source"
    )


_Read = tuple[dict[str, list[LabelledRow]], dict[str, Any], list[str]]
"""This holds the rows by split, entries of the manifest, and notes."""


def _read_protein_task(path: Path, folder: Path, task: FlipTask) -> _Read:
    rows: dict[str, list[LabelledRow]] = {name: [] for name in SPLITS}
    no_set = 0
    reader: FastaReader | CsvReader
    if ".csv" in path.suffixes:
        reader = _csv_reader(path)
        found = _csv_rows(reader)
    else:
        entries, reader = read_entries(path)
        found = _fasta_rows(entries.values(), reader)
    for location, row, set_name, validation in found:
        split = _split_of(location, row.id, set_name, validation)
        if split is None:
            no_set += 1
            continue
        if not row.labels[0]:
            raise UserError(f"{location}: {row.id!r} has no target; complete or remove the record")
        if task.kind == "regression":
            _check_number(row.labels[0], location, row.id)
        rows[split].append(row)
    notes = [f"{path}: {no_set} proteins belong to no set and are left out"] if no_set else []
    return rows, {"sources": reader.checksums, "without_set": no_set}, notes


def _read_residue_task(path: Path, folder: Path, task: FlipTask) -> _Read:
    sequences, sequence_reader = read_entries(_find(folder, _SEQUENCES))
    labels = ResidueStrings(path, "labels")
    masks = ResidueStrings(_find(folder, _MASKS), "marks") if task.masked else None
    readers = [sequence_reader, labels.reader, *([] if masks is None else [masks.reader])]
    rows: dict[str, list[LabelledRow]] = {name: [] for name in SPLITS}
    no_set = masked = 0
    for name, entry in labels.entries.items():
        location = labels.reader.location(entry.line)
        if name not in sequences:
            raise UserError(
                f"{location}: no sequence of {name!r} in {sequence_reader.path}; take both from one archive"
            )
        marks = attributes(entry, location)
        split = _split_of(location, name, marks.get("SET"), marks.get("VALIDATION"))
        if split is None:
            no_set += 1
            continue
        length = len(sequences[name].text)
        cells = [labels.of(name, length, location)]
        if masks is not None:
            cells.append(masks.of(name, length, location))
            check_marks(cells[1], f"the mask of {name!r}", masks.location(name))
            masked += cells[1].count("0")
        rows[split].append(LabelledRow(name, sequences[name].text, tuple(cells)))
    unlabelled = len(sequences) - sum(name in labels.entries for name in sequences)
    notes = []
    if unlabelled:
        notes.append(
            f"{sequence_reader.path}: {unlabelled} of {len(sequences):,} proteins have no labels in "
            f"{path.name} and are left out"
        )
    if no_set:
        notes.append(f"{path}: {no_set} proteins belong to no set and are left out")
    provenance: dict[str, Any] = {"sources": {}, "without_labels": unlabelled, "without_set": no_set}
    for each in readers:
        provenance["sources"] |= each.checksums
    if masks is not None:
        provenance["masked_residues"] = masked
        total = sum(len(row.sequence) for of_split in rows.values() for row in of_split)
        notes.append(f"{masks.reader.path}: {masked:,} of {total:,} residues are masked and do not count")
    return rows, provenance, notes


_Found = Iterator[tuple[str, LabelledRow, str | None, str | None]]
"""This yields location, row, SET and VALIDATION of each protein."""


def _fasta_rows(entries: Any, reader: FastaReader) -> _Found:
    for entry in entries:
        location = reader.location(entry.line)
        marks = attributes(entry, location)
        check_blanks(entry, ("TARGET", "SET", "VALIDATION"), location)
        if "TARGET" not in marks:
            raise UserError(f"{location}: the header of {entry.id!r} has no TARGET=; is this a file of FLIP?")
        row = LabelledRow(entry.id, entry.text, (marks["TARGET"],))
        yield location, row, marks.get("SET"), marks.get("VALIDATION")


def _csv_reader(path: Path) -> CsvReader:
    reader = CsvReader(path, SourceOptions(set_by="nothing"))
    cure = "FLIP's tables have sequence,target,set,validation"
    require_columns(str(path), reader.columns, ("target", "set", "validation"), cure)
    return reader


def _csv_rows(reader: CsvReader) -> _Found:
    """Yield the rows; those without ids are named like the records of the FASTA, from ``Sequence0`` on."""
    number = 0
    for block in reader.blocks():
        for line, cells in reader.rows(block):
            location, name = reader.location(line), cells.get("id", f"Sequence{number}")
            number += 1
            residues = residues_of(cells["sequence"], location, name).decode()
            if not residues:
                raise UserError(f"{location}: {name!r} has no sequence; complete or remove the row")
            row = LabelledRow(name, residues, (cells["target"].strip(),))
            yield location, row, cells["set"].strip(), cells["validation"].strip()


def _split_of(location: str, name: str, set_name: str | None, validation: str | None) -> str | None:
    """Return the split of a protein, or None for one that the task leaves out."""
    if set_name is None:
        raise UserError(f"{location}: the header of {name!r} has no SET=; is this a file of FLIP?")
    return split_of(location, name, set_name, validation)


def _check_number(text: str, location: str, name: str) -> None:
    try:
        finite = abs(plain_number(text)) <= LARGEST
    except ValueError:
        finite = False
    if not finite:
        raise UserError(f"{location}: the target {text!r} of {name!r} is not a number; correct or remove it")
