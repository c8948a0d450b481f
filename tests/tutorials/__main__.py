"""`python -m tests.tutorials --out DIR` runs the tutorials as printed, and says how long each step takes."""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from tests.tutorials.steps import TUTORIALS, do, steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.tutorials", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder to be made; its files can be looked at"
    )
    parser.add_argument(
        "names", nargs="*", help=f"which of {', '.join(page.stem for page in TUTORIALS)} [all]"
    )
    options = parser.parse_args()
    for page in (page for page in TUTORIALS if not options.names or page.stem in options.names):
        folder = options.out / page.stem
        folder.mkdir(parents=True)
        begun = time.monotonic()
        for step in steps(page):
            first = step.text.strip().partition("\n")[0][:90]
            if do(step, folder):
                continue
            if step.is_elsewhere:
                print(f"{page.stem}: not run here: {first}", flush=True)
                continue
            started = time.monotonic()
            done = subprocess.run(step.words, cwd=folder, capture_output=True, text=True)
            print(f"{page.stem}: {time.monotonic() - started:6.1f} s  {first}", flush=True)
            if done.returncode or step.language == "python":
                print(done.stdout + done.stderr, flush=True)
            if done.returncode:
                return 1
        print(f"{page.stem}: {time.monotonic() - begun:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
