"""Makes tables for fine-tuning from DeepLoc 2's table of SwissProt proteins.

The columns of the source are ``ACC``, ``Kingdom``, ``Partition`` (0 to 4, made by homology), ``Membrane``,
flags for ten locations in the cell, and ``Sequence``. The classifier of Cerebras' Model Zoo learns
``Membrane`` on proteins of 100 to 1,026 residues, 80 % of them drawn at random. A random split has relatives
of training proteins in the test set; a split by partitions has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.data import counter_rng
from esm2mega.data.benchmarks.features import written_features
from esm2mega.data.benchmarks.tables import TARGET, LabelledRow, LabelledTables
from esm2mega.data.readers.base import SourceOptions, require_columns, residues_of
from esm2mega.data.readers.tables import CsvReader
from esm2mega.data.store.staging import check_new
from esm2mega.errors import UserError

LOCATIONS = (
    "Cytoplasm",
    "Nucleus",
    "Extracellular",
    "Cell membrane",
    "Mitochondrion",
    "Plastid",
    "Endoplasmic reticulum",
    "Lysosome/Vacuole",
    "Golgi apparatus",
    "Peroxisome",
)

_FLAGS = {"0": "0", "1": "1", "0.0": "0", "1.0": "1"}
_PARTITIONS = ("0", "1", "2", "3", "4")


@dataclass(frozen=True)
class DeepLocOptions:
    """Holds the options that decide what is written.

    Attributes:
        labels: ``membrane``: one column ``target``, 0 or 1; ``locations``: a column for each of `LOCATIONS`.
        min_length: Residues of the shortest protein that is taken.
        max_length: Residues of the longest protein that is taken.
        test_fraction: Fraction of the proteins to test on, drawn at random; None for 0.2, or with partitions.
        valid_fraction: Fraction of the proteins for validation, drawn at random; None for no validation set.
        test_partition: Partition to test on, for a split by partitions; None for a split at random.
        valid_partition: Partition for validation; None for no validation set.
        seed: Seed of the random split.
    """

    labels: str = "membrane"
    min_length: int = 100
    max_length: int = 1026
    test_fraction: float | None = None
    valid_fraction: float | None = None
    test_partition: int | None = None
    valid_partition: int | None = None
    seed: int = 1234

    @property
    def fractions(self) -> tuple[float, float]:
        """Return the fractions of the test and the validation set of a split at random."""
        test = 0.2 if self.test_fraction is None else self.test_fraction
        return test, self.valid_fraction or 0.0

    def used(self) -> dict[str, Any]:
        """Return the options that take effect, by name."""
        found = {"labels": self.labels, "min_length": self.min_length, "max_length": self.max_length}
        if self.test_partition is not None:
            return found | {"test_partition": self.test_partition, "valid_partition": self.valid_partition}
        test, valid = self.fractions
        return found | {"test_fraction": test, "valid_fraction": valid, "seed": self.seed}


def prepare_deeploc2(
    source: str | Path, out: str | Path, options: DeepLocOptions, features: str | Path | None = None
) -> list[str]:
    """Write a CSV per split and a manifest; and the same proteins as Model Zoo reads them, when asked.

    Args:
        source: Path of ``Swissprot_Train_Validation_dataset.csv``.
        out: Directory to make.
        options: Labels, lengths and split.
        features: Another directory to make, see `esm2mega.data.benchmarks.features`; None for none.

    Returns:
        Lines that say what was written.

    Raises:
        UserError: The file is another table, or the split leaves nothing to train on.
    """
    check_request(out, options, features)
    columns = ["Membrane"] if options.labels == "membrane" else list(LOCATIONS)
    reading = SourceOptions(sequence_column="Sequence", id_column="ACC", set_by="nothing")
    reader = CsvReader(source, reading)
    cure = "is this DeepLoc 2's table?"
    require_columns(str(source), reader.columns, ("Partition", *columns), cure)
    rows, partitions, left_out = _read(reader, columns, options)
    if not rows:
        raise UserError(
            f"{source}: no protein has {options.min_length:,} to {options.max_length:,} residues; correct "
            "--min-length and --max-length"
        )
    splits = _split(len(rows), partitions, options)
    by_split: dict[str, list[LabelledRow]] = {"train": [], "valid": [], "test": []}
    for row, split in zip(rows, splits, strict=True):
        by_split[split].append(row)
    if not by_split["train"]:
        raise UserError(f"{source}: the split leaves no protein to train on; hold out fewer")
    notes = [
        f"{source}: {left_out} proteins have fewer than {options.min_length} or more than "
        f"{options.max_length} residues and are left out"
    ]
    if options.test_partition is None:
        notes.append("split at random: relatives of training proteins are in the test set too")
    provenance: dict[str, Any] = {
        "benchmark": "DeepLoc 2",
        "options": options.used(),
        "sources": reader.checksums,
        "left_out": left_out,
    }
    one = options.labels == "membrane"
    names = [TARGET] if one else columns
    tables = LabelledTables(names, by_split, provenance, notes)
    with written_features(None if features is None else Path(features), by_split) as lines:
        kind = "classification" if one else "multilabel"
        return [*tables.write(Path(out), kind, TARGET if one else None), *lines]


def check_request(out: str | Path, options: DeepLocOptions, features: str | Path | None) -> None:
    """Refuse what cannot be made of any table; see `prepare_deeploc2` for the arguments.

    Raises:
        UserError: A directory exists, or an option does not go with another.
    """
    check_new(Path(out))
    _check(options)
    if features is None:
        return
    check_new(Path(features))
    if Path(features).absolute() == Path(out).absolute():
        raise UserError(f"--features {features}: is the directory of --out too; name another")
    if options.labels != "membrane":
        raise UserError(
            f"--features {features}: Model Zoo's loader has one label for each protein; give --labels "
            "membrane"
        )


def _check(options: DeepLocOptions) -> None:
    for name in ("test_fraction", "valid_fraction"):
        if options.test_partition is not None and (value := getattr(options, name)) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is of a split at random, --test-partition "
                f"{options.test_partition} of one by partitions; give one of them"
            )
    test, valid = options.fractions
    if min(test, valid) < 0 or test + valid >= 1:
        raise UserError(
            f"--test-fraction {test} and --valid-fraction {valid} must be at least 0 and less than 1 together"
        )
    if not 1 <= options.min_length <= options.max_length:
        raise UserError(
            f"--min-length {options.min_length} and --max-length {options.max_length}: the first must be at "
            "least 1 and not above the second"
        )
    if options.valid_partition is not None and options.valid_partition == options.test_partition:
        raise UserError(f"--valid-partition {options.valid_partition} is the one to test on; give another")
    if options.valid_partition is not None and options.test_partition is None:
        raise UserError("--valid-partition needs --test-partition")


def _read(
    reader: CsvReader, columns: list[str], options: DeepLocOptions
) -> tuple[list[LabelledRow], list[str], int]:
    """Return the rows of allowed length, their partitions, and how many rows were left out."""
    rows, partitions, left_out = [], [], 0
    for block in reader.blocks():
        for line, cells in reader.rows(block):
            location, name = reader.location(line), cells["ACC"].strip()
            residues = residues_of(cells["Sequence"], location, name).decode()
            if not options.min_length <= len(residues) <= options.max_length:
                left_out += 1
                continue
            labels = []
            for column in columns:
                flag = _FLAGS.get(cells[column].strip())
                if flag is None:
                    raise UserError(f"{location}: {column} of {name!r} is {cells[column]!r}, not 0 or 1")
                labels.append(flag)
            partition = cells["Partition"].strip().removesuffix(".0")
            if partition not in _PARTITIONS:
                raise UserError(f"{location}: Partition of {name!r} is {cells['Partition']!r}, not 0 to 4")
            rows.append(LabelledRow(name, residues, tuple(labels)))
            partitions.append(partition)
    return rows, partitions, left_out


def _split(total: int, partitions: list[str], options: DeepLocOptions) -> list[str]:
    """Return the split of each protein."""
    if options.test_partition is not None:
        named = {str(options.test_partition): "test", str(options.valid_partition): "valid"}
        return [named.get(partition, "train") for partition in partitions]
    test, valid = (round(total * fraction) for fraction in options.fractions)
    drawn = counter_rng.permute(np.arange(test + valid), total, options.seed, counter_rng.Purpose.SPLIT)
    splits = ["train"] * total
    for number, row in enumerate(drawn.tolist()):
        splits[row] = "test" if number < test else "valid"
    return splits
