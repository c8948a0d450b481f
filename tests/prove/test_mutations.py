"""The proof finds the classical errors of distributed training, and nothing where there is none."""

from __future__ import annotations

import pytest

from esm2mega.prove.prover import Verdict
from esm2mega.prove.trials import Trial
from tests.prove.mutations import MUTATIONS, Mutation, found, judge, trial

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def verdicts() -> dict[Trial, Verdict]:
    clean = trial(MUTATIONS[-1], planted=False)
    return judge([*map(trial, MUTATIONS), clean])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.plant.__name__)
def test_mutation_is_found(mutation: Mutation, verdicts: dict[Trial, Verdict]) -> None:
    verdict = verdicts[trial(mutation)]
    assert verdict.error is None
    assert not verdict.passed
    assert found(mutation, verdict), [str(difference) for difference in verdict.worst]


def test_without_mutation_the_trial_passes(verdicts: dict[Trial, Verdict]) -> None:
    verdict = verdicts[trial(MUTATIONS[-1], planted=False)]
    assert verdict.error is None
    assert verdict.passed, str(verdict.largest)
