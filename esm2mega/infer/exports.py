"""Writes finished arrays to `.npz`, to Parquet, or to one `.pt` file per protein."""

from __future__ import annotations

import csv
import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esm2mega.errors import UserError
from esm2mega.files import parse_json
from esm2mega.infer.arrays import ArrayFile
from esm2mega.infer.contents import Contents
from esm2mega.infer.embeddings import Embeddings, to_tensor

INDEX = "index.csv"
ATTRIBUTES_FILE = "attributes.json"

_BLOCK_ROWS = 1 << 14
_GROUP_RESIDUES = 1 << 16
_POOLED_KEY = {"mean": "mean_representations", "cls": "bos_representations", "max": "max_representations"}


def write_npz(path: Path, contents: Embeddings, arrays: ArrayFile) -> None:
    """Write the arrays of the ragged layout under the same names, uncompressed."""
    small: dict[str, Any] = {
        "ids": np.array(list(contents.ids()), dtype=np.str_),
        **contents.columns,
        "offsets": contents.offsets,
        "attributes": np.array(json.dumps(contents.attributes)),
    }
    if "contacts" in contents.specs:
        small["contact_offsets"] = contents.contact_offsets
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, values in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
        for name, spec in contents.specs.items():
            values = arrays.read(name)
            header = {
                "descr": np.lib.format.dtype_to_descr(values.dtype),
                "fortran_order": False,
                "shape": spec.shape,
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for first in range(0, len(values), _BLOCK_ROWS):
                    member.write(values[first : first + _BLOCK_ROWS].tobytes())


def read_npz_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of a file that `write_npz` wrote; they are empty if another program wrote it."""
    with np.load(path, allow_pickle=False) as archive:
        return parse_json(str(archive["attributes"])) if "attributes" in archive else {}


def write_parquet(path: Path, contents: Embeddings, arrays: ArrayFile) -> None:
    """Write a row per protein.

    Vectors are lists of fixed size, residues are lists of such vectors, and contacts are flattened.
    """
    pyarrow, _ = _pyarrow()

    def column(name: str, first: int, stop: int) -> Any:
        start, end = contents.rows(name, first).start, contents.rows(name, stop - 1).stop
        values = arrays.read(name)[start:end]
        cells = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
        if values.ndim == 2:
            cells = pyarrow.FixedSizeListArray.from_arrays(cells, values.shape[1])
        if name.startswith("pooled/"):
            return cells
        starts = [contents.rows(name, number).start - start for number in range(first, stop)]
        return pyarrow.LargeListArray.from_arrays(
            pyarrow.array([*starts, end - start], pyarrow.int64()), cells
        )

    def columns(first: int, stop: int) -> dict[str, Any]:
        return {
            "id": list(contents.ids(first, stop)),
            **{name: values[first:stop] for name, values in contents.columns.items()},
            **{name.replace("/", "_"): column(name, first, stop) for name in contents.specs},
        }

    write_row_groups(path, contents, columns)


def write_row_groups(path: Path, contents: Contents, columns: Callable[[int, int], dict[str, Any]]) -> None:
    """Write a Parquet file of consecutive proteins, some 65,000 residues at a time.

    Args:
        path: File to make.
        contents: Contents of the output; their attributes become metadata.
        columns: Returns the cells of the proteins from one number to another, exclusive, by column.
    """
    pyarrow, parquet = _pyarrow()
    numbers = contents.offsets[:-1] // _GROUP_RESIDUES
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(contents)]
    writer = None
    for first, stop in itertools.pairwise(borders):
        table = pyarrow.table(columns(first, stop))
        if writer is None:
            metadata = {"esm2mega": json.dumps(contents.attributes)}
            writer = parquet.ParquetWriter(path, table.schema.with_metadata(metadata))
        writer.write_table(table)
    assert writer is not None
    writer.close()


def read_parquet_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of a file of `write_row_groups`; they are empty if another program wrote it."""
    _, parquet = _pyarrow()
    return parse_json((parquet.read_schema(path).metadata or {}).get(b"esm2mega", b"{}"))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "writing Parquet needs pyarrow; install it with `pip install 'esm2mega[parquet]'`"
        ) from None
    return pyarrow, pyarrow.parquet


def check_parquet() -> None:
    """Raise `UserError` unless Parquet can be written here."""
    _pyarrow()


def write_pt(folder: Path, contents: Embeddings, arrays: ArrayFile) -> None:
    """Write one file per protein, with the keys of fair-esm's ``extract.py``.

    The file `INDEX` lists the files in order. A file has the name of its protein. Where an id is no file
    name, or occurs more than once, its number is added after a ``~``. `safe_name` replaces every other ``~``,
    so no two files have the same name.
    """
    folder.mkdir()
    dtype, pooled = contents.infer.dtype, _POOLED_KEY[contents.infer.pooling]
    # File systems may not tell upper from lower case.
    repeats = Counter(protein.lower() for protein in contents.ids())
    with (folder / INDEX).open("w", newline="") as stream:
        index = csv.writer(stream)
        index.writerow(["number", "id", "file", *contents.columns])
        for number, protein in enumerate(contents.ids()):
            entry: dict[str, Any] = {"label": protein}
            for name in contents.specs:
                kind, _, layer = name.partition("/layer_")
                value = to_tensor(arrays.read(name)[contents.rows(name, number)], dtype)
                if kind == "residue":
                    entry.setdefault("representations", {})[int(layer)] = value
                elif kind == "pooled":
                    entry.setdefault(pooled, {})[int(layer)] = value[0]
                else:
                    length = int(contents.lengths[number])
                    entry[kind] = value.reshape(length, length) if kind == "contacts" else value
            stem = safe_name(protein)
            if stem != protein or repeats[protein.lower()] > 1:
                stem = f"{stem}~{number}"
            torch.save(entry, folder / f"{stem}.pt")
            cells = (column[number].item() for column in contents.columns.values())
            index.writerow([number, protein, f"{stem}.pt", *cells])
    (folder / ATTRIBUTES_FILE).write_text(json.dumps(contents.attributes, indent=1) + "\n")


def read_pt_attributes(folder: Path) -> dict[str, Any]:
    """Read the attributes of a folder that `write_pt` wrote; they are empty if another program wrote it."""
    path = folder / ATTRIBUTES_FILE
    return parse_json(path.read_text()) if path.is_file() else {}


def safe_name(protein: str) -> str:
    """Replace everything in an id that could lead out of a folder or is hard to type."""
    # Names are ASCII, since their limit is in bytes.
    return re.sub(r"[^\w.|=+-]", "_", protein, flags=re.ASCII).lstrip(".")[:100] or "_"
