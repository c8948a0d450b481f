"""Opens a page in headless Chromium at a width and in a colour scheme, and measures it by a script.

The page stands in a frame. The script goes into a copy of it, without the policy against scripts.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

CHECKS = Path(__file__).with_name("checks.js")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy".*?>', re.DOTALL)
_FOUND = re.compile(r'<script id="found" type="application/json">(.*?)</script>', re.DOTALL)
_SECONDS = 60


@dataclass(frozen=True)
class View:
    """Describes a window."""

    width: int
    is_dark: bool

    @property
    def name(self) -> str:
        return f"{self.width}-{'dark' if self.is_dark else 'light'}"


VIEWS = tuple(View(width, is_dark) for width in (1200, 400) for is_dark in (False, True))


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look_at(page: Path, view: View, chromium: str, picture: Path | None = None) -> list[str]:
    """Return what is wrong with a page, and leave a picture of all of it."""
    text = page.read_text(encoding="utf-8")
    found = _measure(text, view, chromium)
    faults = [str(fault) for fault in found["faults"]]
    if found["width"] != view.width or found["dark"] != view.is_dark:
        faults.append(f"the browser has a window of {found['width']}, dark: {found['dark']}")
    if picture is not None:
        # Folded parts are open while the page is measured.
        shown = text.replace("<details>", "<details open>")
        open_page(
            chromium, view, min(int(found["height"]), 16_000), shown, f"--screenshot={picture.resolve()}"
        )
    return faults


def _measure(text: str, view: View, chromium: str) -> dict[str, Any]:
    """Return what the script measured."""
    opened, count = _POLICY.subn("", text)
    assert count == 1, "the page has a policy against scripts and files from elsewhere"
    script = f'<script id="checks">{CHECKS.read_text()}</script></body>'
    dumped = open_page(chromium, view, 900, opened.replace("</body>", script), "--dump-dom")
    found = _FOUND.search(dumped)
    assert found is not None, dumped[-2000:]
    return dict(json.loads(found[1]))


def open_page(chromium: str, view: View, height: int, text: str, what: str) -> str:
    """Open a page in a frame of the view's width, since a window of Chromium is 500 pixels wide at least."""
    size = f'width="{view.width}" height="{height}"'
    frame = (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<body style="margin: 0"><iframe {size} style="border: 0" srcdoc="{escape(text)}"></iframe></body>'
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.html"
        path.write_text(frame, encoding="utf-8")
        words = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--user-data-dir={folder}/profile",
            f"--window-size={max(view.width, 500)},{height}",
            # 0 is dark and 1 is light
            f"--blink-settings=preferredColorScheme={0 if view.is_dark else 1}",
            *("--virtual-time-budget=5000", what, path.as_uri()),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=True)
    return done.stdout
