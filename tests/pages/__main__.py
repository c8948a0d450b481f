"""`python -m tests.pages --out DIR` renders the pages in Chromium, and leaves pages and pictures in DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.pages.browser import VIEWS, find_chromium, look_at
from tests.pages.demo import write_demo_map, write_demo_page, write_demo_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.pages", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one to be made")
    out = parser.parse_args().out
    if (chromium := find_chromium()) is None:
        print("there is no Chromium: apt-get install chromium")
        return 2
    failed = 0
    for write in (write_demo_page, write_demo_report, write_demo_map):
        page = write(out / write.__name__)
        for view in VIEWS:
            faults = look_at(page, view, chromium, out / f"{page.stem}-{view.name}.png")
            print(f"{page.name}, {view.name}: {'; '.join(faults) or 'nothing to find fault with'}")
            failed += bool(faults)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
