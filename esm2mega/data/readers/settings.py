"""Turns the section ``data`` of a configuration into the options of readers."""

from __future__ import annotations

from esm2mega.config.schema import DataConfig
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.variants.wild_types import read_wild_types
from esm2mega.errors import UserError


def options_of(data: DataConfig) -> SourceOptions:
    """Return how inputs are read.

    Raises:
        UserError: `data.wild_type` names no file with one protein.
    """
    wild_type = None if data.wild_type is None else _wild_type(data.wild_type)
    return SourceOptions(
        sequence_column=data.sequence_column if wild_type is None else data.mutation_column,
        id_column=data.id_column,
        wild_type=wild_type,
        first_residue=data.first_residue,
        sequences_beside=None if wild_type is None else data.sequence_column,
        set_by="keys",
    )


def _wild_type(path: str) -> str:
    try:
        proteins = read_wild_types(path)
    except UserError as error:
        raise UserError(f"data.wild_type={path}: {error}") from None
    if len(proteins) != 1:
        raise UserError(
            f"data.wild_type={path}: holds {len(proteins)} proteins, and the variants of a table are of one; "
            "give a file with that one"
        )
    return proteins[0].sequence
