"""A few kills of some commands change nothing, and the harness notices what it is there to notice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import harness as harness_module
from tests.kills.cases import Case
from tests.kills.harness import Harness, adopting_orphans

pytestmark = pytest.mark.distributed

# The rest takes longer, and is part of `make kills` alone.
LEFT_OUT = {
    *("pretrain-1-sync", "pretrain-1-async", "pretrain-2-sync", "pretrain-4-sync", "pretrain-4-async"),
    *("pretrain-cp-sync", "pretrain-cp-async", "finetune", "finetune-lora-2", "predict", "convert"),
    *("embed-2", "score", "lora-export"),
}


@pytest.fixture(autouse=True)
def orphans() -> Iterator[None]:
    with adopting_orphans():
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def test_a_few_kills_of_some_commands(out: Path) -> None:
    harness = Harness(out, seed=1)
    names = [name for name in harness.cases if name not in LEFT_OUT]
    while {kill["case"] for kill in harness.kills} < set(names):
        harness.run(len(harness.kills) + 1, names)
    assert {kill["outcome"] for kill in harness.kills} == {"equal"}, harness.kills
    # A later start goes on behind what is written, also where the last line was cut short.
    journal = out / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"case": "emb')
    later = Harness(out, seed=1)
    assert later.kills == harness.kills == [json.loads(line) for line in journal.read_text().splitlines()]
    assert not list(out.glob("chain-*")), "what is equal is removed"


# Programs that write `x`; those that were not killed in their first second write the right one.
_PROGRAM = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
again = (folder / "begun").exists()
(folder / "begun").touch()
{plant}
if not again:
    time.sleep(1)
(folder / "x").write_text(text if again else "right")
"""
_SAYS_STEP_0 = "print('run      anywhere', file=sys.stderr, flush=True)"
_SAVES = "(folder / 'checkpoints/step_00000004').mkdir(parents=True, exist_ok=True)"
_COMPLETES = "(folder / 'checkpoints/step_00000004/COMPLETE').touch()"


@pytest.mark.parametrize(
    ("plant", "is_training", "outcome", "fault"),
    [
        ("text = 'right'", False, "equal", ""),
        ("text = 'wrong'", False, "unequal", "x is another file"),
        ("text = 'right'; (folder / f'.x.{os.getpid()}.partial').touch()", False, "unequal", "is left over"),
        ("text = 'right'; again and sys.exit(3)", False, "lost", "ended with code 3"),
        (f"text = ''; {_SAVES}; {_COMPLETES}; {_SAYS_STEP_0}", True, "lost", "went on from step 0"),
        ("text = 'right'; os.fork() or (os.setsid(), time.sleep(600))", False, "left", "left behind"),
    ],
)
def test_what_kills_do_is_noticed(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: str,
    is_training: bool,
    outcome: str,
    fault: str,
) -> None:
    monkeypatch.setattr(harness_module, "make_inputs", lambda folder: [])
    monkeypatch.setattr(harness_module, "_HELPERS", 0.5)
    program = ("-c", _PROGRAM.format(plant=plant))
    case = Case("planted", lambda folder: [str(folder)], is_training=is_training, program=program)
    harness = Harness(tmp_path, seed=3)
    harness.cases = {case.name: case}
    expected = tmp_path / "unbroken" / case.name
    expected.mkdir(parents=True)
    (expected / "x").write_text("right")
    (expected / "begun").touch()
    harness._seconds = {case.name: 1.0}
    others = harness_module._descendants()
    for _ in range(10):  # until a kill comes when the program has begun
        harness.run(len(harness.kills) + 1)
        if harness.kills[-1]["outcome"] == outcome:
            break
    last = harness.kills[-1]
    assert last["outcome"] == outcome and any(fault in line for line in last["faults"] or [""]), harness.kills
    assert harness_module._descendants() <= others
