"""ESM2-FA's shards: written by `datasets` itself; damaged and hostile files are one line."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from esm2mega.config.load import load_run
from esm2mega.data.readers import esm2fa
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.esm2fa import Esm2faReader
from esm2mega.data.readers.sources import format_of, open_source
from esm2mega.data.store.cache import open_store
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from tests.esm2fa import ARROW, rows, shard

PROTEINS = [(f">p{n} some words", "LAGVSERTIDPKQNFYMHWCXBUZO"[n % 20 :] * (n % 3 + 1)) for n in range(11)]
READ = [(f"p{n}", text.encode(), n + 1) for n, (_, text) in enumerate(PROTEINS)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, of 7 and of 4 rows; read only."""
    folder = tmp_path_factory.mktemp("esm2fa") / "train"
    shard(folder / "shard-00000", PROTEINS[:7])
    shard(folder / "shard-00001", PROTEINS[7:])
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """One shard, to change."""
    return Path(shutil.copytree(written / "shard-00000", tmp_path / "one"))


@pytest.mark.parametrize("rows_of_a_block", [1, 5, 100])
def test_rows_of_all_shards_in_order(
    written: Path, monkeypatch: pytest.MonkeyPatch, rows_of_a_block: int
) -> None:
    monkeypatch.setattr(esm2fa, "_BLOCK_ROWS", rows_of_a_block)
    reader = open_source(written, SourceOptions())
    assert [tuple(record) for record in reader] == READ
    assert [(b.line, b.stop) for b in reader.blocks()] == [(1, 8), (8, 12)]
    assert list(reader.checksums) == [f"shard-0000{n}/{ARROW}" for n in (0, 1)]
    # Any process reads any block.
    *_, last = reader.blocks()
    assert [tuple(record) for record in Esm2faReader(written).for_worker().records(last)] == READ[7:]


def test_files_of_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esm2fa, "_BLOCK_ROWS", 4)
    folder = shard(tmp_path / "x", PROTEINS)
    table = pa.ipc.open_stream((folder / ARROW).read_bytes()).read_all()
    with pa.ipc.new_stream(folder / ARROW, table.schema) as out:
        for batch in (table[:3], table[3:3], table[3:5], table[5:11]):
            out.write_table(batch, max_chunksize=3)
    reader = Esm2faReader(folder)
    assert [tuple(record) for record in reader] == READ
    assert [(b.line, b.stop) for b in reader.blocks()] == [(1, 6), (6, 12)]


def test_stores_of_shards_and_of_the_fasta_are_the_same(written: Path, tmp_path: Path) -> None:
    (tmp_path / "x.fasta").write_text("".join(f"{name}\n{text}\n" for name, text in PROTEINS))
    prepare_fasta([tmp_path / "x.fasta"], tmp_path / "fasta")
    report = prepare_fasta([written], tmp_path / "arrow")
    stores = [TokenStore(tmp_path / name / "train") for name in ("fasta", "arrow")]
    assert [store.tokens[:].tolist() for store in stores][0] == stores[1].tokens[:].tolist()
    assert [[store.id(n) for n in range(11)] for store in stores] == [[name for name, _, _ in READ]] * 2
    assert "pieces of long proteins" in report.lines()[0]


def test_a_configuration_names_the_directory(written: Path, tmp_path: Path) -> None:
    run = load_run(None, ["model.size=tiny", f"data.cache_dir={tmp_path}"])
    assert format_of(written) == format_of(written / "shard-00000") == "esm2fa"
    assert len(open_store(str(written), run.data, None, "data.train")) == 11


