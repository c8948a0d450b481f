"""Writes HDF5 outputs: a ragged file, laid out before anything is computed, or the layout of BioNeMo 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm2mega.files import parse_json
from esm2mega.infer.arrays import ArrayFile, ArraySpec
from esm2mega.infer.contents import Contents
from esm2mega.infer.embeddings import Embeddings
from esm2mega.infer.hdf5_checksums import seal

ATTRIBUTES = "esm2mega"
"""Names the attribute that holds all attributes as JSON; each of them is also an attribute of its own."""

_IDS_AT_ONCE = 1 << 16


def create_ragged(path: Path, contents: Contents) -> dict[str, int]:
    """Write everything but the large arrays, and reserve their places.

    The arrays are contiguous and allocated at once. So the structure of the file is final when this returns,
    and a process that is killed later leaves no damaged file. Of the checksums, those of the large arrays are
    filled in at the end.

    Returns:
        The byte in the file where each array begins.
    """
    offsets = {}
    with h5py.File(path, "x") as file:
        write_attributes(file, contents.attributes)
        file.attrs.update(contents.file_attributes)
        ids = file.create_dataset("ids", (len(contents),), h5py.string_dtype())
        for first in range(0, len(contents), _IDS_AT_ONCE):
            stop = min(first + _IDS_AT_ONCE, len(contents))
            ids[first:stop] = list(contents.ids(first, stop))
        for name, values in contents.tables.items():
            file.create_dataset(name, data=values)
        for name, spec in contents.specs.items():
            offsets[name] = _reserve(file, name, spec)
        seal(file, reserved=contents.specs)
    return offsets


def _reserve(file: Any, name: str, spec: ArraySpec) -> int:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # Without time stamps, equal results are equal files.
    creation.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    kind = h5py.h5t.py_create(np.dtype(spec.dtype), logical=True)
    space = h5py.h5s.create_simple(spec.shape)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, creation, links)
    file.flush()
    return int(dataset.get_offset())


def write_attributes(file: Any, attributes: Mapping[str, Any]) -> None:
    """Write each attribute of a file on its own, and all of them as JSON for `read_attributes`."""
    for name, value in attributes.items():
        file.attrs[name] = value if isinstance(value, str | int | float) else json.dumps(value)
    file.attrs[ATTRIBUTES] = json.dumps(attributes)


def read_attributes(path: Path) -> dict[str, Any]:
    """Read what `write_attributes` wrote; it is empty if another program wrote the file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with h5py.File(path) as file:
            return parse_json(file.attrs.get(ATTRIBUTES, "{}"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def describe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the attributes that `write_attributes` wrote, and dtype and shape of each data set by name."""
    shapes: dict[str, str] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            is_text = h5py.check_string_dtype(item.dtype) is not None
            shapes[name] = f"{'text' if is_text else item.dtype} {list(item.shape)}"

    with h5py.File(path) as file:
        file.visititems(note)
    return read_attributes(path), shapes


def bionemo_paths(out: Path) -> dict[str, Path]:
    """Return the two files that an output in the layout of BioNeMo consists of."""
    return {
        "residue": out.with_name(f"{out.stem}_hiddens.h5"),
        "pooled": out.with_name(f"{out.stem}_embeddings.h5"),
    }


def write_bionemo(path: Path, kind: str, contents: Embeddings, arrays: ArrayFile, compression: str) -> None:
    """Write a data set per protein, named by its number from 0, with its id as attribute ``original_id``.

    Args:
        path: File to make.
        kind: ``residue`` for data sets ``[L, h]``, ``pooled`` for ``[h]``.
        contents: Contents of the output, with one layer.
        arrays: File that holds the values.
        compression: Value of `infer.compression`.
    """
    filter_name = None if compression == "none" else compression
    (name,) = (name for name in contents.specs if name.startswith(f"{kind}/"))
    values = arrays.read(name)
    with h5py.File(path, "w") as file:
        write_attributes(file, contents.attributes)
        for number, protein in enumerate(contents.ids()):
            rows = values[contents.rows(name, number)]
            data = rows if kind == "residue" else rows[0]
            entry = file.create_dataset(str(number), data=data, compression=filter_name)
            entry.attrs["original_id"] = protein
            if contents.truncated[number]:
                entry.attrs["truncated"] = True
        seal(file)
