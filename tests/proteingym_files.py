"""Small data in the layout in which ProteinGym publishes its assays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

HEADER = "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\n"


def write_assays(reference: Path, assays: Path, tables: Mapping[str, tuple[str, str]]) -> None:
    """Write a reference file, and a table for each name, given the wild type and the table."""
    assays.mkdir(parents=True)
    rows = "".join(f"{name},{name}.csv,P,{wild},A\n" for name, (wild, _) in tables.items())
    reference.write_text(HEADER + rows)
    for name, (_, table) in tables.items():
        (assays / f"{name}.csv").write_text(table)
