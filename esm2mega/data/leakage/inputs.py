"""Reads the proteins of splits to compare: from tables, FASTA, token stores, or a folder of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esm2mega import vocabulary
from esm2mega.data.benchmarks.tables import read_manifest
from esm2mega.data.labels.sets import SPLIT_WORDS
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import is_known_ending, open_source
from esm2mega.data.store.splits import SPLITS
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.files import refuse_stream, split_sheet

Proteins = list[tuple[str, str]]

_MANIFEST = "manifest.json"
_FASTA = {".fasta", ".fa", ".faa"}


def read_splits(paths: Sequence[str]) -> dict[str, Proteins]:
    """Return id and sequence of the proteins of each split.

    Args:
        paths: Files or token stores of two or three splits, in the order train, valid, test (two are train
            and test); or one folder that holds the splits.

    Raises:
        UserError: A path cannot be read, or there are not at least two splits.
    """
    if len(paths) == 1:
        files = _files_of(Path(paths[0]))
    elif len(paths) in (2, 3):
        names = SPLITS if len(paths) == 3 else (SPLITS[0], SPLITS[-1])
        files = dict(zip(names, map(Path, paths), strict=True))
    else:
        raise UserError(
            f"--leakage compares two or three splits, {len(paths)} paths are given: give TRAIN VALID TEST, "
            "TRAIN TEST, or one folder with them"
        )
    return {split: _read(path) for split, path in files.items()}


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the path of each split in a folder."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: --leakage compares splits; give TRAIN VALID TEST, TRAIN TEST, or a folder "
            "with train, valid and test"
        )
    manifest = read_manifest(folder) if (folder / _MANIFEST).is_file() else None
    if manifest is not None:
        found = {split: folder / entry["file"] for split, entry in manifest["splits"].items()}
    else:
        found = _by_name(folder)
    if len(found) < 2:
        raise UserError(
            f"{folder}: holds {' and '.join(found) or 'none'} of train, valid and test, and --leakage "
            "compares at least two; name the files of the splits, TRAIN VALID TEST"
        )
    return found


def _by_name(folder: Path) -> dict[str, Path]:
    """Return the files and token stores of a folder whose names are those of splits, by split in order."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_WORDS.get(path.name.split(".")[0])
        if split is None or not _holds_proteins(path):
            continue
        if split in found:
            raise UserError(
                f"{folder}: has {found[split].name} and {path.name}; name the files of the splits, TRAIN "
                "VALID TEST"
            )
        found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def _holds_proteins(path: Path) -> bool:
    if path.is_dir():
        return (path / _MANIFEST).is_file()
    return is_known_ending(path) or not _FASTA.isdisjoint(map(str.lower, path.suffixes))


def _read(path: Path) -> Proteins:
    refuse_stream(path)
    if not split_sheet(path)[0].exists():
        raise UserError(f"{path}: no such path; give a table, a FASTA file or a token store")
    if path.is_dir() and (path / _MANIFEST).is_file():
        store = TokenStore(path)
        store.verify()
        return [
            (store.id(row), vocabulary.decode(store.residues(row)).replace("<unk>", "X"))
            for row in range(len(store))
        ]
    source = open_source(path, SourceOptions(set_by="nothing"))
    found = [(record.id, record.residues.decode()) for record in source]
    if not found:
        raise UserError(f"{path}: holds no proteins; give a file with some")
    return found
