"""Reads the manifest of a token store, and refuses one that is damaged or does not fit this version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.errors import DamagedError, UserError
from esm2mega.files import json_sha256, parse_json, real_path

FORMAT = "esm2mega token store"
FORMAT_VERSION = 1
PARTIAL_SUFFIX = ".partial"

TOKENS, INDEX = "tokens.bin", "tokens.idx"
IDS, ID_OFFSETS = "ids.bin", "ids.offsets.npy"
MANIFEST = "manifest.json"
TOKEN_FILES = re.compile(r"tokens(-\d{5})?\.bin")
CHECKSUM = "sha256"
"""This entry is the checksum of all other ones; manifests of earlier versions have none."""

_PREPARE_AGAIN = "make it again with `esm2mega prepare`"


@dataclass
class StoreCounts:
    """Counts what a store holds, and what was changed on the way in."""

    sequences: int = 0
    residues: int = 0
    token_counts: list[int] = field(default_factory=lambda: [0] * len(vocabulary.VOCAB))
    lower_case_residues: int = 0
    unknown_residues: int = 0
    dropped_sequences: int = 0

    def add(self, num_sequences: int, byte_counts: npt.NDArray[np.int64]) -> None:
        """Add proteins, given the byte histogram [256] of their residues as they were written."""
        tokens = vocabulary.token_histogram(byte_counts)
        self.sequences += num_sequences
        self.residues += int(byte_counts.sum())
        self.token_counts = (np.asarray(self.token_counts) + tokens).tolist()
        self.lower_case_residues += vocabulary.lower_case_count(byte_counts)
        self.unknown_residues += vocabulary.unknown_count(byte_counts)

    def merge(self, other: StoreCounts, sign: int = 1) -> None:
        """Add the counts of other proteins, or subtract them with `sign` -1."""
        self.sequences += sign * other.sequences
        self.residues += sign * other.residues
        self.token_counts = (np.asarray(self.token_counts) + sign * np.asarray(other.token_counts)).tolist()
        self.lower_case_residues += sign * other.lower_case_residues
        self.unknown_residues += sign * other.unknown_residues
        self.dropped_sequences += sign * other.dropped_sequences


def read_manifest(path: Path, staged: bool) -> Mapping[str, Any]:
    """Read the manifest of a complete store of this format and tokenizer; refuse anything else."""
    if not staged and any(
        part.startswith(".") and part.endswith(PARTIAL_SUFFIX) for part in real_path(path).parts
    ):
        raise UserError(
            f"{path}: is what an interrupted `prepare` left behind; start it again to continue, or remove it"
        )
    if not path.exists():
        raise UserError(
            f"{path}: there is no such file and no such token store; correct the path, or make a store with "
            "`esm2mega prepare fasta`"
        )
    file = path / MANIFEST
    if not file.is_file():
        inside = [
            f"{path / name}" for name in ("train", "valid", "test") if (path / name / MANIFEST).is_file()
        ]
        cure = f"did you mean {' or '.join(inside)}?" if inside else "make one with `esm2mega prepare fasta`"
        raise UserError(f"{path}: not a token store (no {MANIFEST}); {cure}")
    try:
        manifest = parse_json(file.read_bytes())
    except ValueError as error:
        raise damaged(file, f"is not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: is not the manifest of an esm2mega token store; check the path")
    if CHECKSUM in manifest and manifest != sealed(manifest):
        raise damaged(file, "differs from the checksum that it holds")
    _check_identity(file, manifest)
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the checksum of all its other entries."""
    content = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return {**content, CHECKSUM: json_sha256(content)}


def _check_identity(file: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version {version} is not {FORMAT_VERSION}, the one known; {_PREPARE_AGAIN}"
        )
    if manifest.get("tokenizer_hash") != vocabulary.TOKENIZER_HASH:
        made = str(manifest.get("tokenizer_hash"))[:12]
        ours = vocabulary.TOKENIZER_HASH[:12]
        raise UserError(f"{file}: made with another tokenizer (hash {made}, not {ours}); {_PREPARE_AGAIN}")
    _check_entries(file, manifest)


def _check_entries(file: Path, manifest: Mapping[str, Any]) -> None:
    """Check every entry that is read from the manifest later."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and value >= 0

    files, counts, sources = (manifest.get(name) for name in ("files", "token_counts", "sources"))
    sound = {
        "sequences": is_count(manifest.get("sequences")) and manifest["sequences"] > 0,
        "files": isinstance(files, dict)
        and files.keys() >= {INDEX, IDS, ID_OFFSETS}
        and any(TOKEN_FILES.fullmatch(name) for name in files)
        and all(
            isinstance(entry, dict)
            and is_count(entry.get("bytes"))
            and entry["bytes"] > 0
            and isinstance(entry.get("sha256"), str)
            for entry in files.values()
        ),
        "token_counts": isinstance(counts, list)
        and len(counts) == len(vocabulary.VOCAB)
        and all(map(is_count, counts)),
        "tokens_sha256": isinstance(manifest.get("tokens_sha256"), str),
        "sources": isinstance(sources, list)
        and all(isinstance(source, dict) and {"name", "sha256"} <= source.keys() for source in sources),
    }
    if wrong := [name for name, holds in sound.items() if not holds]:
        raise damaged(file, f"the entry {wrong[0]!r} is missing or not what it should be")


def damaged(file: Path, what: str) -> DamagedError:
    """Return the error for a file of a store that is not what it was written as."""
    made = file.parent.parent
    cure = _PREPARE_AGAIN
    if cache_lock(made).exists():
        cure = f"remove the directory {made}, and the same command makes it again from your file"
    return DamagedError(file, f"{what}: the token store is damaged; {cure}")


def cache_lock(made: Path) -> Path:
    """Return the lock under which stores are made of a file that a configuration names.

    Args:
        made: Directory of these stores in the cache.
    """
    return made.with_name(f".{made.name}.lock")
