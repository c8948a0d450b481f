"""Makes a table of proteins with coordinates from a folder of FASTA and one CSV of coordinates per protein.

A CSV has one row per residue, in the order of the sequence: a column ``residue`` with its letter, and either
``x,y,z`` of the atom between which distances count, or nine columns ``n_x`` to ``c_z`` of N, CA and C, from
which an ideal C-beta is built, as in fair-esm. Cells of a residue whose place is not known are empty.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.data.benchmarks.tables import TARGET, LabelledRow, LabelledTables
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.store.staging import check_new
from esm2mega.errors import UserError
from esm2mega.files import file_sha256, refuse_stream, shortened

_ENDINGS = (".fasta", ".fa", ".faa")
_ONE_ATOM = ["x", "y", "z"]
_BACKBONE = [f"{atom}_{axis}" for atom in ("n", "ca", "c") for axis in _ONE_ATOM]

_FARTHEST = 1e6
"""Is the largest magnitude of a coordinate, in Angstrom; no structure is larger."""

Array = npt.NDArray[np.float64]


def prepare_contacts(source: str | Path, out: str | Path) -> list[str]:
    """Write ``test.csv`` with a list of coordinates for each protein, and a manifest.

    Args:
        source: Folder with one FASTA file and ``ID.csv`` for each of its proteins.
        out: Directory to make.

    Returns:
        Lines that say what was written.

    Raises:
        UserError: A file is missing, or its residues are not those of the sequence.
    """
    check_new(Path(out))
    refuse_stream(folder := Path(source))
    fastas = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in _ENDINGS]
    if len(fastas) != 1:
        raise UserError(
            f"--source {source}: has {len(fastas) or 'no'} FASTA files; name a folder with one, and ID.csv "
            "with the coordinates of each protein"
        )
    refuse_stream(fastas[0])
    rows, checksums = [], {fastas[0].name: file_sha256(fastas[0])}
    for record in (reader := FastaReader(fastas[0])):
        name = f"{record.id}.csv"
        if name in checksums or Path(name).name != name:
            raise UserError(
                f"{reader.location(record.line)}: the id {record.id!r} names no file of its own; ids must "
                "differ and have no slash"
            )
        sequence = record.residues.decode()
        atoms = read_atoms(folder / name, sequence)
        known = np.isfinite(atoms.sum(axis=1))
        cell = [row if ok else None for row, ok in zip(atoms.round(3).tolist(), known.tolist(), strict=True)]
        rows.append(LabelledRow(record.id, sequence, (json.dumps(cell),)))
        checksums[name] = file_sha256(folder / name)
    if not rows:
        raise UserError(f"{fastas[0]}: holds no proteins; give a file with some")
    provenance = {"benchmark": "contacts", "kind": "contact", "sources": checksums}
    return LabelledTables([TARGET], {"test": rows}, provenance).write(Path(out), "contact", None)


def read_atoms(path: Path, sequence: str) -> Array:
    """Read the place of one atom per residue, ``[L, 3]`` in Angstrom, NaN where it is not known."""
    try:
        return _read_atoms(path, sequence)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV: {error}; give a table of coordinates") from None


def _read_atoms(path: Path, sequence: str) -> Array:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the coordinates of every protein of the FASTA file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        header = table.fieldnames or []
        columns = _BACKBONE if set(_BACKBONE) <= set(header) else _ONE_ATOM
        if not {"residue", *columns} <= set(header):
            raise UserError(
                f"{path}:1: has the columns {', '.join(header) or 'none'}; give residue, x, y and z, or "
                "residue and n_x, n_y, n_z, ca_x, …, c_z"
            )
        found, letters = [], []
        for row in table:
            if None in row:  # as with commas for decimal points
                count = len(header) + len(row[None])
                raise UserError(
                    f"{path}:{table.line_num}: has {count} cells, the header {len(header)}; give as many, "
                    "and numbers with a decimal point"
                )
            letters.append((row["residue"] or "").strip().upper())
            found.append([_number(row[column], f"{path}:{table.line_num}: {column}") for column in columns])
    wrong = next(
        (n for n, pair in enumerate(zip(letters, sequence.upper(), strict=False)) if len(set(pair)) > 1), None
    )
    if wrong is not None or len(letters) != len(sequence):
        there = f"{len(letters)} residues" if wrong is None else f"{letters[wrong]!r} as residue {wrong + 1}"
        here = f"{len(sequence)}" if wrong is None else repr(sequence[wrong])
        raise UserError(
            f"{path}: has {there}, the sequence has {here}; give one row for each residue, in order"
        )
    atoms = np.array(found).reshape(len(found), -1, 3)
    return ideal_c_beta(atoms) if columns is _BACKBONE else atoms[:, 0]


def ideal_c_beta(backbone: Array) -> Array:
    """Return where C-beta of ideal geometry is, ``[L, 3]``, also for glycine.

    Args:
        backbone: N, CA and C of each residue, ``[L, 3, 3]``.
    """
    n, ca, c = backbone[:, 0], backbone[:, 1], backbone[:, 2]
    along, beyond = ca - n, c - ca
    normal = np.cross(along, beyond)
    # These factors are those of trRosetta, which fair-esm and many others use.
    return -0.58273431 * normal + 0.56802827 * along - 0.54067466 * beyond + ca


def _number(text: str | None, location: str) -> float:
    if text is not None and not text.strip():
        return math.nan
    try:
        if text is not None and abs(number := float(text)) <= _FARTHEST:
            return number
        raise ValueError
    except ValueError:
        raise UserError(
            f"{location} is {shortened(text)}, not a number of Angstrom; leave it empty where it is not known"
        ) from None
