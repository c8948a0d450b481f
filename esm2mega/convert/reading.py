"""Reads a stored model through the name table of its format; whatever does not fit is an error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.files.stores import TensorStore
from esm2mega.convert.lazy_weights import Description, Notes, Weights, dtype_name
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, TABLE, NameTable, TableEntry
from esm2mega.convert.tensors import frequencies_note, same_values
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.model.rotary import rotary_frequencies


def from_store(
    store: TensorStore,
    table: NameTable,
    description: Description,
    names: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> Weights:
    """Read a model through the name table of its format.

    Args:
        store: Tensors under their stored names.
        table: Name table of the format.
        description: Describes the model; its dtype is replaced by that of the tensors.
        names: Stored names by names of the table, where they differ (prefixes, old spellings).
        drop: Shell patterns of stored names that are left out although nothing is known about them.

    Raises:
        UserError: Tensors are missing, unexpected or of the wrong shape, or a tied one differs from the token
            table.
    """
    stored = dict(names) if names is not None else {name: name for name in store.infos}
    shape, notes = description.shape, Notes()
    if shape.num_layers > len(stored):
        # Checked before all names are made: a damaged configuration may state any number of layers.
        raise UserError(
            f"{store.location}: its configuration says {shape.num_layers} layers, and it holds {len(stored)} "
            "tensors"
        )
    entries, missing = _present(table.entries(shape), stored)
    if missing:
        raise UserError(
            f"{store.location}: {_count(missing, 'tensor is', 'tensors are')} missing: "
            f"{first_of(sorted(missing))}"
        )
    used = {part for entry in entries for part in entry.theirs}
    unexpected = []
    for name, stored_name in stored.items():
        if name in used or name in table.tied:
            continue
        reason = table.reason_to_drop(name)
        if reason is None and any(fnmatchcase(stored_name, pattern) for pattern in drop):
            reason = "as asked for"
        if reason is None:
            unexpected.append(stored_name)
        else:
            notes.dropped.append(f"{stored_name}: {reason}")
    if unexpected:
        raise UserError(
            f"{store.location}: {_count(unexpected, 'tensor has', 'tensors have')} no place in this model: "
            f"{first_of(sorted(unexpected))}; `esm2mega convert --drop 'PATTERN'` leaves tensors out"
        )
    ours = description.shapes
    for entry in entries:
        _check_shapes(store, entry, ours[entry.ours], stored)
    for name in table.tied:
        if name in stored and any(fnmatchcase(stored[name], pattern) for pattern in drop):
            notes.dropped.append(f"{stored[name]}: as asked for; the token table takes its place")
        elif name in stored:
            _check_tied(store, name, stored, entries)
            notes.dropped.append(f"{stored[name]}: equal to the token table, which is stored once")

    dtype = _common_dtype(store, entries, stored, notes)
    by_name = {entry.ours: entry for entry in entries}

    def read(name: str) -> Tensor:
        entry = by_name[name]
        parts = [store.read(stored[part]) for part in entry.theirs]
        dtype = infos[name].dtype
        return entry.kind.to_ours(parts, shape).to(dtype)

    frequencies_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if FREQUENCIES in by_name:
        kept = torch.promote_types(_info(store, by_name[FREQUENCIES], stored).dtype, torch.float32)
        frequencies_dtype = kept
    infos = {
        name: TensorInfo(ours[name], frequencies_dtype if name == FREQUENCIES else dtype)
        for name in ours
        if name in by_name
    }
    weights = Weights(replace(description, dtype=dtype), infos, read, notes)
    if description.family != "esm2":
        return weights
    return _with_frequencies(_without_empty_contact_head(weights), frequencies_dtype)


def _present(entries: list[TableEntry], stored: Mapping[str, str]) -> tuple[list[TableEntry], list[str]]:
    """Return the entries that are stored, and the parts that are missing."""
    present, missing = [], []
    for entry in entries:
        absent = [part for part in entry.theirs if part not in stored]
        if not absent:
            present.append(entry)
        elif not (entry.optional and len(absent) == len(entry.theirs)):
            missing += absent
    return present, missing


def _info(store: TensorStore, entry: TableEntry, stored: Mapping[str, str]) -> TensorInfo:
    return store.infos[stored[entry.theirs[0]]]


def _check_shapes(
    store: TensorStore, entry: TableEntry, ours: tuple[int, ...], stored: Mapping[str, str]
) -> None:
    for part in entry.theirs:
        info = store.infos[stored[part]]
        expected = entry.kind.part_shape(ours)
        fits = info.shape == expected
        if entry.kind.least_rows is not None and info.shape:
            fits = info.shape[1:] == expected[1:] and info.shape[0] >= entry.kind.least_rows
        if not fits or not info.dtype.is_floating_point:
            raise UserError(
                f"{store.location}: {stored[part]} is {dtype_name(info.dtype)} {list(info.shape)}, "
                f"a model of this shape has {list(expected)} in floating point"
            )


def _check_tied(store: TensorStore, name: str, stored: Mapping[str, str], entries: list[TableEntry]) -> None:
    table = next(entry for entry in entries if entry.ours == TABLE)
    twin = store.read(stored[table.theirs[0]])
    value = store.read(stored[name])
    if value.shape != twin.shape or not same_values([value, twin]):
        raise UserError(
            f"{store.location}: {stored[name]} differs from the token table; here the two are one tensor, "
            f"and readers do not agree which to take; `esm2mega convert --drop '{stored[name]}'` takes the "
            "table"
        )


def _common_dtype(
    store: TensorStore, entries: list[TableEntry], stored: Mapping[str, str], notes: Notes
) -> torch.dtype:
    """Return the narrowest dtype that holds every weight exactly, and note it if the weights have several."""
    found = {
        store.infos[stored[part]].dtype
        for entry in entries
        if entry.ours != FREQUENCIES
        for part in entry.theirs
    }
    result = functools.reduce(torch.promote_types, found)
    if len(found) > 1:
        names = ", ".join(sorted(map(dtype_name, found)))
        notes.changed.append(f"weights of {names} to {dtype_name(result)}, which holds all of them")
    return result


def _without_empty_contact_head(weights: Weights) -> Weights:
    """Drop a contact head of zeros, which writers fill in for models without one."""
    if not weights.has_contact_head:
        return weights
    parts = [f"{CONTACT_HEAD}weight", f"{CONTACT_HEAD}bias"]
    if any(bool(weights.read(name).any()) for name in parts):
        return weights
    infos = {name: info for name, info in weights.infos.items() if name not in parts}
    weights.notes.dropped.append("contact head: all zeros, which stands for none")
    return replace(weights, infos=infos)


def _with_frequencies(weights: Weights, dtype: torch.dtype) -> Weights:
    """Compute the rotary frequencies if the source has none, and note values that differ from the formula."""
    if FREQUENCIES in weights.infos:
        note = frequencies_note(weights.read(FREQUENCIES), weights.description.head_dim)
        if not note.startswith("the formula in"):
            weights.notes.kept.append(f"rotary frequencies: {note}")
        return weights
    value = rotary_frequencies(weights.description.head_dim, dtype)
    read = weights.read
    weights.notes.filled.append(f"{FREQUENCIES}: by formula, the source has none")
    return replace(
        weights,
        infos={**weights.infos, FREQUENCIES: TensorInfo(tuple(value.shape), dtype)},
        read=lambda name: value if name == FREQUENCIES else read(name),
    )


def _count(names: Sequence[str], one: str, several: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else several}"
