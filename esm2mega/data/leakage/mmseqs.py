"""Searches the proteins of one split in another one by MMseqs2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm2mega.errors import MachineError
from esm2mega.processes import end_with_parent

_SENSITIVITY = "5.7"
_MOST_ALIGNED = "300"
_SMALL = 1 << 22
"""Below so many residues words of five are indexed: a table of six takes seconds and a gigabyte by itself."""

_LARGEST_E_VALUE = "0.001"
_MEMORY = "4G"
"""Limits the index of the proteins that are searched; a larger set is searched in parts."""

_NO_WORDS = "No k-mer could be extracted"
"""MMseqs2 ends so where all proteins are too short or repeats, which beside others it just does not find."""

_CLEAN = {ord(c): "X" for c in "*-.BJOUZ"}


def find_mmseqs() -> str | None:
    """Return the path of the program; None where it is not installed."""
    return shutil.which("mmseqs")


def mmseqs_hits(
    program: str,
    first: Sequence[str],
    second: Sequence[str],
    threshold: float,
    coverage: float,
    most: int,
    threads: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], bool]:
    """Return the related pairs.

    Args:
        program: Path of MMseqs2.
        first: Sequences that are searched, in upper case.
        second: Sequences that are looked for.
        threshold: Least identity, of the columns of an alignment.
        coverage: Least share of both proteins in the alignment.
        most: Most relatives of each protein of `second`.
        threads: Number of threads.

    Returns:
        Rows of `first` and `second`, ``[h, 2]``; identities, ``[h]``; and whether a protein of `second` may
        have more relatives, as it has `most`.

    Raises:
        MachineError: MMseqs2 failed.
    """
    if not first or not second:
        return np.zeros((0, 2), dtype=np.int64), np.zeros(0), False
    with tempfile.TemporaryDirectory(prefix="esm2mega-mmseqs-") as folder:
        paths = [Path(folder, name) for name in ("second.fasta", "first.fasta")]
        for path, sequences in zip(paths, (second, first), strict=True):
            with path.open("w") as file:
                file.writelines(f">{n}\n{s.translate(_CLEAN)}\n" for n, s in enumerate(sequences))
        found = Path(folder, "found.tsv")
        command = [program, "easy-search", *map(str, paths), str(found), str(Path(folder, "work"))]
        command += ["-s", _SENSITIVITY, "-e", _LARGEST_E_VALUE, "--min-seq-id", str(threshold)]
        command += ["-c", str(coverage), "--cov-mode", "0", "--alignment-mode", "3", "--seq-id-mode", "0"]
        command += ["--max-seqs", _MOST_ALIGNED, "--max-accept", str(most)]
        command += ["--threads", str(threads), "--split-memory-limit", _MEMORY]
        if sum(map(len, first)) < _SMALL:
            command += ["-k", "5"]
        command += ["--dbtype", "1", "--format-output", "target,query,fident", "-v", "1"]
        code, lines = _run(command)
        if code and any(_NO_WORDS in line for line in lines):
            return np.zeros((0, 2), dtype=np.int64), np.zeros(0), False
        if code:
            said = lines[-1] if lines else "no message"
            raise MachineError(
                f"{program} easy-search: exit code {code}: {said}; its files were in "
                f"{tempfile.gettempdir()}, which may be full: name another one in TMPDIR"
            )
        rows, identities = _parsed(found)
        return rows, identities, bool(np.bincount(rows[:, 1], minlength=1).max() >= most)


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a program and all that it starts, and return its exit code and the lines that it said."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        # The program is a script that starts others; none may go on without us.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, [line.strip() for line in said.splitlines() if line.strip()]


def _parsed(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    rows, identities = array("q"), array("d")
    with path.open() as file:
        for line in file:
            first, second, identity = line.split("\t")
            rows.append(int(first))
            rows.append(int(second))
            identities.append(float(identity))
    return np.array(rows, dtype=np.int64).reshape(-1, 2), np.array(identities)
