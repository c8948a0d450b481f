"""Draws small charts as inline SVG, whose colours follow the page, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from esm2mega.report.results.predictions import Classes, Numbers

Point = tuple[float, float]
CurvePoint = tuple[float, float, float, float]
"""Holds a step, and a value with the ends of its interval."""

_MOST_POINTS = 2000
_INTERVAL = '<path class="interval" d="M{0:.1f} 7H{1:.1f}M{0:.1f} 4V10M{1:.1f} 4V10"/>'
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _PAD = 340, 260, 46, 34, 10


def bar(value: float, low: float | None, high: float | None, limits: Point, kind: str) -> str:
    """Draw a value as a bar from 0, with its interval as a line; `kind` names its colour."""
    first, last = limits
    span = (last - first) or 1.0

    def x(number: float) -> float:
        return 2 + 116 * (number - first) / span

    left, right = sorted((x(0.0), x(value)))
    line = ""
    if low is not None and high is not None:
        line = _INTERVAL.format(x(low), x(high))
    return (
        f'<svg class="bar" viewBox="0 0 120 14" aria-hidden="true"><rect class="{kind}" x="{left:.1f}" y="2" '
        f'width="{max(right - left, 0.5):.1f}" height="10"/>{line}</svg>'
    )


def scatter(numbers: Numbers, title: str) -> str:
    """Draw predictions over labels, evenly chosen ones where there are very many."""
    step = max(1, -(-len(numbers.ids) // _MOST_POINTS))
    points = list(zip(numbers.labels[::step], numbers.values[::step], strict=True))
    x, y = _limits([point[0] for point in points]), _limits([point[1] for point in points])
    note = f", {len(points):,} of {len(numbers.ids):,} proteins" if step > 1 else ""
    dots = "".join(
        f'<circle cx="{_x(a, x):.1f}" cy="{_y(b, y):.1f}" r="{3 if len(points) < 300 else 1.6}"/>'
        for a, b in points
    )
    return _chart(f"{title}{note}", "measured", "predicted", x, y, f'<g class="dots">{dots}</g>')


def curves(series: Mapping[str, Sequence[CurvePoint]], title: str, y_name: str) -> str:
    """Draw values with their intervals over training steps.

    Args:
        series: Name of a curve -> step, value, low and high of each point.
        title: What is shown.
        y_name: The metric.
    """
    points = [point for each in series.values() for point in each]
    x = _limits([point[0] for point in points])
    y = _limits([number for point in points for number in point[1:]])
    drawn = []
    for number, each in enumerate(series.values()):
        ordered = sorted(each)
        up = " ".join(f"{_x(p[0], x):.1f},{_y(p[3], y):.1f}" for p in ordered)
        down = " ".join(f"{_x(p[0], x):.1f},{_y(p[2], y):.1f}" for p in reversed(ordered))
        line = " ".join(f"{_x(p[0], x):.1f},{_y(p[1], y):.1f}" for p in ordered)
        drawn.append(
            f'<g class="series{number % 4}"><polygon points="{up} {down}"/><polyline points="{line}"/></g>'
        )
    return _chart(title, "pretraining step", y_name, x, y, "".join(drawn))


def confusion(classes: Classes, title: str) -> str:
    """Draw a table of known against predicted classes, shaded by the share of the known class."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes.names)
    rows = []
    for name, counts in zip(classes.names, classes.counts, strict=True):
        total = sum(counts) or 1
        cells = "".join(
            f'<td style="--share:{count / total:.0%}">{count:,}<br><small>{count / total:.0%}</small></td>'
            for count in counts
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f"<figure><figcaption>{escape(title)}: rows are known, columns predicted</figcaption>"
        f'<div class="scroll"><table class="confusion"><tr><td></td>{heads}</tr>{"".join(rows)}</table></div>'
        "</figure>"
    )


def _limits(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def _x(value: float, limits: Point) -> float:
    return _LEFT + (_WIDTH - _LEFT - _PAD) * (value - limits[0]) / (limits[1] - limits[0])


def _y(value: float, limits: Point) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _PAD) * (value - limits[0]) / (limits[1] - limits[0])


def _chart(title: str, x_name: str, y_name: str, x: Point, y: Point, content: str) -> str:
    def ticks(limits: Point) -> list[float]:
        return [limits[0] + (limits[1] - limits[0]) * share for share in (0.05, 0.5, 0.95)]

    labels = "".join(
        f'<text x="{_x(t, x):.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{t:.3g}</text>'
        for t in ticks(x)
    ) + "".join(
        f'<text x="{_LEFT - 5}" y="{_y(t, y) + 4:.1f}" text-anchor="end">{t:.3g}</text>' for t in ticks(y)
    )
    axes = f'<path class="axis" d="M{_LEFT} {_PAD}V{_HEIGHT - _BOTTOM}H{_WIDTH - _PAD}"/>'
    names = (
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text transform="translate(11 {_HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_name)}'
        "</text>"
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{axes}{labels}{names}{content}</svg></figure>"
    )
