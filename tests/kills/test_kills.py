"""A few kills of every command change nothing, and the harness notices what it is there to notice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kills import harness as harness_module
from tests.kills.cases import Case
from tests.kills.harness import Harness, adopting_orphans
from tests.ranks import Rank, start_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def orphans() -> Iterator[None]:
    with adopting_orphans():
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def test_a_few_kills_of_every_command(out: Path) -> None:
    harness = Harness(out, seed=1)
    harness.run(len(harness.cases) + 2)
    assert {kill["outcome"] for kill in harness.kills} == {"equal"}, harness.kills
    assert {kill["case"] for kill in harness.kills} == set(harness.cases)
    # A later start goes on behind what is written, also where the last line was cut short.
    journal = out / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"case": "emb')
    later = Harness(out, seed=1)
    assert later.kills == harness.kills == [json.loads(line) for line in journal.read_text().splitlines()]
    assert not list(out.glob("chain-*")), "what is equal is removed"


def _other_seed(case: Case, folder: Path) -> Sequence[str]:
    return [*case.words(folder), *(["seed=7"] if any(folder.iterdir()) else [])]


def _bad_key(case: Case, folder: Path) -> Sequence[str]:
    return [*case.words(folder), *(["seeds=7"] if any(folder.iterdir()) else [])]


def _from_the_beginning(case: Case, folder: Path) -> Sequence[str]:
    return [*case.words(folder), "checkpoint.resume=never"]


@pytest.mark.parametrize(
    ("plant", "outcome", "fault"),
    [
        (_other_seed, "unequal", "weights: "),
        (_bad_key, "lost", "unknown key seeds"),
        (_from_the_beginning, "lost", "went on from step 0"),
    ],
)
def test_what_changes_after_a_kill_is_noticed(out: Path, tmp_path: Path, plant, outcome: str, fault: str) -> None:
    harness = Harness(out, seed=2)
    case = harness.cases["pretrain-1-sync"]
    harness.cases = {case.name: replace(case, words=lambda folder: plant(case, folder))}
    before = len(harness.kills)
    while all(kill["outcome"] == "equal" for kill in harness.kills[before:]) and len(harness.kills) < before + 30:
        harness.run(len(harness.kills) + 1)
    last = harness.kills[-1]
    assert last["outcome"] == outcome and any(fault in line for line in last["faults"]), last


_LEAVES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
time.sleep(600)
"""


def test_a_process_that_is_left_is_noticed_and_ended(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(out, seed=3)

    def start(self: Harness, case: Case, folder: Path, name: str) -> tuple[list[Rank], Path]:
        return start_ranks(["-c", _LEAVES], 1, out / "leaves"), out / "leaves"

    monkeypatch.setattr(Harness, "_start", start)
    monkeypatch.setattr(Harness, "_unbroken", lambda self, case: (out, 0.5))
    monkeypatch.setattr(harness_module, "_HELPERS", 0.5)
    before = harness_module._descendants()
    harness.run(len(harness.kills) + 1, ["embed"])
    assert harness.kills[-1]["outcome"] == "left"
    assert harness_module._descendants() <= before
    assert os.getpid() not in {process.pid for process in before}
