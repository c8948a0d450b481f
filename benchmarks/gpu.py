"""Parity, host synchronisations, training, embedding and a peer on one GPU, in ten minutes.

    python benchmarks/gpu.py --out h100.jsonl
    python benchmarks/gpu.py --out h100.jsonl --lines parity,train-8M

Every line is a measurement in a process of its own, with a time limit of its own: what fails or hangs costs
nothing else. Lines, their sizes and limits are in `gpu_lines.py`; `--lines` takes names or their beginnings.
The file named by `--out` gets each line when it is finished, and the same command goes on behind the finished
ones after a kill, or when the minutes were over. Beside it lies a folder, `h100.work` for `h100.jsonl`, with
what the processes printed, and what is compared. At the end all tables are printed, as Markdown;
the exit code is 1 if a line is missing. Lines in FP8 are left out where the card has none, or Transformer
Engine is not installed.

    peaks     bf16 products of matrices and a copy: what the device reaches with nothing around it
    parity    the same three steps on CPU and GPU, in fp32 and bf16, with each kernel, and once more
    twice     the same steps twice under deterministic algorithms; other bits are a failure
    syncs     where the host waits for the device in a step
    train     whole optimizer steps, from 8M to 3B; `of peak` is their share of the fastest product above
    profile   the kernels of a step, by time
    hf        the same proteins with Hugging Face's `EsmForMaskedLM`, as it is and compiled
    embed     proteins to vectors, beside Hugging Face's `EsmModel`

Residues are random, lengths are drawn like those of UniRef90 or are 1,024 tokens each. `--reduced` runs the
same lines in tiny shapes on the CPU, which shows that they run and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_lines import Line, choose_lines

HERE = Path(__file__).parent
CONDITIONS = "conditions"
STARTUP_SECONDS = 90

Entry = dict[str, Any]
"""What the journal holds of a line: its name, and rows and seconds, or why there are none."""


class Journal:
    """The file of finished lines, one JSON object each; what a kill left incomplete at its end is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.entries: dict[str, Entry] = {}
        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["line"]] = entry

    def add(self, entry: Entry) -> None:
        """Append an entry; it replaces an earlier one of the same line."""
        self.entries[entry["line"]] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def finished(self, name: str) -> bool:
        return "rows" in self.entries.get(name, ())

    def check_conditions(self, here: Mapping[str, Any]) -> None:
        """Note the conditions of this machine, or compare them with those that the file was begun under.

        Raises:
            SystemExit: They differ.
        """
        if not self.finished(CONDITIONS):
            self.add({"line": CONDITIONS, "rows": [here]})
        there = self.entries[CONDITIONS]["rows"][0]
        for name in here:
            if here[name] != there.get(name):
                raise SystemExit(
                    f"{self.path} was measured with {name} {there.get(name)}, here it is {here[name]}: "
                    "name another file with --out"
                )


def measured(name: str, limit: float, folder: Path, reduced: bool, on_cpu: bool) -> Entry:
    """Measure a line in a process of its own, which ends after `limit` seconds with all that it started."""
    command = [sys.executable, str(HERE / "gpu_measure.py"), name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *_python_path()])}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    answer, log = folder / f"{name}.json", folder / f"{name}.log"
    answer.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--reduced"] if reduced else [])],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"line": name, "failed": f"not finished after {limit:.0f} s"}
        finally:
            _end(process)
    if process.returncode or not answer.exists():
        last = log.read_text().strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return {"line": name, "failed": f"{last[0]} ({log})"}
    return {
        "line": name,
        "seconds": round(time.monotonic() - started, 1),
        "rows": json.loads(answer.read_text()),
    }


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group of a process; it has a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure_lines(lines: Sequence[Line], journal: Journal, folder: Path, reduced: bool, end: float) -> None:
    """Measure what is not in the journal yet, until `end` (of the monotonic clock), and say how far it is."""
    for number, line in enumerate(lines, 1):
        if journal.finished(line.name):
            continue
        room = end - time.monotonic()
        if room <= 0:
            print(f"the time is over before {line.name}; the same command goes on from there", flush=True)
            return
        entry = measured(line.name, min(line.limit, room), folder, reduced, line.on_cpu)
        if "failed" in entry and room < line.limit:
            # Not the line's own fault, perhaps: the next call gives it its whole time.
            print(f"the time was over during {line.name}; the same command begins it again", flush=True)
            return
        journal.add(entry)
        outcome = f"{entry['seconds']} s" if "rows" in entry else f"FAILED: {entry['failed']}"
        print(f"{number:2} of {len(lines)} {line.name:24} {outcome}", flush=True)


def tables(journal: Journal, lines: Sequence[Line]) -> Iterator[str]:
    """Yield a table in Markdown for the conditions and for each kind of measurement, then what failed."""
    yield table(journal.entries[CONDITIONS]["rows"])
    kinds = {line.measurement: [x for x in lines if x.measurement == line.measurement] for line in lines}
    for kind, members in kinds.items():
        rows = [
            {"line": member.name, **row, **_share_of_peak(row, kind, journal)}
            for member in members
            if journal.finished(member.name)
            for row in journal.entries[member.name]["rows"]
        ]
        if rows:
            yield table(rows)
    for line in lines:
        if not journal.finished(line.name):
            entry = journal.entries.get(line.name, {"failed": "not measured yet"})
            yield f"{line.name}: {entry['failed']}"


def _share_of_peak(row: Mapping[str, Any], kind: str, journal: Journal) -> Entry:
    if kind not in ("train", "hugging_face", "embed", "embed_hugging_face") or not journal.finished("peaks"):
        return {}
    precision = row.get("precision", "bf16")
    products = [one for one in journal.entries["peaks"]["rows"] if one["what"].startswith(precision)]
    return {"of peak": f"{row['TFLOP/s'] / max(one['TFLOP/s'] for one in products):.0%}"}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows under all headings that one of them has, as Markdown."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    lines = [headings, ["---"] * len(headings), *([_cell(row.get(h)) for h in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen lines and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", default="", help="names or their beginnings, with commas [all]")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file of the figures [gpu.jsonl]")
    parser.add_argument("--minutes", type=float, default=10, help="after which no line goes on [10]")
    parser.add_argument("--reduced", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    try:
        lines = choose_lines([name for name in options.lines.split(",") if name], options.reduced)
    except ValueError as error:
        parser.error(str(error))
    folder = options.out.with_suffix(".work")
    folder.mkdir(parents=True, exist_ok=True)
    entry = measured(CONDITIONS, STARTUP_SECONDS, folder, options.reduced, options.reduced)
    if "failed" in entry:
        raise SystemExit(f"PyTorch does not start: {entry['failed']}")
    (here,) = entry["rows"]
    if here["device"] == "none" and not options.reduced:
        raise SystemExit("no CUDA device: run this where there is one, or --reduced to see that it runs")
    if not here.get("fp8"):
        for line in (line for line in lines if line.fp8):
            print(f"left out: {line.name}, which needs Transformer Engine and compute capability 8.9")
        lines = [line for line in lines if not line.fp8]
    journal = Journal(options.out)
    journal.check_conditions({**here, "reduced": options.reduced})
    measure_lines(lines, journal, folder, options.reduced, end)
    print("\n" + "\n".join(tables(journal, lines)))
    if not all(journal.finished(line.name) for line in lines):
        raise SystemExit(1)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    # A process that is measured has a session of its own: it would go on alone.
    signal.signal(signal.SIGTERM, _stop)
    main()
