"""Sizes that files claim, through every reader: what is too large is refused at once, in bounded memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm2mega.data.readers.base import LONGEST_SEQUENCE, LONGEST_TEXT, SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.data.readers.text import zstd
from esm2mega.errors import UserError
from esm2mega.infer.variant_tables import read_table
from tests.unit.data.readers.test_megatron import write as write_megatron

PIECE = b"A" * (4 << 20)
HEADS = {
    "fasta": b">p\n",
    "csv": b"id,sequence\np,",
    "jsonl": b'{"id": "p", "sequence": "',
    "clusters": b"x\n",
}
READ = """
import resource, sys
from esm2mega.errors import UserError
from esm2mega.data.readers.sources import open_source
from esm2mega.data.readers.base import SourceOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(open_source(sys.argv[1], SourceOptions()))
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def one_long_line(path: Path, head: bytes) -> Path:
    """A file of some 400 KB, which is one line of 400 MB: a hundred equal members or frames."""
    compress = gzip.compress if path.suffix == ".gz" else zstd.compress
    path.write_bytes(compress(head) + compress(PIECE) * 100)
    assert path.stat().st_size < 1 << 20
    return path


@pytest.mark.parametrize("name", ["fasta.gz", "fasta.zst", "csv.gz", "jsonl.zst"])
def test_a_line_of_400_megabytes_is_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    path = one_long_line(tmp_path / f"long.{name}", HEADS[name.split(".")[0]])
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    message, peak = done.stdout.splitlines()
    assert message.startswith(f"{path}:") and "has more than 32 MiB" in message
    assert int(peak) < 100 << 10  # KiB: some 47 MiB are needed, the record so far and the piece behind it


def test_a_table_of_variants_is_bounded_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"long\.csv\.gz:1: a line has more than 32 MiB"):
        read_table(one_long_line(tmp_path / "long.csv.gz", b"mutant"))


def test_the_longest_sequence_is_the_same_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm2mega.data.readers.base.LONGEST_SEQUENCE", 5)
    files = {
        "a.fasta": lambda residues: f">p\n{residues}\n",
        "a.csv": lambda residues: f"id,sequence\np,{residues}\n",
        "a.jsonl": lambda residues: f'{{"id": "p", "sequence": "{residues}"}}\n',
    }
    for length in (5, 6):
        residues, sources = "A" * length, []
        for name, content in files.items():
            (tmp_path / name).write_text(content(residues))
            sources.append(tmp_path / name)
        pq.write_table(pa.table({"id": ["p"], "sequence": [residues]}), tmp_path / "a.parquet")
        sources += [tmp_path / "a.parquet", write_megatron(tmp_path, [[6] * length])]
        for path in sources:
            source = open_source(path, SourceOptions())
            if length == 5:
                assert [len(record.residues) for record in source] == [5]
                continue
            with pytest.raises(UserError, match=r"has 6 residues, the limit is 5; remove or cut the record"):
                list(source)


def test_a_long_record_is_taken_up_to_the_limit(tmp_path: Path) -> None:
    """Blocks grow up to what the limit allows, and line ends do not count."""
    line = b"A" * 63 + b"\n"
    path = tmp_path / "long.fasta"
    path.write_bytes(b">p\n" + line * (LONGEST_SEQUENCE // 63) + b">q\nMK\n")
    assert [len(record.residues) for record in open_source(path, SourceOptions())] == [
        LONGEST_SEQUENCE // 63 * 63,
        2,
    ]
    assert LONGEST_TEXT > LONGEST_SEQUENCE * 64 // 63


def test_a_table_with_one_giant_cell_is_refused_before_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"id": ["p", "q"], "sequence": ["A" * (5 * LONGEST_SEQUENCE), "MK"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"a\.parquet: rows 1 to 2 take 40 MiB each in 'sequence'"):
        list(open_source(tmp_path / "a.parquet", SourceOptions()))


def test_an_index_of_more_sequences_than_it_has_bytes_for(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, [[6], [7]])
    index = bytearray(path.read_bytes())
    index[18:26] = np.uint64(1 << 62).tobytes()
    path.write_bytes(index)
    with pytest.raises(UserError, match=r"has \d+ bytes instead of \d{20}"):
        open_source(path, SourceOptions())
