"""Time, memory and temporary disk of `prepare uniref` against the number of UniRef90 members.

    python benchmarks/data.py uniref --members 100000 1000000 10000000 --json result.json

Files of random proteins are generated, prepared and removed, one size after the other. The UniRef90 file is
in another order than the mapping, three members make a cluster, and one cluster in a hundred is held out.
Each size is prepared in a process of its own. Memory is looked at twenty times a second:

    anonymous    what the process needs: this must not grow with the number of members
    mapped       pages of the memory-mapped index in memory, which the kernel drops when it needs room
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from esm2mega.data.uniref.build import UniRefInputs, bytes_to_read, prepare_uniref
from esm2mega.data.uniref.leakage import SplitSizes

CLUSTER_SIZE = 3
STEP = 7919
"""Shares no factor with the sizes, so that 0, STEP, 2 STEP, … modulo their number are all members."""


@dataclass
class Result:
    """One size; memory in MiB, sizes in bytes."""

    members: int
    input_bytes: int
    seconds: float
    cpu_seconds: float
    anonymous: float
    mapped: float
    temporary_bytes: int
    store_bytes: int


def generate(folder: Path, members: int, length: int) -> UniRefInputs:
    """Write the three files; every sequence is a piece of one long random sequence."""
    rng = np.random.default_rng(1)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    text = rng.choice(letters, size=1 << 20).tobytes()
    lengths = rng.integers(length // 2, 3 * length // 2, size=1 << 16).tolist()

    def record(name: str, number: int) -> bytes:
        start = number * 31 % (len(text) - 2 * length)
        return b">%s\n%s\n" % (name.encode(), text[start : start + lengths[number % len(lengths)]])

    inputs = UniRefInputs(folder / "uf50.fasta", folder / "uf90.fasta", folder / "mapping.tsv")
    with open(inputs.uf90, "wb") as file:
        for i in range(members):
            number = i * STEP % members
            file.write(record(f"UniRef90_A0A{number:09d}", number))
    with open(inputs.uf50, "wb") as file, open(inputs.mapping, "w") as mapping:
        mapping.write("uniref50\tuniref90\n")
        for first in range(0, members, CLUSTER_SIZE):
            names = (f"UniRef90_A0A{i:09d}" for i in range(first, min(first + CLUSTER_SIZE, members)))
            mapping.write(f"UniRef50_A0A{first:09d}\t{','.join(names)}\n")
            file.write(record(f"UniRef50_A0A{first:09d}", first))
    return inputs


class Watch(threading.Thread):
    """Remember the largest memory of this process and the largest temporary files of the preparation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.ended = threading.Event()
        self.anonymous = self.mapped = 0.0
        self.temporary = 0

    def run(self) -> None:
        while not self.ended.wait(0.05):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(status["RssAnon"].split()[0]) / 1024)
            self.mapped = max(self.mapped, int(status["RssFile"].split()[0]) / 1024)
            self.temporary = max(self.temporary, _bytes_below(self.folder.glob(".*.partial/index")))


def _bytes_below(folders: object) -> int:
    total = 0
    for folder in folders:  # type: ignore[attr-defined]
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(parent, name)).st_size
                except FileNotFoundError:  # removed since it was listed
                    continue
    return total


def measure(inputs: UniRefInputs, members: int, results: multiprocessing.SimpleQueue[Result]) -> None:
    """Prepare the files and report."""
    out = Path(inputs.uf90).parent / "out"
    sizes = SplitSizes(members // CLUSTER_SIZE // 100)
    watch = Watch(out.parent)
    watch.start()
    started, cpu_started = time.perf_counter(), time.process_time()
    report = prepare_uniref(inputs, out, sizes)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    watch.ended.set()
    watch.join()
    assert (
        report.stores.counts["train"].sequences + report.stores.counts["train"].dropped_sequences == members
    )
    store = sum(file.stat().st_size for file in out.glob("*/*"))
    results.put(
        Result(
            members,
            bytes_to_read(inputs, sizes),
            seconds,
            cpu_seconds,
            watch.anonymous,
            watch.mapped,
            watch.temporary,
            store,
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="data.py uniref", description="Time, memory and disk of `prepare uniref`."
    )
    parser.add_argument("--members", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--length", type=int, default=60, help="mean residues; UniRef90 has about 330")
    parser.add_argument("--folder", type=Path, help="where the files are generated [default: temporary]")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if any(members % STEP == 0 for members in options.members):
        parser.error(f"--members must not be a multiple of {STEP}")

    spawn = multiprocessing.get_context("spawn")
    results = []
    titles = "members,input MB,seconds,CPU s,members/CPU s,anonymous MiB,mapped MiB,disk B/member"
    print(" ".join(f"{title:>13}" for title in titles.split(",")), flush=True)
    for members in options.members:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            inputs = generate(folder, members, options.length)
            queue = spawn.SimpleQueue()
            process = spawn.Process(target=measure, args=(inputs, members, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"preparing {members} members failed")
            result = queue.get()
        finally:
            shutil.rmtree(folder)
        results.append(result)
        cells = (
            f"{members:,}",
            f"{result.input_bytes / 1e6:,.0f}",
            f"{result.seconds:.1f}",
            f"{result.cpu_seconds:.1f}",
            f"{members / result.cpu_seconds:,.0f}",
            f"{result.anonymous:.0f}",
            f"{result.mapped:.0f}",
            f"{result.temporary_bytes / members:.1f}",
        )
        print(" ".join(f"{cell:>13}" for cell in cells), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
