"""Axes have round numbers, and groups of points their colours."""

from __future__ import annotations

import re

import numpy as np
import pytest

from esm2mega.report.results.charts import COLORS, GREY, RAMP, Axis, Plot, axis_of
from esm2mega.report.results.groups import groups_of


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.05, 0.07, [-0.05, 0.0, 0.05]),
        (380, 2420, [500, 1000, 1500, 2000]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert Axis("", low, high).ticks() == pytest.approx(expected)


def test_points_lie_where_they_should() -> None:
    plot = Plot(Axis("x", 0, 1), Axis("y", 0, 1))
    plot.dots([0, 1], [0, 1], COLORS[0])
    places = re.findall(r"M([\d.]+) ([\d.]+)h0", plot.figure("t"))
    (left, bottom), (right, top) = [tuple(map(float, place)) for place in places]
    assert (left, bottom, right, top) == (52, 222, 330, 10), "the corners of the axes"


@pytest.mark.parametrize("values", [[], [2.0], [3.0, 3.0], [float("nan"), 1.0]])
def test_any_values_have_an_axis(values: list[float]) -> None:
    axis = axis_of("x", values)
    assert axis.low < axis.high and axis.ticks()


def test_groups_of_points() -> None:
    ranges = groups_of([str(value) for value in range(100)])
    assert [color for color, _, _ in ranges] == list(RAMP)
    assert sum(len(rows) for _, _, rows in ranges) == 100 and {len(rows) for _, _, rows in ranges} == {20}
    assert [len(rows) for _, _, rows in groups_of(["0"] * 7 + ["1"] * 3)] == [7, 3]
    assert len(groups_of(["2.5"] * 4)) == 1
    names = groups_of([name for n, name in enumerate("ABCDEFGH") for _ in range(n + 1)])
    assert [(color, name) for color, name, _ in names] == [
        *zip(COLORS, "HGFEDC", strict=True),
        (GREY, "others"),
    ]
    assert sorted(np.concatenate([rows for _, _, rows in names])) == list(range(36))


def test_a_long_number_at_the_end_of_the_axis_is_not_cut_off() -> None:
    chart = Plot(Axis("step", 400, 2500), Axis("y", 0, 1)).figure("t")
    found = {text: anchor for anchor, text in re.findall(r'text-anchor="(\w+)">([\d,]+)</text>', chart)}
    assert found["2,500"] == "end" and found["2,000"] == "middle"


def test_the_unit_of_a_long_name_stands_below_the_chart() -> None:
    long = "mean squared error (standard deviations of the training labels, squared)"
    figure = Plot(Axis("x", 0, 1), Axis(long, 0, 1)).figure("Loss", "a note")
    assert ">mean squared error</text>" in figure
    assert "<p>standard deviations of the training labels, squared; a note</p>" in figure
    short = Plot(Axis("x", 0, 1), Axis("Huber loss (units of the labels)", 0, 1)).figure("Loss")
    assert ">Huber loss (units of the labels)</text>" in short and "<p>" not in short
