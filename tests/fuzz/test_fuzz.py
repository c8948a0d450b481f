"""Some changed inputs meet no fault, and the harness notices what it is there to notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import harness as module
from tests.fuzz.harness import Harness
from tests.fuzz.subjects import CRC, OURS, PLAIN, Subject

pytestmark = pytest.mark.distributed

FUZZED, ROTTEN = 5, 3


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_some_inputs_of_all_kinds(out: Path) -> None:
    """`make fuzz` and `make rot` take more; a few subjects here, others with another seed."""
    harness = Harness(out, seed=16)
    names = [subject.name for subject in harness.subjects][::4]
    harness.run(FUZZED, only_rot=False, names=names)
    harness.run(FUZZED + ROTTEN, only_rot=True, names=names)
    assert not harness.faults, harness.faults
    assert len({entry["subject"] for entry in harness.entries}) >= FUZZED - 2
    # A later start goes on behind what is written, also where the last line was cut short.
    journal = out / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"number": 2')
    assert Harness(out, seed=16).entries == harness.entries


_ENDS = {
    "raises": ("raise ValueError('x')", "traceback"),
    "reports": ("sys.stderr.write('esm2mega: internal error: x'); sys.exit(1)", "internal"),
    "waits": ("import time; time.sleep(60)", "hang"),
    "grows": ("import numpy; numpy.ones(1 << 29)", "memory"),
    "killed": ("import os; os.kill(os.getpid(), 11)", "other"),
    "two lines": ("sys.stderr.write('esm2mega: error: x\\n' * 2); end(2)", "other"),
    "strays": ("open('x', 'w'); end(0)", "other"),
    "other numbers": ("print('2 numbers'); end(0)", "silent"),
    "same numbers": ("print('1 numbers in 5 s'); end(0)", "accepted"),
    "refuses": ("sys.stderr.write('esm2mega: error: x'); end(2)", "refused"),
}

_PROGRAM = """
import json, resource, sys
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
sys.argv[1:] = []
def end(code):
    Path(request["report"]).write_text(json.dumps({"grown": 0, "result": {}, "witness": []}))
    sys.exit(code)
if Path(request["it"]).read_bytes() == b"sound":
    print("1 numbers in 2 s")
    end(0)
resource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 32))
"""


@pytest.mark.parametrize("name", _ENDS)
def test_what_commands_do_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ending, outcome = _ENDS[name]
    program = tmp_path / "program.py"
    program.write_text(f"{_PROGRAM}\n{ending}\n")
    start = module.warm.start

    def started(words: list[str], *arguments: Any) -> Any:
        return start([str(program), *words[2:]], *arguments)

    monkeypatch.setattr(module.warm, "start", started)
    monkeypatch.setattr(module, "HANG_SECONDS", 1.0 if outcome == "hang" else 20.0)
    (tmp_path / "made").touch()
    (tmp_path / "text").write_text("sound")
    monkeypatch.setattr(
        module, "subjects", lambda folder: [Subject("x", tmp_path / "text", OURS, (("inspect",),))]
    )
    harness = Harness(tmp_path, seed=1)
    harness.run(1, only_rot=True)
    (entry,) = harness.entries
    assert entry["outcome"] == outcome, entry
    assert bool(harness.faults) == (outcome not in ("accepted", "refused"))
    assert (tmp_path / "faults" / "0-x" / "it" / "text").exists() == bool(harness.faults)
    assert json.loads((tmp_path / "journal.jsonl").read_text()) == entry


@pytest.mark.parametrize(
    ("rule", "name", "how", "expected"),
    [
        (OURS, "config.yaml", "structure: document", True),
        (CRC, "x.pt", "flip", True),
        (CRC, "x.pt", "structure: archive", False),
        (CRC, "x.yaml", "flip", False),
        (PLAIN, "x.csv", "flip", False),
    ],
)
def test_where_other_numbers_are_a_fault(rule: str, name: str, how: str, expected: bool) -> None:
    subject = Subject("x", Path("x"), rule, (), uncovered=("*.yaml",))
    assert Harness._must_be_equal(subject, name, how) == expected
