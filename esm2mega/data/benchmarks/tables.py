"""Writes benchmark data as fine-tuning reads them: a CSV per split, and a manifest that describes them.

All values stay text, and none is converted to a number and back.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esm2mega.data.readers.base import MISSING_VALUES
from esm2mega.data.store.staging import staged
from esm2mega.errors import UserError
from esm2mega.files import file_sha256, parse_json

TARGET, MASK = "target", "mask"
"""These are the names of the columns of labels, and of the mask that says which residues count."""


MANIFEST = "manifest.json"

VERSION = 1


@dataclass(frozen=True)
class LabelledRow:
    """Holds one protein and its labels.

    Attributes:
        id: Id of the protein in the source.
        sequence: Residues of the protein.
        labels: A cell for each column of labels, in the order of `LabelledTables.columns`.
    """

    id: str
    sequence: str
    labels: tuple[str, ...]


@dataclass
class LabelledTables:
    """Holds the labelled proteins of all splits, and writes them.

    Attributes:
        columns: Names of the columns of labels, and of a mask where there is one.
        rows: Proteins by split, in the order of the source.
        provenance: Entries of the manifest: where the data are from, and what was left out.
        notes: What the user should know.
    """

    columns: Sequence[str]
    rows: Mapping[str, Sequence[LabelledRow]]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, out: Path, kind: str, class_column: str | None) -> list[str]:
        """Write ``SPLIT.csv`` of every split that has proteins and the manifest, whole or not at all.

        Args:
            out: Directory to make.
            kind: The value of `task.kind`, which says how a cell holds classes.
            class_column: Column whose classes are counted; None where labels are numbers.

        Returns:
            A line per split, and the notes.
        """
        with staged(out) as folder:
            entries = {
                split: self._entry(folder / f"{split}.csv", rows, kind, class_column)
                for split, rows in self.rows.items()
                if rows
            }
            manifest = {"version": VERSION, **self.provenance, "splits": entries, "notes": self.notes}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        lines = [
            f"{out / entry['file']}: {entry['proteins']:,} proteins, {entry['residues']:,} residues, "
            f"longest {entry['longest']:,}"
            for entry in entries.values()
        ]
        return [*lines, *self.notes]

    def _entry(
        self, path: Path, rows: Sequence[LabelledRow], kind: str, class_column: str | None
    ) -> dict[str, Any]:
        """Write one split, and return its entry in the manifest."""
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
                counts.update(_classes(row.labels[number], kind))
            entry["classes"] = dict(sorted(counts.items()))
        return entry


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of such tables; None if the directory's manifest describes something else.

    Raises:
        UserError: The manifest is damaged, or a table is missing or was changed after it was written.
    """
    try:
        manifest = parse_json((directory / MANIFEST).read_bytes())
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not {"benchmark", "splits", "version"} <= manifest.keys():
        return None
    if manifest["version"] != VERSION:
        raise UserError(
            f"{directory / MANIFEST}: has version {manifest['version']!r}, this esm2mega reads {VERSION}; "
            "prepare the tables again"
        )
    if not _describes_splits(manifest["splits"]):
        raise UserError(
            f"{directory / MANIFEST}: is damaged, it does not describe the splits; prepare the tables again"
        )
    for entry in manifest["splits"].values():
        path = directory / entry["file"]
        if not path.is_file() or file_sha256(path) != entry["sha256"]:
            raise UserError(
                f"{path}: is missing or was changed after it was written; prepare the tables again"
            )
    return manifest


def _describes_splits(splits: Any) -> bool:
    """Tell whether this is what `LabelledTables.write` says of the splits; the files lie beside it."""
    return isinstance(splits, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and Path(entry["file"]).name == entry["file"]
        and all(isinstance(entry.get(key), int) for key in ("proteins", "residues", "longest"))
        and isinstance(entry.get("sha256"), str)
        for entry in splits.values()
    )


def _classes(cell: str, kind: str) -> Iterable[str]:
    """Return the classes in a cell: one for each residue, names separated by ``;``, or one."""
    if kind == "multilabel":
        return {name.strip() for name in cell.split(";") if name.strip()}
    return cell if kind == "token_classification" else [cell]


def _sequence_cell(sequence: str) -> str:
    """Return the cell of a sequence; one that would read as a missing value, such as NA, gets blanks."""
    # Readers remove white space from sequences.
    return " ".join(sequence) if sequence in MISSING_VALUES else sequence
