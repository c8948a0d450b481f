"""Text sources: compression by content, nothing cut short, blocks that follow from the text alone."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.data.readers import text
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FASTA = b">a x\r\nMK\nTL\n\n>b\nACDEFG\n>c\nW"


def compressed(name: str, content: bytes) -> bytes:
    if name == "gzip":
        return gzip.compress(content[:9], mtime=0) + gzip.compress(
            content[9:], mtime=0
        )  # as `cat a.gz b.gz` makes it
    if name == "zstd":
        return zstd.compress(content[:9]) + zstd.compress(content[9:])
    return content


@pytest.mark.parametrize("name", ["plain", "gzip", "zstd"])
def test_content_and_blocks_do_not_depend_on_the_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 8)
    path = tmp_path / "misnamed.txt"
    path.write_bytes(compressed(name, b"\xef\xbb\xbf" + FASTA))
    reader = FastaReader(path)
    blocks = list(reader.blocks())
    assert b"".join(block.text for block in blocks) == FASTA
    assert [(block.line, block.text[:2]) for block in blocks] == [(1, b">a"), (5, b">b")]
    assert reader.checksums == {"misnamed.txt": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_key_follows_the_text_its_line_and_how_it_is_read(tmp_path: Path) -> None:
    keys = set()
    for number, content in enumerate([FASTA, FASTA.replace(b"W", b"Y"), b"\n" + FASTA]):
        path = tmp_path / str(number)
        path.write_bytes(content)
        reader = FastaReader(path)
        (block,) = reader.blocks()
        keys.add(reader.key(block))
    assert len(keys) == 3
    (tmp_path / "0.gz").write_bytes(gzip.compress(FASTA, mtime=0))
    reader = FastaReader(tmp_path / "0.gz")
    (block,) = reader.blocks()
    assert reader.key(block) in keys


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    # Beyond the 128 MiB that decoders accept unasked; the frame says so, whatever it holds.
    packed = io.BytesIO()
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.content_size_flag: 0}
    with zstd.ZstdFile(packed, "w", options=options) as stream:
        stream.write(b">a\nMK\n")
    (tmp_path / "long.zst").write_bytes(packed.getvalue())
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(packed.getvalue())
    assert [record.id for record in FastaReader(tmp_path / "long.zst")] == ["a"]


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_what_is_cut_short_is_never_taken(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(FASTA * 50, mtime=0) if name == "gzip" else zstd.compress(FASTA * 50)
    path = tmp_path / "short"
    for length in range(6, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"short: the {name} data ends early"):
            list(FastaReader(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a stream, and this input is read more than once"):
        FastaReader(tmp_path / "pipe")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """40 MB against 4 MB of text, in blocks of 1 MiB, as peak memory of whole processes."""
    code = (
        "import sys; from esm2mega.data.readers import text; "
        "from esm2mega.data.readers.fasta import FastaReader; "
        "text.BLOCK_BYTES = 1 << 20; assert sum(1 for _ in FastaReader(sys.argv[1])) == int(sys.argv[2]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / "many.fasta"
        path.write_bytes((b">p\n" + b"MKTLAGVSER" * 20 + b"\n") * count)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(count)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 10  # MiB