def test_special_tokens_at_the_ends(tmp_path: Path) -> None:
    """Pieces begin without <cls> or end without <eos>; an unknown letter stays one residue."""
    columns = rows([(">x/1-3", "LAG"), (">x/4-6", "LAG"), (">x/7-end y", "LAG")])
    columns["input_ids"] = [[0, 4, 5, 6], [4, 3, 6, 1, 1], [4, 5, 6, 2, 1]]
    read = [(r.id, r.residues) for r in Esm2faReader(shard(tmp_path / "x", columns))]
    assert read == [("x/1-3", b"LAG"), ("x/4-6", b"LJG"), ("x/7-end", b"LAG")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_ids": [[0, 33, 2]]}, "x: row 1: has the token id 33; ids of ESM-2 are 0 to 32"),
        ({"input_ids": [[0, -4, 2]]}, "x: row 1: has the token id -4"),
        ({"input_ids": [[0, 4, 2, 0, 4, 2]]}, "x: row 1: has <eos> between its residues"),
        ({"input_ids": [[0, 4, 32, 2]]}, "x: row 1: has <mask> between its residues"),
        ({"input_ids": [[0, 2, 1]]}, "x: row 1: has no residues"),
        ({"input_ids": [[]]}, "holds list<item: null>; give shards of ESM2-FA"),
        ({"input_ids": [[0, None, 2]]}, "x: rows 1 to 1 hold an empty token"),
        ({"input_ids": [None], "id": [">a"]}, "'input_ids' holds null"),
        ({"input_ids": ["LAG"]}, "'input_ids' holds string; give shards of ESM2-FA"),
        ({"id": [7]}, "'id' holds int64"),
        ({"id": ["> "]}, "x: row 1: the id '> ' is blank"),
        ({"id": [">a\x00b"]}, "x: row 1: the id 'a\\x00b' holds unprintable characters"),
        ({"id": None}, f"x/{ARROW}: no column 'id' among input_ids; give shards of ESM2-FA; other data sets"),
    ],
    ids=str,
)
def test_rows_that_are_no_protein(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    columns = {"id": [">a"], "input_ids": [[0, 4, 2]], **changes}
    folder = shard(tmp_path / "x", {name: column for name, column in columns.items() if column is not None})
    with pytest.raises(UserError) as error:
        list(Esm2faReader(folder))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def _state(content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "state.json").write_text(json.dumps(content))


def _stream(folder: Path, options: pa.ipc.IpcWriteOptions | None, dictionary: bool = False) -> None:
    table = pa.ipc.open_stream((folder / ARROW).read_bytes()).read_all()
    if dictionary:
        table = table.set_column(0, "id", table["id"].dictionary_encode())
    with pa.ipc.new_stream(folder / ARROW, table.schema, options=options) as out:
        out.write_table(table)


def _overwrite(folder: Path, old: bytes, new: bytes) -> None:
    content = (folder / ARROW).read_bytes()
    assert content.count(old) == 1
    (folder / ARROW).write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda f: (f / ARROW).write_bytes((f / ARROW).read_bytes()[:-8]),
            "is no Arrow stream, or cut short",
        ),
        (lambda f: (f / ARROW).write_bytes(b""), "is no Arrow stream, or cut short"),
        (lambda f: (f / ARROW).write_bytes(b"x" * 64 + esm2fa._END), "is not a readable Arrow file"),
        (lambda f: _stream(f, pa.ipc.IpcWriteOptions(compression="zstd")), "has compressed data"),
        (lambda f: _stream(f, pa.ipc.IpcWriteOptions(compression="lz4")), "has compressed data"),
        (lambda f: _stream(f, None, dictionary=True), "the column 'id' holds dictionary"),
        (lambda f: (f / ARROW).unlink(), "no such Arrow file, but"),
        (_state({"_data_files": [{"filename": "../shard-00001/x.arrow"}]}), "outside of its directory"),
        (_state({"_data_files": [{"filename": "/etc/passwd"}]}), "outside of its directory"),
        (_state({"_data_files": [{"filename": ".."}]}), "no such Arrow file"),
        (_state({"_data_files": "x"}), "does not list the files of a data set"),
        (_state([]), "does not list the files of a data set"),
        (lambda f: (f / "state.json").write_bytes(b"[" * 100_000), "does not list the files of a data set"),
        (lambda f: (f / "state.json").unlink(), "holds neither state.json nor shard-*"),
        (
            lambda f: _overwrite(f, b"p0 some words>p1", b"p0 some w\xff\xfe\xfds>p1"),
            "is not a readable Arrow",
        ),
    ],
)
def test_damage_is_one_line(copied: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(copied)
    with pytest.raises(UserError) as error:
        list(Esm2faReader(copied))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_offsets_that_lead_out_of_the_file(copied: Path) -> None:
    """Arrow does not look at them when it reads; they would make Python read any memory."""
    offsets = b"".join(n.to_bytes(4, "little") for n in range(0, 8 * 77 + 1, 77))
    lengths = [len(text) + 2 for _, text in PROTEINS[:7]]
    padded = max(lengths)
    old = b"".join((n * padded).to_bytes(4, "little") for n in range(8))
    content = (copied / ARROW).read_bytes()
    assert old in content
    (copied / ARROW).write_bytes(content.replace(old, offsets[: len(old)]))
    with pytest.raises(UserError, match="is not a readable Arrow file"):
        list(Esm2faReader(copied))


def test_changed_bytes_are_one_line_or_other_rows(copied: Path) -> None:
    """Nothing else, whatever the file says."""
    content, rng = (copied / ARROW).read_bytes(), np.random.default_rng(5)
    refused = 0
    for number in range(300):
        changed = bytearray(content)
        # Half of the changes are in the heads, which are the first kB.
        for place in rng.integers(0, (len(content), 1000)[number % 2], rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        (copied / ARROW).unlink()  # the old one may be mapped still
        (copied / ARROW).write_bytes(changed)
        try:
            list(Esm2faReader(copied))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 300


def test_a_place_outside_of_a_head(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(metadata: bytes) -> bool:
        return bool(struct.unpack_from("<i", metadata, len(metadata)))

    monkeypatch.setattr(esm2fa, "_is_compressed", outside)
    with pytest.raises(UserError, match="is not a readable Arrow file"):
        list(Esm2faReader(copied))


def test_without_pyarrow_the_extra_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"needs pyarrow; install it with `pip install 'esm2mega\[parquet\]'`"
    ):
        Esm2faReader(written)
