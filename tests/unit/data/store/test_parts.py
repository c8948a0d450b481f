"""Parallel preparing: the same bytes for any number of processes, and nothing done twice after a kill."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest

from esm2mega.data.readers import text
from esm2mega.data.store.prepare import PrepareOptions, PrepareReport, prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from tests.unit.data.damage import flip

BLOCK_BYTES = 20_000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """600 proteins in some ten blocks, with lower-case and unknown residues."""
    path = tmp_path / "in.fasta"
    residues = "MKTLAGVSERTIDPKQNFYMHWCJxLAGVser" * 20
    path.write_text("".join(f">p{i}\n{residues[i % 50 : i % 50 + 50 + i % 571]}\n" for i in range(600)))
    return path


def prepare(inputs: list[Path], out: Path, workers: int = 1) -> PrepareReport:
    return prepare_fasta(inputs, out, 30, 20, options=PrepareOptions(workers=workers))


def tree(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_the_output_depends_neither_on_processes_nor_on_blocks(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "more.fa.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes(), mtime=0))
    reports = [prepare([fasta, packed], tmp_path / f"w{workers}", workers) for workers in (1, 2, 3)]
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 24)
    reports.append(prepare([fasta, packed], tmp_path / "one block"))
    expected = tree(tmp_path / "w1")
    assert len(expected) == 3 * 5
    for name in ("w2", "w3", "one block"):
        assert tree(tmp_path / name) == expected
    assert all(report.counts == reports[0].counts for report in reports)
    assert {name: count.sequences for name, count in reports[0].counts.items()} == {
        "train": 1150,
        "valid": 30,
        "test": 20,
    }
    for name, count in reports[0].counts.items():
        store = TokenStore(tmp_path / "w2" / name)
        store.verify()
        assert count.residues == len(store.tokens) and count.sequences == len(store)
        assert count.token_counts == [int((store.tokens == token).sum()) for token in range(33)]
    written = fasta.read_bytes() * 2
    headers = b"".join(line for line in written.splitlines() if line.startswith(b">"))
    lower = sum(map(written.count, map(bytes, zip(range(97, 123), strict=True))))
    counted = sum(count.lower_case_residues for count in reports[0].counts.values())
    assert counted == lower - headers.count(b"p")


WITH_SMALL_BLOCKS = f"""
import signal
import sys
from esm2mega.data.readers import text
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
text.BLOCK_BYTES = {3 * BLOCK_BYTES}
# A job in the background is started with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    prepare_fasta([sys.argv[1]], sys.argv[2], 30, 20, options=PrepareOptions(workers=2))
"""


def test_kill_minus_nine_and_start_again(
    real_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 3 * BLOCK_BYTES)
    out = tmp_path / "out"
    parts = tmp_path / ".out.prepare.partial" / "parts"
    process = subprocess.Popen([sys.executable, "-c", WITH_SMALL_BLOCKS, str(real_fasta), str(out)])
    while len(list(parts.glob("[0-9]*"))) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    # Workers do not outlive the process that feeds them; a dead one may still wait to be collected.
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    assert not out.exists()
    for manifest in parts.rglob("manifest.json"):
        with pytest.raises(UserError, match="interrupted"):
            TokenStore(manifest.parent)

    report = prepare([real_fasta], out, workers=2)
    (note,) = report.notes
    finished = int(note.removeprefix(f"{out}: ").split()[0])
    assert finished >= 9 and "parts were finished by an earlier attempt" in note
    prepare([real_fasta], tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fresh", "out"]


@pytest.fixture
def interrupted(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output directory whose `prepare` was interrupted when all parts were finished."""
    out = tmp_path / "out"
    rename = os.rename

    def interrupt(source: Path, target: Path) -> None:
        if target == out:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([fasta], out)
    return out


def resumed(report: PrepareReport) -> list[str]:
    return [note.partition(": ")[2].split(" parts")[0] for note in report.notes]


def test_finished_parts_serve_another_split(interrupted: Path, fasta: Path, tmp_path: Path) -> None:
    report = prepare_fasta([fasta], interrupted, 5, seed=3)
    (note,) = resumed(report)
    first, _, last = note.partition(" of ")
    assert first == last
    prepare_fasta([fasta], tmp_path / "fresh", 5, seed=3)
    assert tree(interrupted) == tree(tmp_path / "fresh")


