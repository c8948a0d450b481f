"""Writes the page of a map: proteins as points, coloured by a label, and found by their ids.

The one script of the page is its own; the page loads nothing and works without the script but for the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from esm2mega.files import OTHER_OUT, replacing
from esm2mega.report.results.charts import Plot, axis_of
from esm2mega.report.results.groups import groups_of
from esm2mega.report.results.predictions import Array
from esm2mega.report.style import page_of

METHODS = {"pca": "Principal components", "umap": "UMAP"}
"""Maps the names of methods to their titles."""

_MOST_FOUND = 30

_STYLE = """
.map figure { max-width: none; } .map .chart { max-height: 85vh; }
@media (min-width: 700px) { .map .chart text { font-size: 6px; } }
.point { fill: var(--color); fill-opacity: .7; }
.found .point { fill-opacity: .12; } .found .hit { fill-opacity: 1; stroke: var(--text); }
.search { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--soft);
  padding: .3rem .5rem; width: 100%; max-width: 22rem; }
#hits { list-style: none; margin: .5rem 0; padding: 0; min-height: 1.5rem; font-size: 13px; }
"""

_SCRIPT = """
const box = document.getElementById("search"), list = document.getElementById("hits");
const points = [...document.querySelectorAll(".point")];
box.addEventListener("input", () => {
  const text = box.value.trim().toLowerCase(), seen = new Set();
  list.replaceChildren();
  document.body.classList.toggle("found", text !== "");
  for (const point of points) {
    const words = point.firstChild.textContent;
    const hit = text !== "" && words.split("\\n")[0].toLowerCase().includes(text);
    point.classList.toggle("hit", hit);
    point.setAttribute("r", hit ? 3.5 : point.dataset.r);
    if (hit) { point.parentNode.append(point); seen.add(words); }
  }
  for (const words of [...seen].slice(0, MOST)) {
    const item = document.createElement("li");
    item.textContent = words.replace("\\n", ": ");
    list.append(item);
  }
  const more = seen.size - list.children.length;
  if (more > 0 || (text !== "" && seen.size === 0)) {
    const item = document.createElement("li");
    item.textContent = more > 0 ? `and ${more} more` : "no protein has this in its id";
    list.append(item);
  }
});
""".replace("MOST", str(_MOST_FOUND))


def write_map_page(
    out: Path,
    planes: Mapping[str, Array],
    ids: Sequence[str],
    labels: Sequence[str] | None,
    title: str,
    notes: Sequence[str],
) -> None:
    """Write the page, a file that needs no other.

    Args:
        out: The file.
        planes: Places of the points ``[n, 2]`` by the name of the method.
        ids: Id of each of the n proteins.
        labels: What each is coloured by; None for one colour.
        title: What is shown, as text.
        notes: What the reader has to know, as text.
    """
    figures = "".join(_figure(METHODS[name], plane, ids, labels) for name, plane in planes.items())
    body = (
        f"<h1>{escape(title)}</h1>\n{''.join(f'<p>{escape(note)}</p>' for note in notes)}"
        '<p><label>Find an id <input id="search" class="search" type="search" autocomplete="off"></label></p>'
        f'<ul id="hits" aria-live="polite"></ul><div class="map">{figures}</div>'
    )
    with replacing(out, OTHER_OUT) as partial:
        text = page_of(escape(title), body, "Written by <code>esm2mega map</code>.", _STYLE, _SCRIPT)
        partial.write_text(text, encoding="utf-8")


def _figure(method: str, plane: Array, ids: Sequence[str], labels: Sequence[str] | None) -> str:
    x, y = (axis_of(name, plane[:, n].tolist()) for n, name in enumerate(("first", "second")))
    plot = Plot(x, y)
    groups = [("c0", "", np.arange(len(ids)))] if labels is None else groups_of(labels)
    for color, name, rows in groups:
        words = [ids[row] if labels is None else f"{ids[row]}\n{labels[row]}" for row in rows.tolist()]
        plot.points(plane[rows, 0].tolist(), plane[rows, 1].tolist(), color, words)
        if labels is not None:
            plot.label(color, f"{name} ({len(rows):,})")
    return plot.figure(method, f"{len(ids):,} proteins")
