"""`make kills OUT=DIR` kills commands at random moments, see docs/runs.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import filelock
import psutil

from tests import warm
from tests.kills.harness import Harness, adopting_orphans


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=sys.modules[__name__].__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, new or of an earlier start")
    parser.add_argument("--kills", type=int, default=1200, help="kills in the journal at the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default="", help="names with commas between them; all by default")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warm.prepare()
    began = time.monotonic()
    # Two of them would take away each other's results.
    with filelock.FileLock(options.out / "lock", timeout=0), adopting_orphans():
        harness = Harness(options.out, options.seed, lambda line: print(line, flush=True))
        before = len(harness.kills)
        try:
            harness.run(options.kills, [name for name in options.cases.split(",") if name])
        finally:
            print("\n".join(harness.table()))
            count, minutes = len(harness.kills) - before, (time.monotonic() - began) / 60
            # What was forked is a child of the process that forks, which is a child of this one.
            times = [child.cpu_times() for child in psutil.Process().children()]
            seconds = sum(t.user + t.system + t.children_user + t.children_system for t in times)
            each = seconds / max(1, count)
            print(f"{count} kills in {minutes:.1f} minutes, {each:.1f} s of processor time each")
            print(f"journal: {options.out / 'journal.jsonl'}")
    return int(any(kill["outcome"] != "equal" for kill in harness.kills))


# The guard matters: processes that are spawned import this module again.
if __name__ == "__main__":
    sys.exit(main())
