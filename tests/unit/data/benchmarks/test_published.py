"""``--download``: which addresses are asked for, what is there already, and archives that lead elsewhere."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.data.benchmarks import published
from esm2mega.errors import UserError
from tests.ranks import free_port
from tests.unit.data.benchmarks.test_deeploc2 import write as write_deeploc2
from tests.unit.data.benchmarks.test_tape import write as write_lmdb

Net = dict[str, bytes]


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """Contents by address, in place of the network."""
    contents: Net = {}

    def download(url: str, target: Path, limit: int, cure: str) -> str:
        if url not in contents:
            raise UserError(f"{url} was asked for")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(contents[url])
        return f"{target}: from {url}"

    monkeypatch.setattr(published, "download", download)
    return contents


def test_deeploc2(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """To the user's cache, where it is found the next time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["prepare", "deeploc2", "--out", str(tmp_path / "first")]
    assert main(command) == 2
    assert "give --source with the file as it is published, or --download" in capsys.readouterr().err
    assert published.DEEPLOC2.startswith("https://") and published.DEEPLOC2.endswith("_dataset.csv")
    net[published.DEEPLOC2] = write_deeploc2(tmp_path, 12).read_bytes()
    assert main([*command, "--download"]) == 0
    place = tmp_path / "cache/esm2mega/downloads/deeploc2/Swissprot_Train_Validation_dataset.csv"
    assert f"{place}: from {published.DEEPLOC2}\n" in capsys.readouterr().out
    net.clear()
    assert main([*command[:-1], str(tmp_path / "second"), "--download"]) == 0
    assert "is there already, and is not downloaded" in capsys.readouterr().out
    assert (tmp_path / "first/train.csv").read_bytes() == (tmp_path / "second/train.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "there"], "there: exists already"),
        (["--features", "out"], "--features out: is the directory of --out too; name another"),
        (["--features", "new", "--labels", "locations"], "Model Zoo's loader has one label"),
        (["--test-fraction", "2"], "--test-fraction 2.0 and --valid-fraction 0.0 must be at least 0"),
    ],
)
def test_nothing_is_fetched_for_options_that_are_refused(
    words: list[str], message: str, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    command = ["prepare", "deeploc2", "--download", "--source", "x.csv", "--out", "out"]
    assert main([*command, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "was asked for" not in error


def test_nothing_is_fetched_that_could_not_be_read(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="needs the lmdb package; install it with"):
        published.download_tape("stability", tmp_path)


def test_flip(net: Net, tmp_path: Path, capsys: Any) -> None:
    entries = "".join(
        f">Sequence{n} TARGET={n} SET={'test' if n > 3 else 'train'} VALIDATION={n == 3}\nMKTAYIAK\n"
        for n in range(6)
    )
    net[f"{published.FLIP}gb1/sampled.fasta"] = entries.encode()
    command = ["prepare", "flip", "gb1", "--source", str(tmp_path / "gb1"), "--out", str(tmp_path / "out")]
    assert main([*command, "--download", "--split", "smapled"]) == 2
    assert "--split smapled is none of gb1" in capsys.readouterr().err
    assert main([*command, "--download", "--split", "sampled", "--allow-other-sizes"]) == 0
    assert f"{tmp_path / 'gb1/sampled.fasta'}: from {published.FLIP}" in capsys.readouterr().out
    assert len((tmp_path / "out/train.csv").read_text().splitlines()) == 4
    # Labels, sequences and masks of a task of residues.
    folder, asked = tmp_path / "ss", f"{published.FLIP}secondary_structure/"
    for name in ("sampled", "sequences", "resolved"):
        with pytest.raises(UserError, match=f"{asked}{name}.fasta was asked for"):
            published.download_flip("secondary_structure", None, folder)
        net[f"{asked}{name}.fasta"] = b">x\n"
    assert len(published.download_flip("secondary_structure", None, folder)) == 3


def archive(members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            change(entry)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_tape(net: Net, tmp_path: Path, capsys: Any) -> None:
    """Only the task's own files are taken out of the archive, each to a name of ours."""
    row = {"primary": "MKTA", "stability_score": np.array([1.0], np.float32)}
    members = {"stability/README": b"text"}
    for split in ("train", "valid"):
        write_lmdb(tmp_path, f"stability_{split}", [row | {"id": split}, row])
        content = (tmp_path / f"stability_{split}.lmdb" / "data.mdb").read_bytes()
        members[f"./stability/stability_{split}.lmdb/data.mdb"] = content
        members[f"./stability/stability_{split}.lmdb/lock.mdb"] = b"lock"
    net[f"{published.TAPE}stability.tar.gz"] = archive(members)
    folder = tmp_path / "files"
    command = ["prepare", "tape", "stability", "--source", str(folder), "--out", str(tmp_path / "out")]
    assert main([*command, "--download"]) == 0
    assert f"{folder} (unpacked): from {published.TAPE}stability.tar.gz" in capsys.readouterr().out
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["stability_train.lmdb/data.mdb", "stability_valid.lmdb/data.mdb"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.csv")) == ["train.csv", "valid.csv"]
    net.clear()
    assert "is there already" in published.download_tape("stability", folder)[0]


def link(entry: tarfile.TarInfo) -> None:
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive({"../stability_train.lmdb": b"x"}), "points outside the archive"),
        (archive({"/stability/stability_train.lmdb": b"x"}), "points outside the archive"),
        (archive({"stability_train.lmdb": b""}, link), "is a link or a device"),
        (archive({"stability/stability_valid.lmdb/data.mdb": b"x"}), "holds no stability_train.lmdb"),
        (b"<html>", "not a readable tar archive"),
    ],
)
def test_archives_that_are_refused(content: bytes, message: str, net: Net, tmp_path: Path) -> None:
    net[f"{published.TAPE}stability.tar.gz"] = content
    with pytest.raises(UserError, match=message):
        published.download_tape("stability", tmp_path / "files")
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize("task", [["deeploc2"], ["flip", "gb1"], ["tape", "stability"]], ids=" ".join)
def test_without_a_network(
    task: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line with the address and what to do, and exit code 1."""
    for name in ("DEEPLOC2", "FLIP", "TAPE"):
        monkeypatch.setattr(published, name, f"https://127.0.0.1:{free_port()}/")
    source = ["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--download"]
    assert main(["prepare", *task, *source]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error.startswith("esm2mega: error: https://127.0.0.1:")
        and "is there a network? Without one," in error
    )
    assert "--source" in error and not (tmp_path / "out").exists()
