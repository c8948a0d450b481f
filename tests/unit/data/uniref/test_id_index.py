"""The index of ids finds what a dictionary finds, also where hashes collide and at every block border."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esm2mega.data.uniref import id_index
from esm2mega.data.uniref.id_index import IdIndex

IDS = st.lists(st.binary(min_size=1, max_size=3), max_size=60)

# With one or five hash values for all ids, only the comparison of the ids themselves tells them apart.
HASHES = {"one": lambda text: -5, "five": lambda text: (hash(text) % 5 - 2) << 61, "many": hash}


def build(folder: Path, ids: list[bytes], batch: int = 7) -> IdIndex:
    index = IdIndex(folder)
    for first in range(0, len(ids), batch):
        index.append(ids[first : first + batch])
        index.append([])
    index.close()
    return index


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=IDS, queries=IDS, hashes=st.sampled_from(sorted(HASHES)))
def test_finds_what_a_dictionary_finds(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    ids: list[bytes],
    queries: list[bytes],
    hashes: str,
) -> None:
    monkeypatch.setattr(id_index, "_hash_of", HASHES[hashes])
    monkeypatch.setattr(id_index, "_BLOCK", 4)
    index = build(tmp_path_factory.mktemp("index") / "new", ids)
    first: dict[bytes, int] = {}
    repeats = []
    for number, name in enumerate(ids):
        if first.setdefault(name, number) != number:
            repeats.append(number)
    queries = queries + ids + [b""]
    assert index.find(queries).tolist() == [first.get(name, -1) for name in queries]
    assert index.repeats() == ((repeats[0], first[ids[repeats[0]]], len(repeats)) if repeats else None)
    assert [name for _, block in index.blocks() for name in block] == ids
    assert [index[number] for number in range(len(ids))] == ids


def test_many_ids(tmp_path: Path) -> None:
    ids = [b"UniRef90_%x" % (number * 7919) for number in range(150_000)]
    index = build(tmp_path / "index", ids, 20_000)
    assert (index.find(ids) == range(150_000)).all()
    assert (index.find([name + b"x" for name in ids]) == -1).all()
    assert index.repeats() is None
