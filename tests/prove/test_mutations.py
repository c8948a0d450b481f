"""The proof finds the classical errors of distributed training, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.prove.mutations import MUTATIONS, Mutation, found, judge, trial

IN_EVERY_RUN = MUTATIONS[::5]


def test_every_error_is_planted_in_its_own_way() -> None:
    assert len(MUTATIONS) == len({mutation.plant for mutation in MUTATIONS}) >= 30


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "mutations",
    [
        pytest.param(IN_EVERY_RUN, id="some"),
        pytest.param(MUTATIONS, id="all", marks=pytest.mark.slow),
    ],
)
def test_mutations_are_found(mutations: Sequence[Mutation]) -> None:
    cleans = [trial(MUTATIONS[number], planted=False) for number in (-3, -1)]
    verdicts = judge([*map(trial, mutations), *cleans])
    for mutation in mutations:
        verdict = verdicts[trial(mutation)]
        assert verdict.error is None, f"{mutation.what}: {verdict.error}"
        assert not verdict.passed, mutation.what
        assert found(mutation, verdict), f"{mutation.what}: {[str(seen) for seen in verdict.worst]}"
    for clean in cleans:
        assert verdicts[clean].passed, verdicts[clean].error or str(verdicts[clean].largest)
