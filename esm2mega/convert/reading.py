"""Reads a stored model through the name table of its format; whatever does not fit is an error.

If a part of the model is enough, what does not fit is left out and listed instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.files.stores import TensorStore
from esm2mega.convert.lazy_weights import Description, Notes, Weights, dtype_name
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, TABLE, NameTable, Shape, TableEntry
from esm2mega.convert.tensors import frequencies_note, same_values
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.model.rotary import rotary_frequencies

LENIENT = "`esm2mega finetune finetune.strict=false`, without adapters, starts with the rest"
"""This says in errors what can be done with a model of which a part does not fit."""


def from_store(
    store: TensorStore,
    table: NameTable,
    description: Description,
    names: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    partial: bool = False,
) -> Weights:
    """Read a model through the name table of its format.

    Args:
        store: Tensors under their stored names.
        table: Name table of the format.
        description: Describes the model; its dtype is replaced by that of the tensors.
        names: Stored names by names of the table, where they differ (prefixes, old spellings).
        drop: Shell patterns of stored names that are left out although nothing is known about them.
        partial: Whether a part of the model is enough: what is missing or of another shape is listed in
            `Weights.absent`, and what has no place in `Notes.dropped`.

    Raises:
        UserError: Tensors are missing, unexpected or of the wrong shape, or a tied one differs from the token
            table, without `partial`; or nothing fits.
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
    if missing and not partial:
        raise UserError(
            f"{store.location}: {_count(missing, 'tensor is', 'tensors are')} missing: "
            f"{first_of(sorted(missing))}; copy the model again, or {LENIENT}"
        )
    unexpected = _left_out(table, stored, entries, drop, notes)
    if unexpected and not partial:
        raise UserError(
            f"{store.location}: {_count(unexpected, 'tensor has', 'tensors have')} no place in this model: "
            f"{first_of(sorted(unexpected))}; `esm2mega convert --drop 'PATTERN'` leaves tensors out"
        )
    notes.dropped += [f"{name}: has no place in this model" for name in unexpected]
    ours = description.shapes
    unfit = {part: f"{part} is not there" for part in missing}
    for part, reason in _of_other_shape(store, entries, ours, stored):
        if not partial:
            raise UserError(f"{store.location}: {reason}")
        unfit[part] = reason
    absent = {
        entry.ours: "; ".join(unfit[part] for part in entry.theirs if part in unfit)
        for entry in table.entries(shape)
        if any(part in unfit for part in entry.theirs)
    }
    entries = [entry for entry in entries if _is_of_use(entry, unfit)]
    by_name = {entry.ours: entry for entry in entries}
    _compare_tied(store, table, by_name.get(TABLE), stored, drop, partial, notes)
    dtype = _common_dtype(store, entries, stored, unfit, notes)

    def join(name: str, part_of: Callable[[str], Tensor], empty: Callable[[Shape], Tensor]) -> Tensor:
        entry = by_name[name]
        parts = [
            empty(entry.kind.part_shape(ours[name])) if part in unfit else part_of(part)
            for part in entry.theirs
            if part not in unfit or entry.kind.parts == "apart"
        ]
        return entry.kind.to_ours(parts, shape)

    def read(name: str) -> Tensor:
        dtype = infos[name].dtype
        value = join(name, lambda part: store.read(stored[part]), functools.partial(torch.zeros, dtype=dtype))
        return value.to(dtype)

    def present(name: str) -> Tensor:
        shape_of = by_name[name].kind.part_shape
        there = torch.ones(shape_of(ours[name]), dtype=torch.bool)
        return join(name, lambda part: there, functools.partial(torch.zeros, dtype=torch.bool))

    frequencies_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if FREQUENCIES in by_name:
        part = next(part for part in by_name[FREQUENCIES].theirs if part not in unfit)
        frequencies_dtype = torch.promote_types(store.infos[stored[part]].dtype, torch.float32)
        absent.pop(FREQUENCIES, None)
    infos = {
        name: TensorInfo(ours[name], frequencies_dtype if name == FREQUENCIES else dtype)
        for name in ours
        if name in by_name
    }
    weights = Weights(replace(description, dtype=dtype), infos, read, notes, absent=absent, present=present)
    if description.family != "esm2":
        return weights
    return _with_frequencies(_without_empty_contact_head(weights), frequencies_dtype)


def _present(entries: list[TableEntry], stored: Mapping[str, str]) -> tuple[list[TableEntry], list[str]]:
    """Return the entries of which a part is stored, and the parts that are missing.

    An optional tensor may be missing, but not the weight or the bias of something that is there.
    """
    present = [entry for entry in entries if any(part in stored for part in entry.theirs)]
    modules = {_module(entry) for entry in present}
    missing = [
        part
        for entry in entries
        if not entry.optional or _module(entry) in modules
        for part in entry.theirs
        if part not in stored
    ]
    return present, missing


