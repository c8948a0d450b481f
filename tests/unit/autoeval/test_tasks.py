"""Names of tasks, suites and modes; what is not defined is refused in one line, before anything heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esm2mega.autoeval.tasks import FINETUNE, LORA, PROBE, ZERO_SHOT, check_modes, check_options, parse_tasks
from esm2mega.cli.app import main
from esm2mega.data.benchmarks.names import FLIP_TASKS
from esm2mega.errors import UserError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["flip/gb1"], ["flip/gb1:two_vs_rest"]),
        (["flip/gb1:sampled", "flip/gb1:sampled"], ["flip/gb1:sampled"]),
        (["tape/stability"], ["tape/stability:test"]),
        (["tape/secondary_structure_8"], ["tape/secondary_structure_8:cb513"]),
        (["tape/remote_homology:test_family_holdout"], ["tape/remote_homology:test_family_holdout"]),
        (["deeploc2", "deeploc2:membrane"], ["deeploc2:locations", "deeploc2:membrane"]),
        (["contacts"], ["tape/contact_prediction:test"]),
        (["quick"], ["flip/gb1:two_vs_rest", "flip/secondary_structure:sampled"]),
    ],
)
def test_names(given: list[str], names: list[str]) -> None:
    assert [task.name for task in parse_tasks(given, "nowhere")] == names


def test_suites_hold_every_task_once() -> None:
    flip = parse_tasks(["flip"], "nowhere")
    assert [task.task for task in flip] == list(FLIP_TASKS)
    tape = [task.name for task in parse_tasks(["tape"], "nowhere")]
    assert len(set(tape)) == len(tape) == 7
    check_modes(parse_tasks(["flip", "tape"], "nowhere"), [PROBE])  # the mode by default
    assert dict(parse_tasks(["quick"], "nowhere")[0].limits) == {"train": 500, "valid": 200, "test": 200}


def test_contacts_may_be_ones_own(tmp_path: Path) -> None:
    (tmp_path / "contacts").mkdir()
    (task,) = parse_tasks(["contacts"], str(tmp_path))
    assert (task.name, task.modes) == ("contacts", (ZERO_SHOT,))
    with pytest.raises(UserError, match="--limit-test: contacts has no splits; leave it out"):
        check_options([task], [ZERO_SHOT], [], ["test"], [])


def test_modes_of_tasks() -> None:
    tasks = parse_tasks(["flip/gb1", "flip/scl", "proteingym", "contacts"], "nowhere")
    everywhere = (PROBE, FINETUNE, LORA)
    modes = [task.modes for task in tasks]
    assert modes == [(*everywhere, ZERO_SHOT), everywhere, (ZERO_SHOT,), (FINETUNE, LORA, ZERO_SHOT)]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--tasks", "flip/gb2"], "--tasks flip/gb2: is none of flip/aav, flip/gb1"),
        (["--tasks", "flip/gb1:human"], "gb1 has the splits two_vs_rest, one_vs_rest"),
        (["--tasks", "tape/stability:valid"], "stability has the test splits test; name one"),
        (["--tasks", "deeploc2:nucleus"], "has the labels locations, membrane"),
        (["--tasks", "flip/gb1,quick"], "flip/gb1:two_vs_rest with and without limits"),
        (["--tasks", "flip/scl", "--mode", "zero-shot"], "zero-shot is for variants of one protein"),
        (["--tasks", "proteingym", "--mode", "lora"], "is not defined for proteingym, which has zero-shot"),
        (["--tasks", "contacts"], "--mode probe: is not defined for tape/contact_prediction:test"),
        (["--tasks", "quick", "--mode", "best"], "--mode best: is none of probe, finetune, lora, zero-shot"),
        (
            ["optim.lr=1e-4", "--tasks", "quick"],
            "optim.lr=1e-4: changes the fine-tuning, and not --mode probe",
        ),
        (["--tasks", "quick", "--mode", "lora", "--layers", "1"], "--layers 1: is for probes, and not for"),
        (
            ["--tasks", "proteingym", "--mode", "zero-shot", "--limit-test", "9"],
            "--limit-test: proteingym has no splits; leave it out",
        ),
        (["parallel.tensor_parallel=2", "--tasks", "quick"], "parallel.tensor_parallel"),
        (
            ["seed=1", "--tasks", "quick", "--mode", "lora"],
            "seed=1: is set for each model and task; leave it",
        ),
    ],
)
def test_what_is_refused(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autoeval", "model", *words, "--source", "nowhere", "--out", "results"]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_names_need_no_numpy() -> None:
    code = (
        "import sys; from esm2mega.cli.autoeval import autoeval; "
        "print([name for name in ('numpy', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_task_is_named_with_one_set_of_limits() -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        parse_tasks(["quick", "flip/secondary_structure"], "nowhere")
    check_modes(parse_tasks(["quick"], "nowhere"), [PROBE])
