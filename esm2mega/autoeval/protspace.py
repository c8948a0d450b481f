"""Writes maps as ProtSpace opens them: a ``.parquetbundle``, three Parquet tables with a mark between them.

The tables are those of ProtSpace 4: the annotations of each protein, the projections, and their points.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esm2mega.autoeval.probe.embeddings import Array
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, replacing

_MARK = b"---PARQUET_DELIMITER---"
_NAMES = {"pca": "PCA_2", "umap": "UMAP_2"}
_VERSION = {b"protspace_format_version": b"2"}
_RESERVED = {ord(mark): f"%{ord(mark):02X}" for mark in (";", "|", "%", *map(chr, range(32)), "\x7f")}
"""ProtSpace reads these as the structure of a cell, unless they are written so."""

_IDENTIFIER = "identifier"
"""Is the column of the ids in every table of a bundle."""


def write_bundle(
    out: Path, planes: Mapping[str, Array], ids: Sequence[str], labels: Mapping[str, Sequence[str]]
) -> None:
    """Write a bundle.

    Args:
        out: The file.
        planes: Places of the points ``[n, 2]`` by the name of the method.
        ids: Id of each of the n proteins.
        labels: Labels of the proteins by the column.

    Raises:
        UserError: pyarrow is not installed, an id is there twice, or a column has the name of the ids.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"--out {out} needs pyarrow; pip install 'esm2mega[parquet]'") from None
    if len(set(ids)) < len(ids):
        twice = next(name for number, name in enumerate(ids) if name in ids[:number])
        raise UserError(f"--out {out}: the id {twice!r} is there twice; give every protein an id of its own")
    if _IDENTIFIER in labels:
        raise UserError(
            f"--out {out}: ProtSpace keeps the ids in a column {_IDENTIFIER}; rename that of --labels, "
            f"or give --id-column {_IDENTIFIER} if it holds the ids"
        )
    cells = {name: [text.translate(_RESERVED) for text in column] for name, column in labels.items()}
    annotations = pa.table({_IDENTIFIER: list(ids), **cells}).replace_schema_metadata(_VERSION)
    names = [_NAMES[method] for method in planes]
    projections = {
        "projection_name": names,
        "dimensions": [2] * len(names),
        "info_json": [json.dumps({}) for _ in names],
    }
    count = len(ids)
    points: dict[str, Any] = {
        "projection_name": [name for name in names for _ in range(count)],
        _IDENTIFIER: list(ids) * len(names),
        "x": [float(x) for plane in planes.values() for x in plane[:, 0]],
        "y": [float(y) for plane in planes.values() for y in plane[:, 1]],
        "z": pa.array([None] * count * len(names), pa.float64()),
    }
    parts = []
    for table in (annotations, pa.table(projections), pa.table(points)):
        written = io.BytesIO()
        parquet.write_table(table, written)
        parts.append(written.getvalue())
    if any(_MARK in part for part in parts):
        raise UserError(
            f"--out {out}: an id or a label holds {_MARK.decode()}, which ends a table; rename it"
        )
    with replacing(out, OTHER_OUT) as partial:
        partial.write_bytes(_MARK.join(parts))
