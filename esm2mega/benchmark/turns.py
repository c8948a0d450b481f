"""Lets contenders take turns, so that a machine that gets slower or faster strikes all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from esm2mega.benchmark.machine import synchronize


@dataclass(frozen=True)
class Pass:
    """Holds the work of a contender in one round.

    Attributes:
        run: Does it.
        units: What is counted of it: real tokens, residues, operations, bytes.
        computed: Tokens that are computed for each real one.
    """

    run: Callable[[], object]
    units: float
    computed: float = 1.0


Prepare = Callable[[int], Pass]
"""Brings the work of a round, by its number, into the form that the contender needs, which is not timed."""


@dataclass
class Turns:
    """Holds what a contender has done, round by round.

    Attributes:
        rates: Units per second.
        computed: As in `Pass`.
        failure: What a guest raised, in one line, and after which it had no more turns; else empty.
    """

    rates: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    failure: str = ""


Told = Callable[[str, int, float], object]
"""Is told a contender, the number of the round and the rate, as soon as they are known; round 0 warms up."""


def failure_of(error: Exception) -> str:
    """Return an error of another program in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def take_turns(
    contenders: Mapping[str, Prepare], rounds: int, told: Told, guests: Collection[str] = ()
) -> dict[str, Turns]:
    """Let every contender pass once in each round, in an order that rotates from round to round.

    Round 0 warms up caches and allocators, and does not count.

    Args:
        contenders: Who takes turns.
        rounds: Rounds that count.
        told: Is told each rate.
        guests: Those whose errors end their own turns, and not those of the others.
    """
    turns = {name: Turns() for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if turns[name].failure:
                continue
            try:
                work = contenders[name](number)
                synchronize()
                began = time.perf_counter()
                work.run()
                synchronize()
            except Exception as error:  # whatever another program raises
                if name not in guests:
                    raise
                turns[name].failure = failure_of(error)
                continue
            rate = work.units / (time.perf_counter() - began)
            told(name, number, rate)
            if number:
                turns[name].rates.append(rate)
                turns[name].computed.append(work.computed)
    return turns


class Spread(NamedTuple):
    """Holds the median of several measurements, and the least and the greatest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the ends of values."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return how many times their rate mine is, round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]
