"""Changes files as a seed says: bits, blocks, numbers, text, structure, archives and folders."""

from __future__ import annotations

import fnmatch
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz import structure

_MAGIC = [
    *(value.to_bytes(size, order, signed=value < 0) for order in ("little", "big") for size, value in (
        (4, -1), (4, 2**31 - 1), (4, -(2**31)), (8, -1), (8, 2**31), (8, 2**62), (8, 2**40), (8, 0), (2, -1),
    )),
    b"\x00\x00\xc0\x7f",  # NaN, infinity and the largest fp32
    b"\x00\x00\x80\x7f",
    b"\xff\xff\x7f\x7f",
    b"\x00\x00\x00\x00\x00\x00\xf8\x7f",
]  # fmt: skip
_TEXTS = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n\n\n",
    b'"',
    b"'",
    b",,,,",
    b"\t",
    b">",
    b">\n",
    b"\xe2\x80\xae",
    b"\xc3",
    b"NaN",
    b"-inf",
    b"1e999",
    b"9" * 400,
    b"[" * 20_000,
    b"{" * 20_000,
    b"A" * 300_000,
    b"../../../etc/passwd",
    b"${oc.env:HOME}",
    b"!!python/object/apply:os.getpid []",
]

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip one bit; an empty file gets a byte."""
    if not data:
        return b"\x01"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _flips(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(2, 16)):
        data = flip(rng, data)
    return data


def _place(rng: random.Random, data: bytes) -> int:
    """Draw a place, half of the time near the beginning, where headers are."""
    return rng.randrange(min(len(data), 512) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)


def _block(rng: random.Random, data: bytes) -> tuple[int, int]:
    first = _place(rng, data)
    return first, min(len(data), first + rng.choice([1, 4, 16, 64, 512, 4096]))


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _removed(rng: random.Random, data: bytes) -> bytes:
    first, stop = _block(rng, data)
    return data[:first] + data[stop:]


def _duplicated(rng: random.Random, data: bytes) -> bytes:
    first, stop = _block(rng, data)
    return data[:stop] + data[first:stop] * rng.choice([1, 1, 20]) + data[stop:]


def _swapped(rng: random.Random, data: bytes) -> bytes:
    first, stop = _block(rng, data)
    other = _place(rng, data)
    block = bytearray(data)
    size = min(stop - first, len(data) - other)
    block[first : first + size], block[other : other + size] = (
        data[other : other + size],
        data[first : first + size],
    )
    return bytes(block)


def _magic(rng: random.Random, data: bytes) -> bytes:
    value, place = rng.choice(_MAGIC), _place(rng, data)
    if rng.random() < 0.7:
        place -= place % 4
    return data[:place] + value + data[place + len(value) :]


def _text(rng: random.Random, data: bytes) -> bytes:
    place = _place(rng, data)
    return data[:place] + rng.choice(_TEXTS) + data[place:]


def _noise(rng: random.Random, data: bytes) -> bytes:
    first, stop = _block(rng, data)
    filler = bytes(stop - first) if rng.random() < 0.5 else rng.randbytes(stop - first)
    return data[:first] + filler + data[stop:]


def _appended(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([rng.randbytes(64), bytes(4096), data])


def _encoded(rng: random.Random, data: bytes) -> bytes:
    """Write text in another encoding, or with other ends of lines."""
    text = data.decode("utf-8", "replace")
    encoding = rng.choice(["utf-16", "utf-32", "latin-1", "cp037", "crlf", "cr"])
    if encoding in ("crlf", "cr"):
        return text.replace("\n", "\r\n" if encoding == "crlf" else "\r").encode()
    return text.encode(encoding, "replace")


def _emptied(rng: random.Random, data: bytes) -> bytes:
    return b""


BYTES: Sequence[Mutation] = (
    *(flip, flip, flip, _flips, _truncated, _truncated, _removed, _duplicated, _swapped, _magic, _magic),
    *(_text, _text, _noise, _appended, _encoded, _emptied),
)


def files_of(it: Path, patterns: Sequence[str] = ("*",)) -> list[Path]:
    """Return the files that may be changed: one file, or those of a folder that fit the patterns."""
    if not it.is_dir():
        return [it]
    files = sorted(path for path in it.rglob("*") if path.is_file())
    return [p for p in files if any(fnmatch.fnmatch(p.relative_to(it).as_posix(), x) for x in patterns)]


def choose(rng: random.Random, files: Sequence[Path]) -> Path:
    """Draw a file: every other time by size, or else each is as likely as the others."""
    sizes = [path.stat().st_size + 1 for path in files]
    return rng.choices(files, sizes)[0] if rng.random() < 0.5 else rng.choice(list(files))


def rot(rng: random.Random, it: Path, patterns: Sequence[str]) -> tuple[Path, str]:
    """Flip one bit of one file; return the file, and what was done."""
    path = choose(rng, files_of(it, patterns))
    path.write_bytes(flip(rng, path.read_bytes()))
    return path, "flip"


def mutate(rng: random.Random, it: Path, patterns: Sequence[str]) -> tuple[Path, str]:
    """Change one file, or what a folder holds; return the file, and what was done.

    What is called ``structure…`` is another sound file in its format, as far as a CRC can tell.
    """
    path = choose(rng, files_of(it, patterns))
    draw = rng.random()
    if draw < 0.08 and it.is_dir():
        return path, _folder(rng, it, path)
    if draw < 0.45:
        how = structure.change(rng, path, BYTES)
        if how is not None:
            return path, f"structure: {how}"
    mutation = rng.choice(BYTES)
    path.write_bytes(mutation(rng, path.read_bytes()))
    return path, mutation.__name__.strip("_")


def _folder(rng: random.Random, it: Path, path: Path) -> str:
    """Remove, rename, replace or link a file."""
    how = rng.choice(["removed", "renamed", "folder", "loop", "dangling", "other", "more"])
    others = [other for other in files_of(it) if other != path]
    if how == "other" and others:
        shutil.copyfile(rng.choice(others), path)
    elif how in ("other", "more"):
        (path.parent / f"more{path.suffix}").write_bytes(path.read_bytes())
    elif how == "renamed":
        path.rename(path.with_name(f"{path.stem}_{path.suffix}"))
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how != "removed":
            path.symlink_to(path.name if how == "loop" else "nowhere")
    return f"file {how}"
