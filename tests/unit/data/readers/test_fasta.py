"""The FASTA reader: what is FASTA is read as written, everything else is one line naming the place."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import dnaio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esm2mega.data.readers import text
from esm2mega.data.readers.base import Record
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def write(tmp_path: Path, content: bytes, name: str = "in.fasta") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def read(tmp_path: Path, content: bytes) -> list[Record]:
    return list(FastaReader(write(tmp_path, content)))


def message(tmp_path: Path, content: bytes) -> str:
    """The error of reading `content`, without the directory, after checking that it is one line."""
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        list(FastaReader(path))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path))
    return text.removeprefix(f"{path.parent}/")


EXPECTED = [Record("a", b"MKTL", 1), Record("b", b"ACdef*-.", 4)]


@pytest.mark.parametrize(
    "content",
    [
        b">a first\nMK\nTL\n>b\nACdef*-.\n",
        b">a first\nMK\nTL\n>b\nACdef*-.",
        b">a first\r\nMK\r\nTL\r\n>b\r\nACdef*-.\r\n",
        b">a\tfirst > b\nM K\n\tTL \n>b\nACd ef*-.\n\n\n",
        b"\xef\xbb\xbf>a first\nMK\nTL\n>b\nACdef*-.\n",
        b">a \xe9 Latin-1 description\nMK\nTL\n>b\nACdef*-.\n",
    ],
    ids=["plain", "no final newline", "CRLF", "white space", "byte order mark", "any description"],
)
def test_records(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == EXPECTED


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    content = b"\n  \n>a\n\nMK\n\nTL\n\n>b\nAC\n"
    assert read(tmp_path, content) == [Record("a", b"MKTL", 3), Record("b", b"AC", 9)]


def test_duplicate_and_non_ascii_ids_are_kept(tmp_path: Path) -> None:
    records = read(tmp_path, ">x\nM\n>x\nM\n>prot\u00e9ine\u2013\u03b1 d\nK\n".encode())
    assert [record.id for record in records] == ["x", "x", "prot\u00e9ine\u2013\u03b1"]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_block_borders_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    content = b"\n\n>a x\r\nMK\nTL\n\n>b\nACDEFG\n>c\nW"
    whole = read(tmp_path, content)
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    assert read(tmp_path, content) == whole
    assert [(r.id, r.residues, r.line) for r in whole] == [
        ("a", b"MKTL", 3),
        ("b", b"ACDEFG", 7),
        ("c", b"W", 9),
    ]


def test_gzip_is_recognised_by_content_and_hashed_as_it_lies_on_disk(tmp_path: Path) -> None:
    members = gzip.compress(b">a first\nMK\nTL\n>b\nAC", mtime=0) + gzip.compress(b"def*-.\n", mtime=0)
    path = write(tmp_path, members, "named_wrongly.fasta")
    reader = FastaReader(path)
    assert list(reader) == EXPECTED
    assert reader.sha256 == hashlib.sha256(members).hexdigest()
    assert reader.num_records == 2


def test_progress_counts_bytes_on_disk(tmp_path: Path) -> None:
    class Count:
        total = 0

        def update(self, n: int) -> None:
            self.total += n

    plain = write(tmp_path, b">a\n" + b"MKTL" * 1000 + b"\n")
    packed = write(tmp_path, gzip.compress(plain.read_bytes(), mtime=0), "a.gz")
    progress = Count()
    for path in (plain, packed):
        list(FastaReader(path, progress))
    assert progress.total == plain.stat().st_size + packed.stat().st_size


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "in.fasta: no sequences in the file"),
        (b"\n \r\n\n", "in.fasta: no sequences in the file"),
        (b">a\nMK\n>b desc\n>c\nAC\n", "in.fasta:3: no sequence under the header of 'b'"),
        (b">a\nMK\n>b\rMKTAY\nMK\n", "in.fasta:3: a carriage return without a line feed in a header"),
        (b">a\nMK\n>b desc\n \n\n", "in.fasta:3: no sequence under the header of 'b'"),
        (b">only a header", "in.fasta:1: no sequence under the header of 'only'"),
        (
            b"\nid,sequence\na,MKTL\n",
            "in.fasta:2: not FASTA: a record must start with '>' but this line starts 'id,",
        ),
        (b"MKTL", "in.fasta:1: not FASTA: a record must start with '>' but this line starts 'MKTL'"),
        (b"@read\nACGT\n+\nIIII\n", "in.fasta:1: not FASTA"),
        (b"; comment\n>a\nMK\n", "in.fasta:1: not FASTA"),
        (b"\x7fELF\x02\x01\x00\x00\x00", "in.fasta: is a binary file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "in.fasta: is a binary file"),
        (">a\nMK\n".encode("utf-16"), "in.fasta: is a binary file"),
        (b">a\x00\x01\x02\nMK\n", "in.fasta:1: the id 'a\\x00\\x01\\x02' holds unprintable characters"),
        (b">a\nMK\n\x00\x01\n", "in.fasta:3: '\\x00' in the sequence of 'a' is no residue"),
        (b">a\nMK\n>b\nAC\nD1\n", "in.fasta:5: '1' in the sequence of 'b' is no residue"),
        (b">a\nMK>b\nAC\n", "in.fasta:2: '>' in the sequence of 'a' is no residue"),
        (">a\nMK\nA\u00c5C\n".encode(), "in.fasta:3: '\u00c5' in the sequence of 'a' is no residue"),
        (b">a\nMK\nA\xc5C\n", "in.fasta:3: '\ufffd' in the sequence of 'a' is no residue"),
        (b">a\nMK\n>\nAC\n", "in.fasta:3: the header has no id"),
        (b">a\nMK\n> b\nAC\n", "in.fasta:3: the header has no id"),
        (b">a\nMK\n>prot\xe9ine\nAC\n", "in.fasta:3: the id b'prot\\xe9ine' is not UTF-8"),
        (
            gzip.compress(b">a\nMK\n" * 1000, mtime=0)[:-20],
            "in.fasta: the gzip data ends early (truncated file)",
        ),
        (gzip.compress(b">a\nMK\n", mtime=0)[:-1], "in.fasta: the gzip data ends early (truncated file)"),
        (gzip.compress(b"", mtime=0), "in.fasta: no sequences in the file"),
        (b"\x1f\x8b" + b"no gzip at all", "in.fasta: damaged gzip data"),
        (b"BZh91AY&SY", "in.fasta: is bzip2-compressed; decompress it first"),
        (zstd.compress(b">a\nMK\n" * 1000)[:-4], "in.fasta: the zstd data ends early (truncated file)"),
        (b"\x28\xb5\x2f\xfd" + b"no zstd at all", "in.fasta: damaged zstd data"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    assert message(tmp_path, content).startswith(expected)


def test_damaged_gzip_checksum(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b">a\nMK\n", mtime=0))
    packed[-8] ^= 1
    assert message(tmp_path, bytes(packed)).startswith("in.fasta: damaged gzip data")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such FASTA file"):
        FastaReader(tmp_path / "absent.fasta")
    with pytest.raises(UserError, match="is a directory"):
        FastaReader(tmp_path)


ID = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8)
RESIDUES = st.text("ACDEFGHIKLMNPQRSTVWYXacdj*-.", min_size=1, max_size=90)
LINES = st.sampled_from(
    [
        b">",
        b"> ",
        b">a",
        b">a b>c",
        b">\xce\xb1",
        b">\xe9",
        b"MK",
        b"M K\t",
        b"",
        b" ",
        b"m*-.",
        b"M1",
        b"\xc3\x85",
        b"\0",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(ID, RESIDUES), min_size=1, max_size=8),
    width=st.integers(1, 60),
    newline=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(1, 40),
)
def test_any_records_survive_writing_and_reading(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[tuple[str, str]],
    width: int,
    newline: str,
    block_bytes: int,
) -> None:
    lines = []
    for name, residues in records:
        lines += [f">{name} description"]
        lines += [residues[i : i + width] for i in range(0, len(residues), width)]
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    found = read(tmp_path, newline.join(lines).encode())
    assert [(record.id, record.residues.decode()) for record in found] == records
    assert [record.line for record in found] == [i for i, line in enumerate(lines, 1) if line.startswith(">")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, max_size=9),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    final_newline=st.booleans(),
    block_bytes=st.integers(1, 12),
)
def test_any_lines_are_records_or_one_error_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[bytes],
    newline: bytes,
    final_newline: bool,
    block_bytes: int,
) -> None:
    content = newline.join(lines) + newline * final_newline
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    try:
        found = read(tmp_path, content)
    except UserError as error:
        assert str(error).startswith(f"{tmp_path}/in.fasta") and "\n" not in str(error)
        # The rules in the simplest words, as a second opinion on what has to be refused.
        bodies = content.replace(b"\r", b"").lstrip(b"\n ").split(b"\n>")
        heads = [body.partition(b"\n")[0].removeprefix(b">") for body in bodies]
        rest = [b"".join(body.partition(b"\n")[2].split()) for body in bodies]
        assert (
            not bodies[0].startswith(b">")
            or any(head[:1] in (b"", b" ") or b"\xe9" in head for head in heads)
            or any(not body or set(body) - set(b"MKm*-.") for body in rest)
        )
        return
    # dnaio wants no blank lines, no blanks within lines, nothing in front of the first record, and ASCII.
    plain = b"\n".join(b"".join(line.split()) if line[:1] != b">" else line for line in lines if line.strip())
    (tmp_path / "plain.fasta").write_bytes(plain.replace(b"\xce\xb1", b"alpha"))
    with dnaio.open(tmp_path / "plain.fasta") as reference:
        expected = [(record.id.replace("alpha", "\u03b1"), record.sequence) for record in reference]
    assert [(record.id, record.residues.decode()) for record in found] == expected
    assert [lines[record.line - 1][:1] for record in found] == [b">"] * len(found)


def test_a_line_of_ten_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 20)
    long = b"MKTLAGVSER" * 1_000_000
    assert read(tmp_path, b">a\n" + long + b"\n>b\nAC") == [Record("a", long, 1), Record("b", b"AC", 3)]
    assert message(tmp_path, b">a\n" + long + b"1\n").startswith("in.fasta:2: '1' in the sequence of 'a'")


def test_real_file_reads_as_with_dnaio(real_fasta: Path) -> None:
    with dnaio.open(real_fasta) as reference:
        expected = [(record.id, record.sequence) for record in reference]
    reader = FastaReader(real_fasta)
    assert [(record.id, record.residues.decode()) for record in reader] == expected
    assert reader.num_records == 8000
