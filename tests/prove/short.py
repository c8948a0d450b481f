"""Short forms of the trials of `esm2mega prove` for `make test`; the whole ones are in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest

from esm2mega.prove import prover
from esm2mega.prove.layouts import PROTEINS_PER_STEP
from esm2mega.prove.training import SAVED
from esm2mega.prove.trials import Trial


def packed(trial: Trial) -> Trial:
    """The same trial with three proteins per micro-batch, unless it has more or its ranks cannot share them.

    Most of the time of a trial goes into exchanges between processes, which each micro-batch makes anew.
    """
    if any(PROTEINS_PER_STEP % (3 * layout.dp) for layout in trial.layouts):
        return trial
    layouts = tuple(replace(layout, packed=max(layout.packed, 3)) for layout in trial.layouts)
    return replace(trial, layouts=layouts)


@contextmanager
def to_first_checkpoint() -> Iterator[None]:
    """Have runs end with their first evaluation and checkpoint, after half of the steps, unless they are
    resumed; so do those that they are compared with.
    """
    references, final = prover._references, prover._final

    def short(trial: Trial, leg: prover.Leg) -> prover.Leg:
        return replace(leg, stop=SAVED) if len(trial.layouts) == 1 else leg

    with (
        patch.object(prover, "_references", lambda trial: [short(trial, leg) for leg in references(trial)]),
        patch.object(prover, "_final", lambda trial: short(trial, final(trial))),
    ):
        yield


def short_and_whole(short: Iterable[Trial], whole: Iterable[Trial]) -> pytest.MarkDecorator:
    """Parameters of a test: a context in which it judges trials, and these trials."""
    return pytest.mark.parametrize(
        ("runs", "trials"),
        [
            pytest.param(to_first_checkpoint, [*map(packed, short)], id="short"),
            pytest.param(nullcontext, [*whole], id="whole", marks=pytest.mark.slow),
        ],
    )
