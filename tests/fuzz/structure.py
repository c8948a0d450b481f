"""Changes files in the terms of their formats, so that they remain sound: values, cells, members, streams."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Mutation = Callable[[random.Random, bytes], bytes]

_VALUES: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf")),
    *("", "0", "../../x", "/etc/passwd", "x" * 5000, "\x00", "é\u202e", "${oc.env:HOME}", "nan", "1e5", "[]"),
    *([], {}, [None], [[[]]], {"": None}, [0] * 1000, {"x": {"y": {}}}),
)  # fmt: skip
_NAMES = ("../x", "/x", "a/../../x", "", "x" * 300, "é", "data.pkl", "\\x", "./")


def change(rng: random.Random, path: Path, mutations: Sequence[Mutation]) -> str | None:
    """Change a file in a way that its format allows; return what was done, or None where it is not known how.

    Args:
        rng: Draws.
        path: The file.
        mutations: Changes of bytes, for what is inside of compressed files and archives.
    """
    data = path.read_bytes()
    for changed in (_archive, _compressed, _safetensors, _document, _table):
        found = changed(rng, path, data, mutations)
        if found is not None:
            path.write_bytes(found)
            return changed.__name__.strip("_")
    return None


def _archive(rng: random.Random, path: Path, data: bytes, mutations: Sequence[Mutation]) -> bytes | None:
    """Change a member of a zip or tar archive: its name or its bytes; or leave it out, or add it twice."""
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        members = _members(rng, members, mutations)
        with io.BytesIO() as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                for name, content in members:
                    archive.writestr(name or "x", content)
            return stream.getvalue()
    if not path.name.endswith(".nemo"):
        return None
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive if info.isfile()]  # type: ignore[union-attr]
    members = _members(rng, members, mutations)
    with io.BytesIO() as stream:
        with tarfile.open(fileobj=stream, mode="w:gz" if data[:2] == b"\x1f\x8b" else "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if rng.random() < 0.05:
                    info.type, info.linkname, info.size = (
                        rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                        "../x",
                        0,
                    )
                archive.addfile(info, io.BytesIO(content) if info.isfile() else None)
        return stream.getvalue()


def _members(
    rng: random.Random, members: list[tuple[str, bytes]], mutations: Sequence[Mutation]
) -> list[tuple[str, bytes]]:
    number = rng.randrange(len(members))
    name, content = members[number]
    how = rng.choice(["name", "bytes", "bytes", "bytes", "without", "twice", "pickle"])
    if how == "without":
        return members[:number] + members[number + 1 :]
    if how == "twice":
        return [*members, (name, rng.choice(members)[1])]
    if how == "name":
        start = name.rsplit("/", 1)[0]
        members[number] = (rng.choice([*_NAMES, f"{start}/{rng.choice(_NAMES)}"]), content)
    elif how == "pickle":
        members[number] = (name, b"cos\nsystem\n(S'touch canary'\ntR.")
    else:
        members[number] = (name, rng.choice(list(mutations))(rng, content))
    return members


def _compressed(rng: random.Random, path: Path, data: bytes, mutations: Sequence[Mutation]) -> bytes | None:
    """Change what is compressed; or compress very much of one letter."""
    module: Any = {".gz": gzip, ".zst": zstd}.get(path.suffix)
    if module is None:
        return None
    if rng.random() < 0.1:
        return bytes(module.compress(b">x\n" + b"A" * (48 << 20) + b"\n"))
    return bytes(module.compress(rng.choice(list(mutations))(rng, module.decompress(data))))


def _safetensors(rng: random.Random, path: Path, data: bytes, mutations: Sequence[Mutation]) -> bytes | None:
    """Change a value in the header."""
    if path.suffix != ".safetensors":
        return None
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(_other(rng, json.loads(data[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _document(rng: random.Random, path: Path, data: bytes, mutations: Sequence[Mutation]) -> bytes | None:
    """Change a value of a JSON or YAML document, or of a line of JSON."""
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(_other(rng, json.loads(lines[number])))
        return ("\n".join(lines) + "\n").encode()
    if path.suffix == ".json":
        return json.dumps(_other(rng, json.loads(data))).encode()
    if path.suffix == ".yaml":
        return yaml.safe_dump(_other(rng, yaml.safe_load(data))).encode()
    return None


def _other(rng: random.Random, document: Any) -> Any:
    """Replace, remove, rename or add one value somewhere in a document."""
    if not isinstance(document, dict | list) or not document:
        return rng.choice(_VALUES)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = rng.choice(keys)
    if isinstance(document[key], dict | list) and document[key] and rng.random() < 0.85:
        document[key] = _other(rng, document[key])
        return document
    how = rng.choice(["replace", "replace", "replace", "near", "remove", "rename", "add"])
    value = document[key]
    if how == "near" and isinstance(value, int | float):
        document[key] = value + rng.choice([-1, 1, 0.5])
    elif how == "remove":
        del document[key]
    elif how == "rename" and isinstance(document, dict):
        document[f"{key}_"] = document.pop(key)
    elif how == "add" and isinstance(document, dict):
        document[rng.choice(["x", "", "../x", f"{key} "])] = rng.choice(_VALUES)
    else:
        document[key] = rng.choice(_VALUES)
    return document


def _table(rng: random.Random, path: Path, data: bytes, mutations: Sequence[Mutation]) -> bytes | None:
    """Change a cell, or the columns of one row or of all."""
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    if separator is None:
        return None
    rows = list(csv.reader(io.StringIO(data.decode()), delimiter=separator))
    row = rng.choice([0, rng.randrange(len(rows))])
    column = rng.randrange(len(rows[row]))
    how = rng.choice(["cell", "cell", "cell", "short", "long", "without", "twice", "header"])
    if how == "cell":
        rows[row][column] = str(rng.choice(_VALUES))
    elif how == "short":
        del rows[row][column]
    elif how == "long":
        rows[row].insert(column, "x")
    elif how == "without":
        rows = [cells[:column] + cells[column + 1 :] for cells in rows]
    elif how == "twice":
        rows = [[*cells, cells[column]] if column < len(cells) else cells for cells in rows]
    else:
        rows = rows[:1] if rng.random() < 0.5 else rows[1:]
    with io.StringIO() as stream:
        csv.writer(stream, delimiter=separator, lineterminator="\n").writerows(rows)
        return stream.getvalue().encode("utf-8", "replace")
