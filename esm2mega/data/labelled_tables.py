"""Labelled benchmark data as fine-tuning reads it: a CSV per split, and a manifest that says what they hold.

Everything is text: no value passes through a number on its way.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esm2mega.data.prepare import staging_directory
from esm2mega.data.records import MISSING_VALUES, file_sha256
from esm2mega.errors import UserError

SPLITS = ("train", "valid", "test")

MANIFEST = "manifest.json"

VERSION = 1


@dataclass(frozen=True)
class LabelledRow:
    """One protein.

    Attributes:
        id: Of the source.
        sequence: Residues.
        labels: A cell for each column of labels, in the order of `LabelledTables.columns`.
    """

    id: str
    sequence: str
    labels: tuple[str, ...]


@dataclass
class LabelledTables:
    """What is written.

    Attributes:
        columns: Names of the columns of labels, and of a mask where there is one.
        rows: Split -> proteins, in the order of the source.
        provenance: Entries of the manifest: where the data are from, and what was left out.
        notes: What the user should know.
    """

    columns: Sequence[str]
    rows: Mapping[str, Sequence[LabelledRow]]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, out: Path, per_residue: bool, class_column: str | None) -> list[str]:
        """Write ``SPLIT.csv`` of every split that has proteins and the manifest, whole or not at all.

        Args:
            out: Directory to make.
            per_residue: Labels are strings with a character per residue.
            class_column: The one whose classes are counted; None where labels are numbers.

        Returns:
            A line per split, and the notes.
        """
        if out.exists():
            raise UserError(f"{out}: exists already; name another directory or remove it")
        with staging_directory(out) as staging:
            folder = staging / "out"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            entries = {
                split: self._entry(folder / f"{split}.csv", rows, per_residue, class_column)
                for split, rows in self.rows.items()
                if rows
            }
            manifest = {"version": VERSION, **self.provenance, "splits": entries, "notes": self.notes}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            os.rename(folder, out)
            shutil.rmtree(staging, ignore_errors=True)
        lines = [
            f"{out / entry['file']}: {entry['proteins']:,} proteins, {entry['residues']:,} residues, "
            f"longest {entry['longest']:,}"
            for entry in entries.values()
        ]
        return [*lines, *self.notes]

    def _entry(
        self, path: Path, rows: Sequence[LabelledRow], per_residue: bool, class_column: str | None
    ) -> dict[str, Any]:
        """Write one split; its entry in the manifest."""
        with path.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["id", "sequence", *self.columns])
            table.writerows([row.id, _sequence_cell(row.sequence), *row.labels] for row in rows)
        lengths = [len(row.sequence) for row in rows]
        entry: dict[str, Any] = {
            "file": path.name,
            "sha256": file_sha256(path),
            "proteins": len(rows),
            "residues": sum(lengths),
            "longest": max(lengths),
        }
        if class_column is not None:
            number = self.columns.index(class_column)
            counts: Counter[str] = Counter()
            for row in rows:
                counts.update(row.labels[number] if per_residue else [row.labels[number]])
            entry["classes"] = dict(sorted(counts.items()))
        return entry


def _sequence_cell(sequence: str) -> str:
    """A protein of asparagine and alanine would read as a missing value; readers remove the blank."""
    return " ".join(sequence) if sequence in MISSING_VALUES else sequence
