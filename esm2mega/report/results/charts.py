"""Draws small charts as inline SVG, whose colours follow the page, light or dark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Limits = tuple[float, float]

COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Names the colours of groups that have no order."""

RAMP = ("s0", "s1", "s2", "s3", "s4")
"""Names the colours of ranges of numbers, from low to high."""

GREY = "c6"
"""Names the colour of what is left over, and of lines for comparison."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _PAD = 340, 260, 52, 38, 10
_TICKS = 5
_MOST_VALUES = 150
"""Limits the points of a line whose numbers are shown: each takes some 150 bytes of the page."""
_MOST_LETTERS = 40
"""Limits the name of the y axis, as high as the chart: the unit of a longer one stands below the chart."""
_DIGIT_WIDTH = 6.5
"""Bounds the width of a digit of the small letters of a chart."""

_PUNCTUATION = re.compile("([/:_@])")


@dataclass(frozen=True)
class Axis:
    """Describes an axis by its name and ends.

    Attributes:
        name: What it measures.
        low: The number at its beginning.
        high: The number at its end.
        is_log: Whether equal ratios have equal lengths; then all numbers are above 0.
    """

    name: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round numbers between the ends."""
        if self.is_log:
            return self._powers()
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        step *= next(each for each in (1, 2, 5, 10) if (self.high - self.low) / (each * step) <= _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _powers(self) -> list[float]:
        """Return powers of 10 between the ends, or their doubles and fives as well where there are few."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        powers = [10.0**decade for decade in decades if self.low <= 10.0**decade <= self.high]
        if len(powers) > 1:
            return powers[:: -(-len(powers) // (_TICKS + 1))]
        ticks = (factor * 10.0**decade for decade in decades for factor in (1, 2, 5))
        return [tick for tick in ticks if self.low <= tick <= self.high]


def axis_of(name: str, values: Iterable[float]) -> Axis:
    """Return an axis that holds all values, with a margin."""
    known = [value for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    return Axis(name, low - margin, high + margin)


class Plot:
    """Gathers what is drawn into one chart, in the colours above."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self._drawn: list[str] = []
        self._values: list[str] = []
        self._legend: list[str] = []

    def dots(self, xs: Sequence[float], ys: Sequence[float], color: str) -> None:
        """Draw points as one path, which keeps the page small."""
        size = 5 if len(xs) < 300 else 3
        path = "".join(f"M{self._place(x, y)}h0" for x, y in zip(xs, ys, strict=True))
        self._drawn.append(f'<path class="dots {color}" stroke-width="{size}" d="{path}"/>')

    def points(self, xs: Sequence[float], ys: Sequence[float], color: str, words: Sequence[str]) -> None:
        """Draw points each of which is an element of its own, with words that show under the pointer."""
        size = 2.2 if len(xs) < 300 else 1.4
        for x, y, each in zip(xs, ys, words, strict=True):
            place = f'cx="{self._x(x):.2f}" cy="{self._y(y):.2f}" r="{size}" data-r="{size}"'
            self._drawn.append(
                f'<circle class="point {color}" {place}><title>{escape(each)}</title></circle>'
            )

    def line(self, xs: Sequence[float], ys: Sequence[float], color: str, dashed: bool = False) -> None:
        """Draw a line from point to point."""
        points = " ".join(self._place(x, y, ",") for x, y in zip(xs, ys, strict=True))
        look = "dashed" if dashed else "line"
        self._drawn.append(f'<polyline class="{look} {color}" points="{points}"/>')

    def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], color: str) -> None:
        """Draw the intervals of a line as an area."""
        there = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
        points = " ".join(self._place(x, y, ",") for x, y in there)
        self._drawn.append(f'<polygon class="band {color}" points="{points}"/>')

    def values(self, xs: Sequence[float], ys: Sequence[float], color: str, name: str) -> None:
        """Show the numbers of points while the pointer is over them; of many, evenly chosen ones.

        Args:
            xs: Where the points lie.
            ys: Their values.
            color: The colour of the mark that appears.
            name: What the values are.
        """
        step = max(1, -(-len(xs) // _MOST_VALUES))
        # The last point is always one of them: its value is the one that is asked for most.
        first = (len(xs) - 1) % step
        for x, y in zip(xs[first::step], ys[first::step], strict=True):
            text = f"{name}: {_exact(y)} at {self.x.name} {_exact(x)}"
            self._values.append(
                f'<circle class="value-at {color}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="6">'
                f"<title>{escape(text)}</title></circle>"
            )

    def label(self, color: str, text: str) -> None:
        """Name a colour below the chart."""
        self._legend.append(f'<li><span class="key {color}"></span>{escape(text)}</li>')

    def figure(self, title: str, note: str = "") -> str:
        """Return the chart as HTML."""
        note = "; ".join(filter(None, (self._below(), note)))
        legend = f'<ul class="legend">{"".join(self._legend)}</ul>' if self._legend else ""
        said = escape(f"{title}: {self.y.name} over {self.x.name}" + f"; {note}" * bool(note))
        below = f"<p>{escape(note)}</p>" if note else ""
        return (
            f"<figure><figcaption>{escape(title)}</figcaption>"
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">'
            f"{self._axes()}{''.join(self._drawn + self._values)}</svg>{legend}{below}</figure>"
        )

    def _place(self, x: float, y: float, between: str = " ") -> str:
        return f"{self._x(x):.1f}{between}{self._y(y):.1f}"

    def _x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _PAD) * self.x.share(value)

    def _y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _PAD) * self.y.share(value)

    def _anchor(self, tick: float, text: str) -> str:
        """Return where the number of a tick of the x axis hangs; a long one at the end would be cut off."""
        width = _DIGIT_WIDTH * len(text)
        return "end" if self._x(tick) + width / 2 > _WIDTH else "middle"

    def _beside(self) -> str:
        """Return the name of the y axis, without its unit in brackets if there is no room for both."""
        return self.y.name.removesuffix(f" ({self._below()})")

    def _below(self) -> str:
        """Return the unit of the y axis if there is no room for it beside the axis."""
        _, _, unit = self.y.name.partition(" (")
        return unit.removesuffix(")") if len(self.y.name) > _MOST_LETTERS else ""

    def _axes(self) -> str:
        right, bottom = _WIDTH - _PAD, _HEIGHT - _BOTTOM
        grid = "".join(f"M{_LEFT} {self._y(tick):.1f}H{right}" for tick in self.y.ticks())
        numbers = "".join(
            f'<text x="{self._x(tick):.1f}" y="{bottom + 15}" text-anchor="{self._anchor(tick, text)}">'
            f"{text}</text>"
            for tick, text in _numbered(self.x.ticks())
        ) + "".join(
            f'<text x="{_LEFT - 6}" y="{self._y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
            for tick, text in _numbered(self.y.ticks())
        )
        names = (
            f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">'
            f"{escape(self.x.name)}</text>"
            f'<text transform="translate(12 {(_PAD + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self._beside())}</text>"
        )
        base = f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>'
        return f'<path class="grid" d="{grid}"/>{base}{numbers}{names}'


