"""Pages in a browser: readable at both widths and in both colour schemes, and alone in the world."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from tests.pages.browser import VIEWS, find_chromium, look_at, open_page
from tests.pages.demo import write_demo_map, write_demo_page, write_demo_report

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("write", [write_demo_page, write_demo_report, write_demo_map])
def test_pages_can_be_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    if (chromium := find_chromium()) is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    page = write(tmp_path)
    for view in VIEWS:
        assert look_at(page, view, chromium) == [], view.name


# In a block, since the page's own script declares names as well.
SEARCH = """{
const box = document.getElementById("search"), found = parent.document.createElement("p");
box.value = " TEIN_17"; box.dispatchEvent(new Event("input"));
const lines = [...document.querySelectorAll("#hits li")].map((line) => line.textContent);
found.textContent = "found " + JSON.stringify([lines, document.querySelectorAll(".hit").length]) + " end";
parent.document.body.append(found);
}"""


def test_a_map_is_searched_under_its_own_policy(tmp_path: Path) -> None:
    if (chromium := find_chromium()) is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    text = write_demo_map(tmp_path).read_text()
    digest = base64.b64encode(hashlib.sha256(SEARCH.encode()).digest()).decode()
    opened = text.replace("script-src '", f"script-src 'sha256-{digest}' '")
    opened = opened.replace("</body>", f"<script>{SEARCH}</script></body>")
    dumped = open_page(chromium, VIEWS[0], 900, opened, "--dump-dom")
    found = re.search(r"<p>found (.*) end</p>", dumped)
    assert found is not None, "the script of the page or of this test did not run"
    lines, hits = json.loads(unescape(found[1]))
    names = [f"protein_{number}" for number in (17, *range(170, 180))]
    assert sorted(line.partition(":")[0] for line in lines) == names and hits == 2 * len(names)


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
