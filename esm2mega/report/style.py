"""Holds the style of the pages: light and dark, and readable on a telephone."""

from __future__ import annotations

import base64
import hashlib

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff;
  --model: #0072b2; --baseline: #7a7f85; --published: #b35400; --low: #9cc9e8; --high: #00395c;
  --c0: #0072b2; --c1: #b35400; --c2: #00795a; --c3: #a0468c; --c4: #7a6a00; --c5: #4b4fc4; --c6: #7a7f85; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117;
    --model: #58a6ff; --baseline: #9198a1; --published: #e3a04f; --low: #2b5d8a; --high: #cfe6ff;
    --c0: #58a6ff; --c1: #e3a04f; --c2: #3fbf95; --c3: #e58fd0; --c4: #c9c04a; --c5: #a5a8ff; --c6: #9198a1; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .75rem; }
p { margin: 0 0 .25rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: .75rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: normal; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { min-width: 4rem; }
th[scope=col] { color: var(--soft); vertical-align: bottom; }
th[scope=row] { font-weight: 600; overflow-wrap: break-word; min-width: 6rem; }
th[scope=colgroup] { color: var(--soft); padding-top: .9rem; }
th small { font-weight: normal; }
.rows th[scope=row] { width: 45%; }
.overview td { min-width: 8.5rem; } .overview .bar { display: block; }
.overview th[scope=row] { min-width: 9rem; }
.apart td, .apart th { color: var(--soft); font-style: italic; }
small, footer, .notes, figure p { color: var(--soft); font-size: 13px; }
.value { display: inline-block; min-width: 3.2rem; }
.bar { width: 120px; max-width: 100%; height: 14px; vertical-align: -2px; margin-right: .4rem; }
.model { fill: var(--model); } .baseline { fill: var(--baseline); } .published { fill: var(--published); }
.interval { stroke: var(--text); stroke-width: 1.2; fill: none; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; align-items: flex-start; margin: 0 0 1rem; }
figure { margin: 0; width: 100%; max-width: 515px; min-width: 0; }
figure.wide { max-width: none; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--line); stroke-width: .6; fill: none; }
.dots { stroke: var(--color); stroke-linecap: round; stroke-opacity: .55; fill: none; }
.band { fill: var(--color); fill-opacity: .15; }
.line, .dashed { stroke: var(--color); stroke-width: 1.8; fill: none; } .dashed { stroke-dasharray: 5 4; }
.faint { stroke-width: .8; stroke-opacity: .4; }
.value-at { fill: transparent; } .value-at:hover { fill: var(--color); }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); }
.c3 { --color: var(--c3); } .c4 { --color: var(--c4); }
.c5 { --color: var(--c5); } .c6 { --color: var(--c6); }
.s0 { --color: var(--low); } .s1 { --color: color-mix(in srgb, var(--low) 75%, var(--high)); }
.s2 { --color: color-mix(in srgb, var(--low), var(--high)); }
.s3 { --color: color-mix(in srgb, var(--low) 25%, var(--high)); } .s4 { --color: var(--high); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .25rem 0 0; padding: 0;
  font-size: 13px; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; background: var(--color); }
.confusion td, .confusion th { text-align: center; padding: .3rem .5rem; min-width: 3rem; }
.confusion th[scope=row], .confusion th:first-child { text-align: left; }
.confusion small { color: var(--text); }
.confusion td { background: color-mix(in srgb, var(--model) calc(var(--share) * .35), transparent); }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
pre { overflow-x: auto; font-size: 13px; border: 1px solid var(--line); padding: .5rem; }
a { color: inherit; }
:focus-visible { outline: 2px solid var(--model); outline-offset: 2px; }
footer { margin: 3rem 0 1rem; }
"""

_HEAD = """<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:{script}">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
"""Opens the head of a page; the policy keeps a browser from loading anything, and from running any script but
that of the page, by its hash.
"""


def page_of(title: str, body: str, footer: str, style: str = "", script: str = "") -> str:
    """Return a whole page.

    Args:
        title: Its title, as HTML.
        body: What stands above the footer, as HTML.
        footer: The footer, as HTML.
        style: Rules for this page besides those of all pages.
        script: The script of the page; empty for none.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = _HEAD.format(script=f"; script-src 'sha256-{digest}'" if script else "")
    end = f"<script>{script}</script>\n" if script else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}<title>{title} - esm2mega</title>\n'
        f"<style>\n{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n<footer>{footer}</footer>\n"
        f"{end}</body>\n</html>\n"
    )
