"""Holds the style of `results.html`: light and dark, and readable on a telephone."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff;
  --model: #0072b2; --baseline: #7a7f85; --published: #b35400; --shade: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117;
    --model: #58a6ff; --baseline: #9198a1; --published: #e3a04f; --shade: #58a6ff; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: normal; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
tr:first-child > * { color: var(--soft); }
th[scope=row] { font-weight: 600; min-width: 7rem; }
tr.apart td, tr.apart th { color: var(--soft); font-style: italic; }
small, footer, .notes { color: var(--soft); font-size: 13px; }
.value { display: inline-block; min-width: 3.2rem; }
.bar { width: 120px; height: 14px; vertical-align: -2px; margin-right: .4rem; }
.model { fill: var(--model); } .baseline { fill: var(--baseline); } .published { fill: var(--published); }
.interval { stroke: var(--text); stroke-width: 1.2; fill: none; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: 0; width: 100%; max-width: 500px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
.chart { width: 100%; height: auto; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--line); fill: none; }
.dots { fill: var(--model); fill-opacity: .45; }
polygon { fill: var(--model); fill-opacity: .15; }
polyline { stroke: var(--model); stroke-width: 2; fill: none; }
.series1 polygon { fill: var(--published); } .series1 polyline { stroke: var(--published); }
.series2 polygon { fill: var(--baseline); } .series2 polyline { stroke: var(--baseline); }
.confusion td, .confusion th { text-align: center; padding: .3rem .6rem; min-width: 3rem; }
.confusion td[style] { background: color-mix(in srgb, var(--shade) calc(var(--share) * .35), transparent); }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
pre { overflow-x: auto; font-size: 13px; border: 1px solid var(--line); padding: .5rem; }
a { color: inherit; }
footer { margin: 3rem 0 1rem; }
"""
