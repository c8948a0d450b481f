"""Files that are whole or absent after any failure, against plain reads of what lies there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import esm2mega
from esm2mega import files
from esm2mega.cli.app import main
from esm2mega.errors import MachineError, UserError
from esm2mega.files import parse_json, read_json, real_path


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.txt"
    for text in ("first", "second"):
        with files.replacing(path, durable=text == "second") as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first", "nobody sees half a file"
        assert path.read_text() == text
    assert os.listdir(path.parent) == [path.name]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_text("new")
        raise KeyError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.txt", "old")]


def test_a_result_that_fails_to_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(MachineError, match="result.json: cannot be written: No space left on device; use x"):
        files.write_json(tmp_path / "result.json", {"loss": 1.0}, "use x")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_is_not_one_of_writing(tmp_path: Path) -> None:
    """What is wrong with a file that the block reads is said of that file."""
    path, other = tmp_path / "result.txt", tmp_path / "absent.txt"
    with pytest.raises(FileNotFoundError) as caught, files.replacing(path) as partial:
        partial.write_text(other.read_text())
    assert caught.value.filename == str(other)
    with pytest.raises(MachineError, match=r"txt: cannot be written: No such"), files.replacing(path) as new:
        new.open("r+")
    full = OSError(28, "No space left on device")  # as a write to an open file raises it
    with (
        pytest.raises(MachineError, match=r"result\.txt: cannot be written: No space"),
        files.replacing(path),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_directory_or_file_appears_whole(tmp_path: Path, is_directory: bool) -> None:
    target = tmp_path / "new" / "target"
    for error in (KeyError, None):
        with suppress(KeyError), files.appearing(target, is_directory) as path:
            (path / "part" if is_directory else path).write_text("first")
            if not is_directory:
                path.with_name("beside").write_text("second")
            assert not target.exists()
            if error is not None:
                raise error
        assert target.exists() == (error is None)
    assert (target / "part" if is_directory else target).read_text() == "first"
    beside = [] if is_directory else ["beside"]
    assert sorted(path.name for path in target.parent.iterdir()) == [*beside, "target"]
    with pytest.raises(UserError, match="target: exists"), files.appearing(target):
        pass


def test_a_file_does_not_appear_over_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "beside").write_text("old")
    with pytest.raises(UserError, match="beside: exists"):  # noqa: SIM117
        with files.appearing(tmp_path / "target", is_directory=False) as path:
            path.write_text("new")
            path.with_name("beside").write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("beside", "old")]


def test_json_is_what_was_given(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"loss": 0.1, "names": ["a"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 0.1, "names": ["a"]}


def test_a_directory_is_never_replaced(tmp_path: Path) -> None:
    for write in (files.check_writable, lambda path: files.write_json(path, {})):
        with pytest.raises(MachineError, match="cannot be written: Is a directory"):
            write(tmp_path)


def test_trying_to_write_makes_no_file(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "out.csv")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written: .*; choose another --out"):
        files.check_writable(tmp_path / "file" / "out.csv")


@pytest.mark.parametrize("name", ["out.csv.gz", "OUT.JSON.GZ", "out.fasta.zst", "x.bz2"])
def test_what_is_plain_has_no_name_of_a_compressed_file(name: str, tmp_path: Path) -> None:
    for check in (files.check_out, files.check_writable):
        with pytest.raises(
            UserError, match="is written without compression; name it .*, and compress it aft"
        ):
            check(tmp_path / name)


def test_a_checksum_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_HASHED_AT_ONCE", 3)
    (tmp_path / "a").write_bytes(b"MKTAYIAKQR")
    assert files.file_sha256(tmp_path / "a") == hashlib.sha256(b"MKTAYIAKQR").hexdigest()
    with pytest.raises(UserError, match=r"absent: cannot be read \(No such file"):
        files.file_sha256(tmp_path / "absent")


def test_names_for_a_message() -> None:
    assert files.first_of([]) == "none"
    assert files.first_of(["a", "b"], 2) == "a, b"
    assert files.first_of([" ", "B"]) == "' ', B", "a class of DSSP"
    assert files.first_of(["a", "b", "c", "d"], 2) == "a, b, … 2 more"


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 5_000 + "]" * 5_000, b'"\xff"', "{", "9" * 5000])
def test_json_that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", None])
def test_what_an_earlier_start_wrote_is_read_or_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.json: .*; begin again$"):
        read_json(path, "begin again")
    path.write_text('{"a": 1}')
    assert read_json(path, "begin again") == {"a": 1}


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    """By the next process that writes the same file; what others are writing at the time stays."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    machine = os.uname().nodename
    left, *others = (
        tmp_path / name
        for name in (
            f".a.json.{machine}.{ended.pid}.partial",
            f".a.json.{machine}.{os.getppid()}.partial",
            f".a.json.another-machine.{ended.pid}.partial",
            f".b.a.json.{machine}.{ended.pid}.partial",
            f".a.json.{machine}.mine.partial",
        )
    )
    for path in (left, *others):
        path.touch()
    files.write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(path.name for path in others)}


def test_links_in_a_loop_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`Path.resolve` raises RuntimeError for them before Python 3.13, so nothing here calls it."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop) == real_path(tmp_path) / "loop"
    assert main(["prepare", "fasta", str(loop), "--out", str(tmp_path / "store")]) == 2
    assert capsys.readouterr().err == f"esm2mega: error: {loop}: no such FASTA file\n"
    package = Path(esm2mega.__file__).parent
    assert [path for path in package.rglob("*.py") if ".resolve()" in path.read_text()] == []