def _module(entry: TableEntry) -> str:
    return entry.ours.rpartition(".")[0]


def _left_out(
    table: NameTable,
    stored: Mapping[str, str],
    entries: Sequence[TableEntry],
    drop: Sequence[str],
    notes: Notes,
) -> list[str]:
    """Return the stored tensors that nothing is known about; note those that are left out for a reason."""
    used = {part for entry in entries for part in entry.theirs}
    unexpected = []
    for name, stored_name in stored.items():
        if name in used or name in table.tied:
            continue
        reason = table.reason_to_drop(name)
        if reason is None and _matches(stored_name, drop):
            reason = "as asked for"
        if reason is None:
            unexpected.append(stored_name)
        else:
            notes.dropped.append(f"{stored_name}: {reason}")
    return unexpected


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _of_other_shape(
    store: TensorStore,
    entries: Sequence[TableEntry],
    ours: Mapping[str, Shape],
    stored: Mapping[str, str],
) -> list[tuple[str, str]]:
    """Return the parts that are stored and are not as the model has them, and why."""
    found = []
    for entry in entries:
        expected, least = entry.kind.part_shape(ours[entry.ours]), entry.kind.least_rows
        for part in entry.theirs:
            if part not in stored:
                continue
            info = store.infos[stored[part]]
            fits = info.shape == expected
            if least is not None and info.shape:
                fits = info.shape[1:] == expected[1:] and info.shape[0] >= least
            if not fits or not info.dtype.is_floating_point:
                reason = (
                    f"{stored[part]} is {dtype_name(info.dtype)} {list(info.shape)}, "
                    f"a model of this shape has {list(expected)} in floating point"
                )
                found.append((part, reason))
    return found


def _is_of_use(entry: TableEntry, unfit: Mapping[str, str]) -> bool:
    """Tell whether a tensor, or rows of it, can be made of the parts that fit."""
    fitting = [part for part in entry.theirs if part not in unfit]
    return bool(fitting) and (entry.kind.parts != "together" or len(fitting) == len(entry.theirs))


def _compare_tied(
    store: TensorStore,
    table: NameTable,
    entry: TableEntry | None,
    stored: Mapping[str, str],
    drop: Sequence[str],
    partial: bool,
    notes: Notes,
) -> None:
    """Compare tensors that must equal the token table with it, and note that they are left out."""
    for name in table.tied:
        if name not in stored:
            continue
        if _matches(stored[name], drop):
            notes.dropped.append(f"{stored[name]}: as asked for; the token table takes its place")
            continue
        if entry is None:
            notes.dropped.append(f"{stored[name]}: goes with the token table, which does not fit")
            continue
        twin, value = store.read(stored[entry.theirs[0]]), store.read(stored[name])
        if value.shape == twin.shape and same_values([value, twin]):
            notes.dropped.append(f"{stored[name]}: equal to the token table, which is stored once")
        elif partial:
            notes.dropped.append(f"{stored[name]}: differs from the token table, which takes its place")
        else:
            raise UserError(
                f"{store.location}: {stored[name]} differs from the token table; here the two are one "
                f"tensor, and readers do not agree which to take; `esm2mega convert --drop '{stored[name]}'` "
                "takes the table"
            )


def _common_dtype(
    store: TensorStore,
    entries: Sequence[TableEntry],
    stored: Mapping[str, str],
    unfit: Mapping[str, str],
    notes: Notes,
) -> torch.dtype:
    """Return the narrowest dtype that holds every weight exactly, and note it if the weights have several.

    Raises:
        UserError: There are no weights.
    """
    found = {
        store.infos[stored[part]].dtype
        for entry in entries
        if entry.ours != FREQUENCIES
        for part in entry.theirs
        if part not in unfit
    }
    if not found:
        raise UserError(f"{store.location}: none of its tensors fits its own configuration; copy both again")
    result = functools.reduce(torch.promote_types, found)
    if len(found) > 1:
        names = ", ".join(sorted(map(dtype_name, found)))
        notes.changed.append(f"weights of {names} to {dtype_name(result)}, which holds all of them")
    return result


def _without_empty_contact_head(weights: Weights) -> Weights:
    """Drop a contact head that is of no use: of zeros, which writers fill in for models without one, or half.

    Half of one is there only if the source was read in part.
    """
    parts = [f"{CONTACT_HEAD}weight", f"{CONTACT_HEAD}bias"]
    there = [name for name in parts if name in weights.infos]
    if not there or (len(there) == 2 and any(bool(weights.read(name).any()) for name in parts)):
        return weights
    infos = {name: info for name, info in weights.infos.items() if name not in parts}
    reason = "all zeros, which stands for none" if len(there) == 2 else "a part of it does not fit"
    weights.notes.dropped.append(f"contact head: {reason}")
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
