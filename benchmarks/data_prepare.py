"""Rate and memory of `esm2mega prepare fasta`, beside a pipeline on the Hugging Face ESM tokenizer.

    python benchmarks/data.py prepare proteins.fasta --megabytes 100 1000 --json result.json

The proteins of the FASTA, drawn with replacement, are written to generated files of the given sizes, which
are removed afterwards, and prepared as whole commands: starting Python and its workers counts. `hf` reads the
proteins as given, tokenizes them in batches and writes the ids as bytes; its shares run in as many processes,
once each is ready. Both take turns, and the rounds are all shown. Residues per second are of the clock;
`per core` counts seconds of processor time instead, which other work on the machine hardly changes. Memory is
the largest resident set of any one process of the command, and of all of them together.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.store.token_store import TokenStore

DEFAULT_FASTA = Path(__file__).parents[2] / "shared/data/uniref_sample/uniref90_sample_8000.fasta"
LINE = 60
HF_BATCH = 1000
SEED = 1


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        what: the contender.
        input_mb: size of its input on disk.
        residues: that it went through.
        seconds: of the clock.
        cpu_seconds: of all its processes.
        peak_mib: the largest resident set of one process; 0 where it was not measured.
        peak_mib_total: of all processes together.
    """

    what: str
    input_mb: float
    residues: int
    seconds: float
    cpu_seconds: float
    peak_mib: float = 0.0
    peak_mib_total: float = 0.0

    def line(self) -> str:
        """For the table."""
        return (
            f"{self.what:<14} {self.input_mb:8.0f} {self.residues / 1e6:10.1f} {self.seconds:8.2f} "
            f"{self.residues / self.seconds / 1e6:9.2f} {self.residues / self.cpu_seconds / 1e6:9.2f} "
            f"{self.peak_mib:9.0f} {self.peak_mib_total:9.0f}"
        )


HEADER = (
    f"{'':<14} {'MB':>8} {'M residues':>10} {'seconds':>8} {'M res/s':>9} {'per core':>9} "
    f"{'peak MiB':>9} {'all MiB':>9}"
)


def generate(proteins: Sequence[bytes], path: Path, size: int, seed: int = SEED) -> None:
    """Writes a FASTA of at least `size` bytes, in lines of 60 residues."""
    wrapped = [b"\n".join(p[i : i + LINE] for i in range(0, len(p), LINE)) + b"\n" for p in proteins]
    rng = np.random.default_rng(seed)
    written = number = 0
    with open(path, "wb") as file:
        while written < size:
            for draw in rng.integers(len(wrapped), size=4096).tolist():
                written += file.write(b">GEN_%d\n" % number + wrapped[draw])
                number += 1
                if written >= size:
                    break


def measure_prepare(path: Path, out: Path, workers: int) -> Result:
    """Runs the command, watching the memory of its processes."""
    command = [sys.executable, "-m", "esm2mega", "prepare", "fasta", str(path), "--out", str(out)]
    before = os.times()
    started = time.perf_counter()
    command += ["--workers", str(workers)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    single = together = 0
    while process.poll() is None:
        sizes = []
        try:
            for member in [process, *process.children(recursive=True)]:
                sizes.append(member.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
        single, together = max(single, *sizes), max(together, sum(sizes))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    after = os.times()
    if process.returncode != 0:
        raise SystemExit(f"exit code {process.returncode} of {' '.join(command)}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    residues = len(TokenStore(out / "train").tokens)
    size = path.stat().st_size / 1e6
    name = f"esm2mega{path.suffix if path.suffix != '.fasta' else ''}"
    return Result(name, size, residues, seconds, cpu, single / 2**20, together / 2**20)


def measure_hf(fasta: Path, folder: Path, workers: int) -> Result:
    """Tokenizes the FASTA with `EsmTokenizer`, each process a share of its proteins."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(vocabulary.VOCAB))
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    shares = [(str(fasta), str(vocabulary), number, workers, str(folder), ready) for number in range(workers)]
    results = context.Queue()
    processes = [context.Process(target=_hf_share, args=(*share, results)) for share in shares]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    found = [results.get() for _ in processes]
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    size = fasta.stat().st_size / 1e6
    return Result("hf", size, sum(n for n, _ in found), seconds, sum(cpu for _, cpu in found))


def _hf_share(
    fasta: str, vocabulary: str, number: int, workers: int, folder: str, ready: object, results: object
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import EsmTokenizer

    hf = EsmTokenizer(vocabulary)
    ready.wait()
    began = time.process_time()
    sequences = [
        record.residues.decode() for i, record in enumerate(FastaReader(fasta)) if i % workers == number
    ]
    with open(Path(folder, f"{number}.ids"), "wb") as file:
        for first in range(0, len(sequences), HF_BATCH):
            for ids in hf(sequences[first : first + HF_BATCH])["input_ids"]:
                file.write(np.array(ids, dtype=np.uint8).tobytes())
    results.put((sum(map(len, sequences)), time.process_time() - began))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="data.py prepare", description="`prepare fasta` beside the Hugging Face ESM tokenizer."
    )
    parser.add_argument("fasta", nargs="?", type=Path, default=DEFAULT_FASTA, help="proteins to draw from")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100, 1000], help="generated files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for generated files [default: the system's]")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if not options.fasta.exists():
        parser.error(f"no FASTA file at {options.fasta}: name one")

    proteins = [record.residues for record in FastaReader(options.fasta)]
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        print(result.line(), flush=True)

    print(HEADER)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for number, megabytes in enumerate(options.megabytes):
            path = folder / f"{number}.fasta"
            generate(proteins, path, int(megabytes * 1e6))
            for turn in range(options.rounds if number == 0 else 1):
                add(measure_hf(options.fasta, folder, options.workers))
                add(measure_prepare(path, folder / f"{number}-{turn}", options.workers))
            if number == 0:
                packed = folder / f"{number}.gz"
                packed.write_bytes(gzip.compress(path.read_bytes(), 6))
                add(measure_prepare(packed, folder / "gz", options.workers))
                packed.unlink()
            path.unlink()
    fastest = {
        what: max(r.residues / r.seconds for r in results if r.what == what) for what in ("hf", "esm2mega")
    }
    print(f"esm2mega is {fastest['esm2mega'] / fastest['hf']:.0f} times as fast, best of both")
    if options.json is not None:
        setting = {"workers": options.workers, "fasta": options.fasta.name, "proteins": len(proteins)}
        text = json.dumps({**setting, "results": [asdict(result) for result in results]}, indent=1)
        options.json.write_text(text + "\n")
