"""TAPE's LMDB files: real records are read, and nothing that a pickle asks for is run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import resource
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from esm2mega.data.readers import tape
from esm2mega.data.readers.lmdb_pages import check_pages
from esm2mega.data.readers.tape import TapeReader, load_restricted
from esm2mega.errors import UserError

PFAM = [
    {"primary": "MKTL", "protein_length": 4, "clan": -1, "family": 7},
    {"primary": "GAC", "protein_length": 3, "clan": 2, "family": 8, "id": b"Q9"},
    {"primary": "W", "protein_length": 1, "clan": 2, "family": 9, "id": "x"},
]


def write(tmp_path: Path, entries: Mapping[str, bytes], count: object = None, subdir: bool = True) -> Path:
    path = tmp_path / "pfam_train.lmdb"
    environment = lmdb.open(str(path), map_size=1 << 20, subdir=subdir)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
        transaction.put(b"num_examples", pickle.dumps(len(entries) if count is None else count))
    return path


def pickled(rows: list[dict[str, Any]], protocol: int = 4) -> dict[str, bytes]:
    return {str(i): pickle.dumps(row, protocol=protocol) for i, row in enumerate(rows)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("subdir", [True, False])
def test_records_of_every_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, subdir: bool
) -> None:
    monkeypatch.setattr(tape, "_BLOCK_RECORDS", 2)
    rows = [{**row, "score": np.array([1.5], np.float32), "n": np.float64(2)} for row in PFAM]
    reader = TapeReader(write(tmp_path, pickled(rows, protocol), subdir=subdir))
    assert [(record.id, record.residues) for record in reader] == [
        ("0", b"MKTL"),
        ("Q9", b"GAC"),
        ("x", b"W"),
    ]
    assert len(list(reader.blocks())) == 2
    assert list(reader.checksums) == ["data.mdb" if subdir else "pfam_train.lmdb"]


class _Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def malicious(target: str) -> dict[str, bytes]:
    numpy_load = b"cnumpy\nload\n(X" + len(target).to_bytes(4, "little") + target.encode() + b"tR."
    return {
        "system": pickle.dumps({"primary": _Runs(os.system, f"touch {target}")}),
        "eval": pickle.dumps({"primary": _Runs(eval, f"open({target!r}, 'w')")}),
        "open": pickle.dumps(_Runs(io.open, target, "w")),
        "getattr": b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "numpy.load": numpy_load,
        "instance": b"(S'touch " + target.encode() + b"'\nios\nsystem\n.",
        "ordered": pickle.dumps(OrderedDict(primary="MK")),
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tobytes\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pabc\n.",
    }


@pytest.mark.parametrize("name", malicious("x"))
def test_a_pickle_that_names_anything_else_is_refused_and_does_nothing(tmp_path: Path, name: str) -> None:
    target = tmp_path / "touched"
    payload = malicious(str(target))[name]
    path = write(tmp_path, {"0": pickle.dumps(PFAM[0]), "1": payload})
    with pytest.raises(UserError) as caught:
        list(TapeReader(path))
    assert "record 1: the pickle is not read" in str(caught.value) and "\n" not in str(caught.value)
    assert not target.exists()


def test_the_malicious_pickles_would_work_elsewhere(tmp_path: Path) -> None:
    # Else the test above would show nothing.
    target = tmp_path / "touched"
    pickle.loads(malicious(str(target))["open"]).close()
    assert target.exists()


def test_a_refused_count_does_nothing_either(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = write(tmp_path, pickled(PFAM), count=_Runs(io.open, str(target), "w"))
    with pytest.raises(UserError, match=r"record num_examples: the pickle is not read: it names _?io\.open"):
        TapeReader(path)
    assert not target.exists()


def test_arrays_are_never_built() -> None:
    found = load_restricted(pickle.dumps({"a": np.arange(5), "b": [np.float32(1)], "c": "text"}))
    assert found["c"] == "text"
    assert {type(found["a"]).__name__, type(found["b"][0]).__name__} == {"_Skipped"}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_damaged_pickle_is_an_error(cut: int) -> None:
    data = pickle.dumps(PFAM[0])
    with pytest.raises(ValueError, match="."):
        load_restricted(data[:-cut])
    assert pickletools.dis(data, out=io.StringIO()) is None  # the whole one is fine


@pytest.mark.parametrize("put", [b"r" + (1 << 27).to_bytes(4, "little"), b"p134217728\n"])
def test_a_pickle_of_a_few_bytes_takes_no_gigabyte(put: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_restricted(b"\x80\x02}" + put + b".") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        ([{"sequence": "MK"}], None, "record 0: is no dict with the key 'primary'"),
        ([{"primary": "MK"}, {"primary": ""}], None, "record 1: the sequence of '1' is empty"),
        ([{"primary": "MK"}, {"primary": 5}], None, "record 1: 'primary' of '1' is a number"),
        ([{"primary": "M1"}], None, "record 0: '1' in the sequence of '0' is no residue"),
        ([{"primary": "MK"}], 2, "num_examples is 2, but the file has 1 other entries; is this a complete"),
        ([{"primary": "MK"}], 1 << 62, "num_examples is 4611686018427387904, but the file has 1 other entr"),
        ([{"primary": "MK"}], True, "num_examples is True, not a number of records"),
        ([{"primary": "MK"}], "2", "num_examples is '2', not a number of records"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], count: object, expected: str
) -> None:
    path = write(tmp_path, pickled(rows), count)
    with pytest.raises(UserError) as caught:
        list(TapeReader(path))
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_a_count_of_any_length_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_examples is int with too many digits to be shown, but the file"):
        TapeReader(write(tmp_path, pickled(PFAM), 10**5000))


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = write(tmp_path, pickled(PFAM * 500), subdir=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"has \d+ bytes instead of \d+ \(truncated\)"):
        TapeReader(path)
    path.write_bytes(b"no data base" * 1000)
    with pytest.raises(UserError, match="is not a readable LMDB file"):
        TapeReader(path)
    with pytest.raises(UserError, match="no such LMDB file"):
        TapeReader(tmp_path / "absent.lmdb")


@pytest.fixture(scope="module")
def many_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose tree has three levels, with values of less and of more than a page."""
    rows = [{"primary": "MKTL" * (number % 40 + 1)} for number in range(3000)]
    rows[7] = {"primary": "MKTL" * 5000}
    path = tmp_path_factory.mktemp("pages") / "many.lmdb"
    environment = lmdb.open(str(path), map_size=1 << 24, subdir=False)
    with environment, environment.begin(write=True) as transaction:
        for number, row in enumerate(rows):
            transaction.put(str(number).encode(), pickle.dumps(row))
        transaction.put(b"num_examples", pickle.dumps(len(rows)))
    return path


def test_pages_are_counted_as_the_library_counts_them(many_pages: Path) -> None:
    with lmdb.open(str(many_pages), subdir=False, readonly=True, lock=False) as environment:
        assert check_pages(many_pages) == environment.stat()["entries"] == 3001
        assert environment.stat()["depth"] >= 2 and environment.stat()["overflow_pages"] > 0
    assert sum(1 for _ in TapeReader(many_pages)) == 3000


@pytest.mark.parametrize("count", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_no_changed_byte_lets_the_library_read_behind_the_end(
    many_pages: Path, tmp_path: Path, count: int
) -> None:
    """What the pages say is checked, so that a change is an error or an entry that reads otherwise."""
    content, rng = many_pages.read_bytes(), np.random.default_rng(4)
    path, refused = tmp_path / "changed.lmdb", 0
    pages = len(content) // 4096
    for _ in range(count):
        changed = bytearray(content)
        # The heads of pages and the offsets behind them, which say where the rest is.
        at = int(rng.integers(pages)) * 4096 + int(rng.integers(160))
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            for _ in TapeReader(path):
                pass
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > count / 5


def test_without_lmdb_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, pickled(PFAM))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install 'esm2mega\[tape\]'"):
        TapeReader(path)
