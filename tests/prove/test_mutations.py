"""The proof finds the classical errors of distributed training, and nothing where there is none."""

from __future__ import annotations

import pytest

from tests.prove.mutations import MUTATIONS, found, judge, trial


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_every_mutation_is_found() -> None:
    cleans = [trial(MUTATIONS[number], planted=False) for number in (-3, -1)]
    verdicts = judge([*map(trial, MUTATIONS), *cleans])
    assert len(MUTATIONS) == len({mutation.plant for mutation in MUTATIONS}) >= 25
    for mutation in MUTATIONS:
        verdict = verdicts[trial(mutation)]
        assert verdict.error is None, f"{mutation.what}: {verdict.error}"
        assert not verdict.passed, mutation.what
        assert found(mutation, verdict), f"{mutation.what}: {[str(seen) for seen in verdict.worst]}"
    for clean in cleans:
        assert verdicts[clean].passed, verdicts[clean].error or str(verdicts[clean].largest)
