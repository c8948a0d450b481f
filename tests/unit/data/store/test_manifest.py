"""Manifests of token stores: what is no store, or not one of this version, is refused with the cure."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from esm2mega.data.store.token_store import TokenStore
from tests.unit.data.damage import edit_manifest, error_of

if TYPE_CHECKING:
    from tests.unit.data.conftest import WriteStore

SEQUENCES = ["MKTL", "acJ"]


def test_error_for_a_path_that_is_no_store(tmp_path: Path, write_store: WriteStore) -> None:
    assert "no such file and no such token store" in error_of(tmp_path / "absent")
    outer = tmp_path / "outer"
    outer.mkdir()
    assert "not a token store (no manifest.json); make one with `esm2mega prepare fasta`" in error_of(outer)
    shutil.copytree(write_store(SEQUENCES).path, outer / "train")
    assert error_of(outer).endswith(f"did you mean {outer / 'train'}?")
    (outer / "manifest.json").write_text("{}")
    assert "is not the manifest of an esm2mega token store" in error_of(outer)
    (outer / "manifest.json").write_text("{")
    assert "is not JSON" in error_of(outer)


def test_a_manifest_holds_a_checksum_of_itself(write_store: WriteStore) -> None:
    """SHA-256 over the other entries as JSON with sorted keys and without white space."""
    store = write_store(SEQUENCES)
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    others = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    assert manifest["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "lower_case_residues": 0}))
    assert "manifest.json: differs from the checksum that it holds: the token store is damaged" in error_of(
        store.path
    )
    file.write_text(json.dumps(others))
    assert store.is_sealed and not TokenStore(store.path).is_sealed
    assert TokenStore(store.path).fingerprint == store.fingerprint


def test_error_for_another_tokenizer_or_version(write_store: WriteStore) -> None:
    store = write_store(SEQUENCES)
    edit_manifest(store, tokenizer_hash="0123456789abcdef")
    assert "made with another tokenizer (hash 0123456789ab, not " in error_of(store.path)
    edit_manifest(store, format_version=2)
    assert "format_version 2 is not 1, the one known" in error_of(store.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequences", 0),
        ("sequences", "4"),
        ("sources", None),
        ("sources", [{"name": "x.fasta"}]),
        ("token_counts", None),
        ("token_counts", [1] * 32),
        ("token_counts", ["1"] * 33),
        ("files", None),
        ("files", {"tokens.bin": {"bytes": 3}}),
    ],
)
def test_error_for_an_entry_that_is_read_later(write_store: WriteStore, name: str, value: object) -> None:
    store = write_store(SEQUENCES)
    edit_manifest(store, **{name: value})
    message = error_of(store.path)
    assert message.startswith(f"{store.path / 'manifest.json'}: the entry {name!r} is missing or not what")
