"""Contenders take turns: who comes first rotates, round 0 does not count, and ratios are within a round."""

from __future__ import annotations

import time

import pytest

from esm2mega.benchmark.turns import Pass, Prepare, ratios, spread, take_turns


def test_contenders_take_turns() -> None:
    order: list[tuple[str, int]] = []
    told: list[tuple[str, int]] = []

    def contender(name: str) -> Prepare:
        def prepare(number: int) -> Pass:
            time.sleep(0.003)  # is not timed

            def run() -> None:
                order.append((name, number))
                time.sleep(0.001 if name == "fast" else 0.02)

            return Pass(run, units=10, computed=1 + number)

        return prepare

    names = ("fast", "slow", "middle")
    turns = take_turns(
        {name: contender(name) for name in names}, 2, lambda name, number, rate: told.append((name, number))
    )
    assert order == told
    assert [name for name, _ in order] == [
        *("fast", "slow", "middle"),
        *("slow", "middle", "fast"),
        *("middle", "fast", "slow"),
    ]
    assert [number for _, number in order] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(len(one.rates) == 2 and one.computed == [2, 3] for one in turns.values())
    assert max(turns["slow"].rates) <= 10 / 0.02 < 10 / 0.015 < max(turns["fast"].rates)


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([10, 30], [5, 10]) == [2, 3]
    with pytest.raises(ValueError):
        ratios([10], [5, 10])
    assert spread([3, 1, 2]) == (2, 1, 3)
