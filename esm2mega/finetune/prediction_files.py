"""Stores predictions in a place that each protein has from the start, and writes the output.

Legend: ``n`` proteins, ``k`` outputs, ``L`` residues of a protein.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.labels.stream import LabelledPacks, UnlabelledProteins
from esm2mega.data.stream.build import BatchSpec
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, file_sha256, parse_json, write_json
from esm2mega.finetune.kept_columns import KeptColumns
from esm2mega.finetune.output import (
    RankOne,
    pair_map,
    probabilities,
    rank_columns,
    ranked,
    table_cells,
    uncertainty_cells,
    uncertainty_columns,
)
from esm2mega.finetune.uncertainty import MEAN
from esm2mega.infer.arrays import ArrayFile, ArraySpec
from esm2mega.infer.contents import Array, Contents, Write
from esm2mega.infer.target import OutputTarget

_FORMATS = {".csv": "csv", ".parquet": "parquet", ".h5": "hdf5"}

_CONTACTS = "contacts"

_MOST_PIECE_TOKENS = 1 << 16
_PIECES = 64


@dataclass(frozen=True)
class PredictionContents(Contents):
    """Describes an output with predictions of proteins, of their residues, or with maps of contacts.

    Attributes:
        info: Meaning of the predictions.
        spec: Settings that decide the packs.
        extras: Names and widths of arrays that stand beside the predictions, and say how uncertain they are.
        ranks: Which number has rank 1 in a table; None for a table without ranks.
        kept: Columns of the input that a table takes over; None for none.
    """

    info: TargetInfo
    spec: BatchSpec
    extras: Mapping[str, int] = field(default_factory=dict)
    ranks: RankOne | None = None
    kept: KeptColumns | None = None

    @cached_property
    def packs(self) -> LabelledPacks:
        """Return the packs in which the proteins are computed.

        They are the packs of an evaluation, so that every prediction has the same bits as there.
        """
        return LabelledPacks(UnlabelledProteins(self.store), self.spec)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of residues of each protein, cropped ones included, ``[n]``."""
        return self.store.lengths.astype(np.int64)

    @cached_property
    def truncated(self) -> npt.NDArray[np.bool_]:
        return self.lengths > self.spec.data.max_seq_length - 2

    @property
    def tables(self) -> Mapping[str, Array]:
        tables: dict[str, Array] = {"lengths": self.lengths, "truncated": self.truncated}
        if self.info.per_pair:
            tables["contact_offsets"] = self.contact_offsets
        elif self.info.per_residue:
            tables["offsets"] = self.offsets
        return tables

    @property
    def specs(self) -> dict[str, ArraySpec]:
        if self.info.per_pair:
            return {_CONTACTS: ArraySpec((int(self.contact_offsets[-1]),), "float32")}
        rows = int(self.offsets[-1]) if self.info.per_residue else len(self)
        widths = {MEAN: self.info.num_outputs, **self.extras}
        return {name: ArraySpec((rows, width), "float64") for name, width in widths.items()}

    @property
    def file_attributes(self) -> Mapping[str, Any]:
        info = self.info
        attributes = {"kind": info.kind, "names": info.output_names}
        return attributes | ({"columns": info.columns, "widths": info.widths} if info.columns else {})

    @property
    def _packs_of_piece(self) -> int:
        most = max(_MOST_PIECE_TOKENS // self.spec.micro_batch_tokens, 1)
        return min(max(self.packs.num_packs // _PIECES, 1), most)

    @property
    def num_pieces(self) -> int:
        return -(-self.packs.num_packs // self._packs_of_piece)

    def pack_numbers(self, piece: int) -> range:
        """Return the packs of a piece."""
        first = piece * self._packs_of_piece
        return range(first, min(first + self._packs_of_piece, self.packs.num_packs))

    def amount(self, piece: int) -> int:
        return len(self.pack_numbers(piece))

    def stored(self, found: Mapping[str, Any], name: str = MEAN) -> Iterator[Write]:
        """Yield the rows of all predictions of a pack.

        Args:
            found: Its ``rows``, ``numbers`` and ``values``, as in `esm2mega.finetune.metrics.Predictions`.
            name: The array of `specs` that the values belong to; contacts have one.
        """
        rows, numbers, values = found["rows"], found["numbers"], found["values"]
        if self.info.per_pair:
            for row, start, logits in zip(rows.tolist(), numbers.tolist(), values, strict=True):
                contacts = probabilities(pair_map(logits, start, int(self.lengths[row])))
                yield _CONTACTS, int(self.contact_offsets[row]), contacts.ravel()
        elif not self.info.per_residue:
            for index, row in enumerate(rows.tolist()):
                yield name, row, values[index : index + 1]
        else:
            # The residues of each protein, or of each of its chunks.
            borders = np.flatnonzero((np.diff(rows) != 0) | (np.diff(numbers) != 1)) + 1
            for piece in np.split(np.arange(len(rows)), borders) if len(rows) else []:
                row, start = int(rows[piece[0]]), int(numbers[piece[0]])
                yield name, *self._of_residues(row, start, values[piece])

    def _of_residues(self, row: int, start: int, values: Array) -> tuple[int, Array]:
        """Return where rows of consecutive residues of a protein go, and the rows, ``[l, k]``.

        Those that are cropped are NaN.
        """
        first = int(self.offsets[row])
        if self.spec.data.crop == "chunk":
            return first + start, values
        whole = np.full((int(self.lengths[row]), values.shape[1]), np.nan)
        whole[start : start + len(values)] = values
        return first, whole

    def table(self, arrays: ArrayFile, first: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the row of each protein from `first` to `stop`, exclusive: cells by column."""
        every = {name: arrays.read(name) for name in self.specs}
        ranks = ranked(every[MEAN], self.ranks) if self.ranks else None
        for number, protein in enumerate(self.ids(first, stop), start=first):
            rows: Any = number
            if self.info.per_residue:
                rows = slice(self.offsets[number], self.offsets[number + 1])
            values = {name: array[rows] for name, array in every.items()}
            row = {"id": protein, "truncated": bool(self.truncated[number])}
            row |= table_cells(values.pop(MEAN), self.info) | uncertainty_cells(values, self.info)
            if ranks is not None:
                row |= dict(zip(rank_columns(self.info), ranks[number].tolist(), strict=True))
            yield row if self.kept is None else row | self.kept.cells(number, protein, row)


@dataclass(frozen=True)
class PredictionTarget(OutputTarget):
    """Says where predictions go, and in which format: ``csv``, ``parquet`` or ``hdf5``."""

    @classmethod
    def of(
        cls, out: str | Path, info: TargetInfo, extras: Iterable[str] = (), ranks: RankOne | None = None
    ) -> PredictionTarget:
        """Choose the format by the ending of the name.

        Args:
            out: Path as the user named it.
            info: Meaning of the predictions.
            extras: Names of the arrays beside the predictions.
            ranks: Which number has rank 1 in a table; None for a table without ranks.

        Raises:
            UserError: The ending is unknown, or a table cannot hold the predictions.
        """
        path = Path(out)
        check_format(path)
        check_kind(path, info, extras, ranks)
        return cls(path, _FORMATS[path.suffix])

    def finish(self, path: Path, contents: Contents, arrays: ArrayFile) -> list[Path]:
        made = super().finish(path, contents, arrays)
        if self.format == "csv":
            noted = {"sha256": file_sha256(self.out), "attributes": contents.attributes}
            write_json(settings_file(self.out), noted, OTHER_OUT)
        return made

    def _writer(self, kind: str) -> Callable[[Path, Any, ArrayFile], None]:
        return write_csv if self.format == "csv" else write_parquet

    def _reader(self) -> Callable[[Path], dict[str, Any]]:
        from esm2mega.infer import exports, hdf5

        return {
            "csv": read_csv_attributes,
            "parquet": exports.read_parquet_attributes,
            "hdf5": hdf5.read_attributes,
        }[self.format]


def check_format(out: Path) -> None:
    """Raise `UserError` for a name that does not tell the format, before the work is done."""
    if out.suffix not in _FORMATS:
        raise UserError(f"--out {out}: unknown ending {out.suffix!r}; give one of {', '.join(_FORMATS)}")
    if out.suffix == ".parquet":
        from esm2mega.infer.exports import check_parquet

        check_parquet()


def _option(ranks: RankOne) -> str:
    return "--rank" if ranks == "highest" else "--rank-lowest"


def check_kind(out: Path, info: TargetInfo, extras: Iterable[str] = (), ranks: RankOne | None = None) -> None:
    """Raise `UserError` if the output cannot hold the predictions, or their ranks."""
    if ranks and info.kind != "regression":
        raise UserError(
            f"{_option(ranks)}: ranks numbers of proteins, not task.kind={info.kind}; leave it out"
        )
    if out.suffix == ".h5":
        if ranks:
            raise UserError(
                f"{_option(ranks)}: ranks are written to tables; give --out {out.with_suffix('.csv')}"
            )
        return
    if info.per_pair:
        raise UserError(f"--out {out}: contacts are maps of all pairs; give a name that ends with .h5")
    names = info.names if info.kind == "regression" else [target.name for target in info.targets]
    for name in (
        "id",
        "truncated",
        *uncertainty_columns(extras, info),
        *(rank_columns(info) if ranks else ()),
    ):
        if name in names:
            raise UserError(
                f"--out {out}: {name!r} is a column of its own in this table and the name of a target; give "
                "a name that ends with .h5"
            )


def write_csv(path: Path, contents: PredictionContents, arrays: ArrayFile) -> None:
    """Write a row per protein, in input order."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        for number, row in enumerate(contents.table(arrays)):
            if not number:
                table.writerow(row)
            table.writerow(row.values())


def settings_file(path: Path) -> Path:
    """Return where the settings of a CSV are noted, since a table of text has no room for them."""
    return path.with_name(f"{path.name}.settings.json")


def read_csv_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes that are noted beside a CSV; empty if they are of another content."""
    noted = parse_json(settings_file(path).read_text())
    if not isinstance(noted, dict) or noted["sha256"] != file_sha256(path):
        return {}
    return dict(noted["attributes"])


def write_parquet(path: Path, contents: PredictionContents, arrays: ArrayFile) -> None:
    """Write a row per protein, in input order."""
    from esm2mega.infer.exports import write_row_groups

    def columns(first: int, stop: int) -> dict[str, list[Any]]:
        rows = list(contents.table(arrays, first, stop))
        return {name: [row[name] for row in rows] for name in rows[0]}

    write_row_groups(path, contents, columns)
