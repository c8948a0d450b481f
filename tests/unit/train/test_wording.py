"""What the first lines of a run say of context parallelism that saves no memory."""

from __future__ import annotations

import pytest

from esm2mega.config.load import load_run
from esm2mega.config.validate import validate
from esm2mega.train.wording import _limits_of_context_parallelism

CP2 = ["model.size=8M", "schedule.warmup_steps=10", "parallel.context_parallel_size=2"]
CONTACTS = ["task.kind=contact", "task.target_columns=[contacts]"]


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (["data.max_seq_length=256", "train.micro_batch_tokens=1024"], ["train.micro_batch_tokens=512"]),
        (
            ["data.max_seq_length=256", "train.micro_batch_size=8", "train.global_batch_size=8"],
            ["train.micro_batch_size=4"],
        ),
    ],
)
def test_the_cure_for_needless_parts_is_taken(given: list[str], cure: list[str]) -> None:
    """It is in the unit in which the run counts."""
    (line,) = _limits_of_context_parallelism(load_run(None, [*CP2, *given]))
    assert "the longest protein (256 tokens) fits" in line
    for setting in (*cure, "parallel.context_parallel_size=1"):
        assert setting in line
    cured = load_run(None, [*CP2, *given, *cure, "parallel.context_parallel_size=1"])
    validate(cured, 1)
    assert _limits_of_context_parallelism(cured) == []


def test_long_proteins_need_no_note_unless_maps_of_contacts_are_trained() -> None:
    long = [*CP2, "data.max_seq_length=1024", "train.micro_batch_tokens=1024"]
    assert _limits_of_context_parallelism(load_run(None, long)) == []
    (line,) = _limits_of_context_parallelism(load_run(None, [*long, *CONTACTS]))
    assert "maps of all pairs on every process" in line
