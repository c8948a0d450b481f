"""`make fuzz OUT=DIR` and `make rot OUT=DIR` read changed files with every command, see docs/debugging.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests import warm
from tests.fuzz.harness import IMPORTED, Harness


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=sys.modules[__name__].__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, new or of an earlier start")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs in the journal at the end")
    parser.add_argument(
        "--rot", action="store_true", help="flip one bit of each input, and compare the numbers"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--subjects", default="", help="names with commas between them; all by default")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warm.prepare(IMPORTED)
    began = time.monotonic()
    harness = Harness(options.out, options.seed, lambda line: print(line, flush=True))
    before = len(harness.entries)
    try:
        names = [name for name in options.subjects.split(",") if name]
        if not before:
            harness.sound()
        harness.run(options.inputs, options.rot, names)
    finally:
        print("\n".join(harness.table()))
        count, minutes = len(harness.entries) - before, (time.monotonic() - began) / 60
        print(f"{count} inputs in {minutes:.1f} minutes; journal: {options.out / 'journal.jsonl'}")
    return int(bool(harness.faults))


# The guard matters: processes that are spawned import this module again.
if __name__ == "__main__":
    sys.exit(main())
