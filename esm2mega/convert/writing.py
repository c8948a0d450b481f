"""Converts `Weights` to the tensors of another format through its name table, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.convert.lazy_weights import Weights
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, TABLE, NameTable, Shape, TableEntry
from esm2mega.convert.tensors import frequencies_note


@dataclass(frozen=True)
class Output:
    """Describes a tensor of the target, and names the entry and the part that it comes from."""

    info: TensorInfo
    entry: TableEntry
    part: int


def outputs(weights: Weights, table: NameTable) -> dict[str, Output]:
    """List every tensor of the target in the order of its table, and note our tensors without a place."""
    shape, result = weights.description.shape, {}
    entries = {entry.ours: entry for entry in table.entries(shape)}
    for name in weights.infos:
        if name not in entries and name != FREQUENCIES:
            weights.notes.dropped.append(f"{name}: this format has no place for it")
    if FREQUENCIES in weights.infos and FREQUENCIES not in entries:
        _note_lost_frequencies(weights)
    for entry in entries.values():
        if entry.ours in weights.infos:
            info = weights.infos[entry.ours]
            part_shape = entry.kind.part_shape(info.shape)
            for number, part in enumerate(entry.theirs):
                result[part] = Output(TensorInfo(part_shape, info.dtype), entry, number)
        elif not entry.optional:
            raise AssertionError(entry.ours)
    tied = next(entry for entry in entries.values() if entry.ours == TABLE)
    for name, is_stored in table.tied.items():
        if is_stored:
            result[name] = Output(result[tied.theirs[0]].info, tied, 0)
    return result


def with_contact_head(weights: Weights) -> Weights:
    """Add a contact head of zeros to weights that have none, for which readers would draw a random one."""
    if weights.has_contact_head:
        return weights
    weights.notes.filled.append("contact head: zeros, the source has none")
    shapes = weights.description.shapes
    return with_zeros(weights, {name: shapes[name] for name in shapes if name.startswith(CONTACT_HEAD)})


def with_zeros(weights: Weights, shapes: Mapping[str, Shape]) -> Weights:
    """Return the same weights with further tensors of zeros."""
    dtype, read = weights.description.dtype, weights.read
    return replace(
        weights,
        infos={**weights.infos, **{name: TensorInfo(shape, dtype) for name, shape in shapes.items()}},
        read=lambda name: torch.zeros(shapes[name], dtype=dtype) if name in shapes else read(name),
    )


def _note_lost_frequencies(weights: Weights) -> None:
    note = frequencies_note(weights.read(FREQUENCIES), weights.description.head_dim)
    if note.startswith("the formula in"):
        weights.notes.dropped.append(f"{FREQUENCIES}: {note}, which readers of this format recompute")
    else:
        weights.notes.changed.append(
            f"rotary frequencies: {note}; this format has no place for them, its readers compute the formula"
        )


class OutputReader:
    """Returns values of the target's tensors; parts of one source tensor are made once if read in a row."""

    def __init__(self, weights: Weights, planned: Mapping[str, Output]) -> None:
        """Read from `weights` the tensors that `outputs` has planned."""
        self._weights = weights
        self._planned = planned
        self._entry: TableEntry | None = None
        self._parts: Sequence[Tensor] = ()

    def __call__(self, name: str) -> Tensor:
        output = self._planned[name]
        if output.entry is not self._entry:
            entry, shape = output.entry, self._weights.description.shape
            self._parts = entry.kind.to_theirs(self._weights.read(entry.ours), shape, len(entry.theirs))
            self._entry = entry
        return self._parts[output.part]


def tensors_of(weights: Weights, table: NameTable) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of all tensors of the target, one after the other."""
    planned = outputs(weights, table)
    read = OutputReader(weights, planned)
    for name in planned:
        yield name, read(name)