def test_parts_of_other_text_are_done_again(interrupted: Path, fasta: Path, tmp_path: Path) -> None:
    content = bytearray(fasta.read_bytes())
    position = content.index(b"MKTL", len(content) // 2)
    content[position] = ord("W")  # one residue in the middle: one part
    fasta.write_bytes(content)
    report = prepare([fasta], interrupted)
    (note,) = resumed(report)
    first, _, last = note.partition(" of ")
    assert int(first) == int(last) - 1
    prepare([fasta], tmp_path / "fresh")
    assert tree(interrupted) == tree(tmp_path / "fresh")


def test_damaged_parts_are_done_again(interrupted: Path, fasta: Path, tmp_path: Path) -> None:
    parts = sorted((tmp_path / ".out.prepare.partial" / "parts").glob("[0-9]*[0-9]"))
    (parts[0] / "tokens.bin").write_bytes(b"")
    (parts[1] / "manifest.json").unlink()
    (parts[2].parent / f".{parts[2].name}.1-abc.partial").mkdir()  # what a killed worker leaves
    report = prepare([fasta], interrupted)
    assert resumed(report) == [f"{len(parts) - 2} of {len(parts)}"]
    prepare([fasta], tmp_path / "fresh")
    assert tree(interrupted) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    "name", ["tokens.bin", "tokens.idx", "ids.bin", "ids.offsets.npy", "manifest.json", "lower_case.npy"]
)
def test_a_part_with_a_flipped_bit_is_done_again(
    interrupted: Path, fasta: Path, tmp_path: Path, name: str
) -> None:
    parts = sorted((tmp_path / ".out.prepare.partial" / "parts").glob("[0-9]*[0-9]"))
    part = next(part for part in parts if part.with_suffix(".lower_case.npy").exists())
    file = part.with_suffix(".lower_case.npy") if name == "lower_case.npy" else part / name
    flip(file, 8 * file.stat().st_size - 8)
    assert resumed(prepare([fasta], interrupted)) == [f"{len(parts) - 1} of {len(parts)}"]
    prepare([fasta], tmp_path / "fresh")
    assert tree(interrupted) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_the_input_is_reported(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(text, "_BUFFER_BYTES", 4096)  # else the end is met before anything is handed out
    content = fasta.read_bytes()
    middle = content.index(b"\n>p300\n") + 1
    bad = tmp_path / "bad.fa.gz"
    bad.write_bytes(gzip.compress(content[:middle] + b">bad\nM1\n" + content[middle:], mtime=0)[:-9])
    line = content[:middle].count(b"\n") + 2
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"bad\.fa\.gz:{line}: '1' in the sequence of 'bad' is no residue"):
        prepare([bad], tmp_path / "out", workers)
    assert sorted(tmp_path.iterdir()) == before


KILLS_A_WORKER = """
import os, signal, sys, threading, time
import psutil
from esm2mega.data.readers import text
from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
from esm2mega.errors import MachineError
text.BLOCK_BYTES = 20_000

def kill_one():
    while True:
        for child in psutil.Process().children():
            if child.cmdline()[-1:] == ["--multiprocessing-fork"]:
                os.kill(child.pid, signal.SIGKILL)
                return
        time.sleep(0.01)

threading.Thread(target=kill_one, daemon=True).start()
try:
    prepare_fasta([sys.argv[1]], sys.argv[2], options=PrepareOptions(workers=2))
except MachineError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


def test_a_killed_worker_ends_the_command_with_a_cure(fasta: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS_A_WORKER, str(fasta), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    # A worker that is ended while it starts may print something before.
    last = done.stderr.splitlines()[-1]
    assert last.startswith("1 a worker process was killed") and "fewer --workers" in last
    assert not (tmp_path / "out").exists()
    prepare([fasta], tmp_path / "out")


def test_two_at_once_do_not_mix(fasta: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".out.prepare.partial"
    staging.mkdir()
    refused = pytest.raises(UserError, match="out: another `prepare` is writing it")
    with filelock.FileLock(staging / "lock"), refused:
        prepare([fasta], tmp_path / "out")
    prepare([fasta], tmp_path / "out")
    assert not staging.exists()


def test_ctrl_c_ends_all_processes_quietly(real_fasta: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_SMALL_BLOCKS, str(real_fasta), str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    parts = tmp_path / ".out.prepare.partial" / "parts"
    while len(list(parts.glob("[0-9]*"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    assert len(list(parts.glob("[0-9]*"))) >= 3
