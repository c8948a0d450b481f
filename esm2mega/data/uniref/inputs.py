"""Decides from the options which of three kinds of input `prepare uniref` was given, and prepares it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm2mega.data.uniref.bionemo import BioNeMoInputs, prepare_bionemo
from esm2mega.data.uniref.build import ClusterReport, UniRefInputs, bytes_to_read, prepare_uniref
from esm2mega.data.uniref.leakage import SplitSizes
from esm2mega.data.uniref.table import prepare_table
from esm2mega.errors import UserError
from esm2mega.report.progress import Progress

# Each kind has options that it needs, and further ones. `out` and `seed` go with all kinds.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fasta": (
        ("uf50", "uf90", "mapping"),
        ("valid", "test", "valid_size", "test_size", "drop_other_clusters"),
    ),
    "bionemo": (
        ("train_cluster_path", "train_database_path"),
        ("valid_cluster_path", "valid_database_path"),
    ),
    "table": (("table",), ("valid_table",)),
}


def prepare_from_options(options: Mapping[str, Any]) -> ClusterReport:
    """Prepare the stores, with progress on stderr.

    Args:
        options: options of the command line by name; None, 0 or False where they were not given.
    """
    kind = _kind_of(options)
    out = options["out"]
    if kind == "fasta":
        inputs = UniRefInputs(*(options[name] for name in ("uf50", "uf90", "mapping", "valid", "test")))
        sizes = SplitSizes(options["valid_size"], options["test_size"], options["seed"])
        with Progress(bytes_to_read(inputs, sizes), "prepare", "byte") as progress:
            return prepare_uniref(inputs, out, sizes, options["drop_other_clusters"], progress)
    paths = [options[name] for name in (*_KINDS[kind][0], *_KINDS[kind][1])]
    with Progress(sum(map(_size, filter(None, paths))), "prepare", "byte") as progress:
        if kind == "bionemo":
            return prepare_bionemo(BioNeMoInputs(*paths), out, progress)
        return prepare_table(options["table"], out, options["valid_table"], progress)


def _kind_of(options: Mapping[str, Any]) -> str:
    """Return the kind of input that the options name; raise UserError when they mix kinds or are too few."""
    given = {
        kind: [name for name in (*needed, *further) if options[name]]
        for kind, (needed, further) in _KINDS.items()
    }
    kinds = [kind for kind, names in given.items() if names]
    if len(kinds) > 1:
        first, second = (_flag(given[kind][0]) for kind in kinds[:2])
        raise UserError(f"{first} and {second} belong to different kinds of input; give the options of one")
    kind = kinds[0] if kinds else "fasta"
    missing = [_flag(name) for name in _KINDS[kind][0] if not options[name]]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing; give --uf50, --uf90 and --mapping, or --train-cluster-path "
            "and --train-database-path, or --table"
        )
    return kind


def _flag(name: str) -> str:
    return "--" + {"valid_size": "val_size"}.get(name, name).replace("_", "-")


def _size(path: str) -> int:
    """Return the bytes of a file, or of the Parquet files in a directory; 0 for what is missing."""
    files = Path(path).glob("*.parquet") if Path(path).is_dir() else [Path(path)]
    return sum(file.stat().st_size for file in files if file.is_file())