def bar(value: float, low: float | None, high: float | None, limits: Limits, kind: str) -> str:
    """Draw a value as a bar from 0, with its interval as a line; `kind` names its colour."""
    first, last = limits
    span = (last - first) or 1.0

    def x(number: float) -> float:
        return 3 + 114 * (number - first) / span

    left, right = sorted((x(0.0), x(value)))
    line = ""
    if low is not None and high is not None:
        a, b = x(low), x(high)
        line = f'<path class="interval" d="M{a:.1f} 7H{b:.1f}M{a:.1f} 4V10M{b:.1f} 4V10"/>'
    return (
        f'<svg class="bar" viewBox="0 0 120 14" aria-hidden="true"><rect class="{kind}" x="{left:.1f}" y="2" '
        f'width="{max(right - left, 1.0):.1f}" height="10"/>{line}</svg>'
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], is_wide: bool = False) -> str:
    """Return a table of texts as a figure; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    lines = ""
    for name, *cells in rows:
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines += f'<tr><th scope="row">{breakable(name)}</th>{shown}</tr>'
    box = scrolling(f"<tr>{head}</tr>{lines}", caption)
    wide = ' class="wide"' if is_wide else ""
    return f"<figure{wide}><figcaption>{escape(caption)}</figcaption>{box}</figure>"


def scrolling(rows: str, name: str, kind: str = "") -> str:
    """Return a table in a box of its own, which scrolls where the window is too narrow for it."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="{kind}">{rows}</table></div>'
    )


def breakable(text: str) -> str:
    """Return a name as HTML that may be broken after its punctuation, and not in its words."""
    return _PUNCTUATION.sub(r"\1<wbr>", escape(text))


def _exact(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.5g}"


def _numbered(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Return each tick with its text; from 10,000 on in thousands, millions and so on, if these differ."""
    largest = max(map(abs, ticks), default=0.0)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= max(size, 1e4):
            short = [f"{tick / size:.4g}{letter}" if tick else "0" for tick in ticks]
            if len({*short}) == len(short):
                return list(zip(ticks, short, strict=True))
            break
    return [(tick, _number(tick)) for tick in ticks]


def _number(value: float) -> str:
    """Return the text of a tick, short enough for the space beside an axis."""
    if 0 < abs(value) < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"
