"""The short cut: a sequence file where a store belongs is prepared once, by one process, and said so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.config.load import load_run
from esm2mega.config.schema import DataConfig
from esm2mega.data.store.cache import is_sequence_file, open_store
from esm2mega.errors import MachineError, UserError
from esm2mega.files import user_cache


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "my.proteins.fasta"
    path.write_text("".join(f">p{i}\n{'MKTLAGVSER'[i:]}\n" for i in range(10)))
    return path


def sections_in(tmp_path: Path, *overrides: str) -> tuple[DataConfig, str]:
    run = load_run("pretrain_esm2_tiny", [f"run_dir={tmp_path}/runs/one", *overrides])
    return run.data, run.run_dir


def test_prepared_once_in_the_cache_of_the_user(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    store = open_store(str(fasta), *sections_in(tmp_path), "data.train")
    assert [store.id(i) for i in range(len(store))] == [f"p{i}" for i in range(10)]
    assert store.path.parent.parent == tmp_path / "caches" / "esm2mega" / "prepared"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"data.train: {fasta} is prepared, once, into {store.path.parent}"
    assert "10 sequences, 55 residues" in said[1] and len(said) == 2
    made = store.path.stat().st_mtime_ns

    again = open_store(str(fasta), *sections_in(tmp_path), "data.train")
    assert again.path == store.path and again.path.stat().st_mtime_ns == made
    expected = f"data.train: {fasta} was prepared before, into {store.path.parent}\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "runs").exists()


def test_the_cache_without_its_variable(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is no value of it; a home that cannot be written to has a cure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache() == tmp_path / "home" / ".cache" / "esm2mega"
    (tmp_path / "home").write_text("a file")
    with pytest.raises(MachineError, match="cannot be written: .*; name a place .* data.cache_dir=DIR"):
        open_store(str(fasta), load_run("pretrain_esm2_tiny").data, None, "--data")


def test_what_earlier_versions_prepared_beside_the_run_is_used(fasta: Path, tmp_path: Path) -> None:
    """By a training; not by another command, which has no run directory."""
    old = open_store(str(fasta), *sections_in(tmp_path, f"data.cache_dir={tmp_path}/runs/prepared"), "k")
    data, run_dir = sections_in(tmp_path)
    assert open_store(str(fasta), data, run_dir, "data.train").path == old.path
    assert open_store(str(fasta), data, None, "--data").path != old.path


def test_a_store_is_opened_as_it_is(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = open_store(str(fasta), *sections_in(tmp_path), "data.train")
    capsys.readouterr()
    assert open_store(str(store.path), *sections_in(tmp_path), "data.train").path == store.path
    assert capsys.readouterr().err == ""


def test_content_and_reading_decide_not_the_name(fasta: Path, tmp_path: Path) -> None:
    first = open_store(str(fasta), *sections_in(tmp_path), "k").path
    same = tmp_path / "elsewhere" / fasta.name
    same.parent.mkdir()
    same.write_bytes(fasta.read_bytes())
    assert open_store(str(same), *sections_in(tmp_path), "k").path == first
    fasta.write_text(fasta.read_text().replace("MKTL", "MKTA", 1))
    assert open_store(str(fasta), *sections_in(tmp_path), "k").path != first

    table = tmp_path / "t.csv"
    table.write_text("id,name,sequence,mature\n1,a,MKT,KT\n2,b,MAC,AC\n")
    found = []
    for overrides in ([], ["data.sequence_column=mature"], ["data.id_column=name"]):
        store = open_store(str(table), *sections_in(tmp_path, *overrides), "k")
        found.append((store.path, store.id(0), int(store.lengths[0])))
    assert len({path for path, _, _ in found}) == 3
    assert [rest for _, *rest in found] == [["1", 3], ["1", 2], ["a", 3]]


def test_the_cache_can_be_elsewhere(fasta: Path, tmp_path: Path) -> None:
    store = open_store(str(fasta), *sections_in(tmp_path, f"data.cache_dir={tmp_path}/cache"), "data.train")
    assert store.path.parent.parent == tmp_path / "cache"
    assert not (tmp_path / "runs").exists()


def test_a_bad_file_leaves_no_store(tmp_path: Path) -> None:
    bad = tmp_path / "bad.fasta"
    bad.write_text(">a\nMK\n>b\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"bad\.fasta:3: no sequence under the header of 'b'"):
            open_store(str(bad), *sections_in(tmp_path, f"data.cache_dir={tmp_path}/cache"), "data.train")
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []


def test_what_counts_as_a_sequence_file(fasta: Path, tmp_path: Path) -> None:
    assert is_sequence_file(str(fasta))
    assert not is_sequence_file(str(tmp_path)) and not is_sequence_file(str(tmp_path / "absent"))
    (tmp_path / "data.mdb").touch()
    assert is_sequence_file(str(tmp_path))


OPENS = """
import sys
from esm2mega.config.load import load_run
from esm2mega.data.store.cache import open_store
if __name__ == "__main__":
    run = load_run("pretrain_esm2_tiny", [f"run_dir={sys.argv[2]}"])
    print(open_store(sys.argv[1], run.data, run.run_dir, "data.train").fingerprint)
"""


def test_of_several_processes_one_prepares(fasta: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS, str(fasta), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    errors = "".join(error for _, error in results)
    assert errors.count("is prepared, once,") == 1
