"""`python -m tests.pages --out DIR [PAGE …]` renders pages in Chromium, and leaves their pictures in DIR.

Without PAGE these are pages of made-up results, which it writes to DIR first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.pages.browser import VIEWS, find_chromium, look_at
from tests.pages.demo import write_demo_map, write_demo_page, write_demo_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.pages", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one to be made")
    parser.add_argument("pages", nargs="*", type=Path, help="pages that `plot` or `map` wrote")
    options = parser.parse_args()
    out = options.out
    if (chromium := find_chromium()) is None:
        print("there is no Chromium: apt-get install chromium")
        return 2
    failed = 0
    out.mkdir(parents=True, exist_ok=True)
    made = (write_demo_page, write_demo_report, write_demo_map)
    pages = options.pages or [write(out / write.__name__) for write in made]
    for number, page in enumerate(pages, 1):
        for view in VIEWS:
            faults = look_at(page, view, chromium, out / f"{number}-{page.stem}-{view.name}.png")
            print(f"{page.name}, {view.name}: {'; '.join(faults) or 'nothing to find fault with'}")
            failed += bool(faults)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
