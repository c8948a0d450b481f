"""Fixtures of the data tests: the real UniRef90 sample where it is present, and small stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import StoreWriter, TokenStore

REPOSITORY = Path(__file__).resolve().parents[3]
REAL_FASTA = REPOSITORY.parent / "shared" / "data" / "uniref_sample" / "uniref90_sample_8000.fasta"

WriteStore = Callable[[Sequence[str]], TokenStore]


@pytest.fixture(scope="session")
def real_fasta() -> Path:
    """8,000 UniRef90 sequences, lengths 12 to 8,001."""
    if not REAL_FASTA.is_file():
        pytest.skip("the UniRef90 sample is not beside the repository (../shared/data/uniref_sample)")
    return REAL_FASTA


@pytest.fixture(scope="session")
def real_store(real_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The store of all 8,000 sequences."""
    out = tmp_path_factory.mktemp("real") / "store"
    prepare_fasta([real_fasta], out)
    return TokenStore(out / "train")


@pytest.fixture
def write_store(tmp_path: Path) -> WriteStore:
    """Makes a store of the given sequences, with ids p0, p1, ..."""

    def write(sequences: Sequence[str]) -> TokenStore:
        with StoreWriter(tmp_path / "store") as writer:
            writer.append([f"p{i}" for i in range(len(sequences))], [text.encode() for text in sequences])
        return TokenStore(tmp_path / "store")

    return write
