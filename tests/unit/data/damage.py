"""Damages token stores, and reads what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError


def error_of(path: Path) -> str:
    """The one line with which a store is refused."""
    with pytest.raises(UserError) as caught:
        TokenStore(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(store: TokenStore, **changes: object) -> None:
    """Replace entries of a manifest, which then has no checksum of its own, as in earlier versions."""
    file = store.path / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changes}
    manifest.pop("sha256", None)
    file.write_text(json.dumps(manifest))


def flip(file: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        value = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([value ^ 1 << bit % 8]))
