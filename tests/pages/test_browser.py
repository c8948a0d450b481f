"""Pages in a browser: readable at both widths and in both colour schemes, and alone in the world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages.browser import VIEWS, find_chromium, look_at
from tests.pages.demo import write_demo_page, write_demo_report

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("write", [write_demo_page, write_demo_report])
def test_pages_can_be_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    if (chromium := find_chromium()) is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    page = write(tmp_path)
    for view in VIEWS:
        assert look_at(page, view, chromium) == [], view.name


def test_what_cannot_be_read_is_found(tmp_path: Path) -> None:
    """The measurements see a page that is too wide, too pale, cut off, and loads a file."""
    if (chromium := find_chromium()) is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta http-equiv="Content-Security-Policy" content="">'
        '<p style="width: 3000px">wide</p><p style="color: #bbb; background: #fff">pale</p>'
        '<p style="width: 2em; overflow: hidden; white-space: nowrap">cut off here</p>'
        '<img src="x.png"></body>'
    )
    faults = " ".join(look_at(page, VIEWS[0], chromium))
    for word in ("scrolls sideways", 'of "pale"', "clipped", "loads <img"):
        assert word in faults
