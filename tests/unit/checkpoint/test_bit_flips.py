"""A flipped bit anywhere in a checkpoint is noticed by every command that reads it, and by a resume."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.errors import UserError
from esm2mega.train.start import find_resume
from tests.unit.checkpoint.test_digests import flip
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS, tiny_run

FLIPS_OF_A_FILE = 5


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proteins") / "two.fasta"
    path.write_text(">a\nMKTAYIAKQR\n>b\nGAVLI\n")
    return path


def readers(checkpoint: Path, proteins: Path, data: Path, out: Path) -> list[list[str]]:
    """A command of each kind that reads a checkpoint of this package."""
    embedded = ["embed", str(checkpoint), str(proteins), "--out", f"{out}.h5"]
    evaluated = ["evaluate", str(checkpoint), "--data", str(data)]
    fresh = [f"init_from={checkpoint}", f"data.train={data}", f"run_dir={out}", *SETTINGS]
    return [
        embedded,
        ["score", str(checkpoint), "--sequence", "MKTAYIAKQR", "--out", f"{out}.csv"],
        evaluated,
        ["inspect", str(checkpoint)],
        ["inspect", "--verify", str(checkpoint)],
        ["compare", str(checkpoint), str(checkpoint), *evaluated[2:]],
        ["convert", str(checkpoint), f"{out}.hf", "--to", "hf"],
        ["pretrain", *fresh],
        ["pretrain", f"checkpoint.resume={checkpoint}", *fresh[1:], "train.max_steps=6"],
        ["embed", *embedded[1:], "checkpoint.verify=false"],
    ]


def means_the_same(path: Path, original: Path) -> bool:
    """Whether a changed ``train_state.json`` or ``COMPLETE`` says what it said, as others read it."""
    if path.name == "COMPLETE":
        return path.read_bytes().split() == original.read_bytes().split()
    if path.name != "train_state.json":
        return False
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(original.read_bytes()))
    except ValueError:
        return False


def names_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def test_no_command_takes_a_changed_file(
    finished: TinyRun, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, checkpoint = layout.step_dir(finished.run_dir, 4), tmp_path / "step_00000004"
    shutil.copytree(original, checkpoint)
    draw = random.Random(16)
    commands = readers(checkpoint, proteins, finished.valid, tmp_path / "out")
    count = 0
    for name in names_of(checkpoint):
        for _ in range(FLIPS_OF_A_FILE):
            path, command = checkpoint / name, commands[count % len(commands)]
            count += 1
            if "checkpoint.verify=false" in command and name.endswith(".distcp"):
                command = commands[0]  # only these files may be left out
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
            code, said = main(command), capsys.readouterr().err
            if not means_the_same(path, original / name):
                blamed = "digests.json" if name == "COMPLETE" else name
                assert code == 2 and f"{checkpoint / blamed}: " in said, (command, name, said)
                assert said.count("error:") == 1 and "Traceback" not in said
            shutil.copyfile(original / name, path)
    assert count >= 8 * FLIPS_OF_A_FILE
    assert not [path for path in tmp_path.iterdir() if path != checkpoint], "nothing was written"


def test_every_reader_works_on_the_unchanged_one(
    finished: TinyRun, proteins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or else the refusals above would prove nothing."""
    checkpoint = layout.step_dir(finished.run_dir, 4)
    for number, command in enumerate(readers(checkpoint, proteins, finished.valid, tmp_path / "out")[:7]):
        command = [word.replace(str(tmp_path / "out"), str(tmp_path / f"out{number}")) for word in command]
        assert main(command) == 0, (command, capsys.readouterr().err)
    skipped = [
        "embed",
        str(checkpoint),
        str(proteins),
        "--out",
        str(tmp_path / "b.h5"),
        "checkpoint.verify=false",
    ]
    assert main(skipped) == 0
    assert capsys.readouterr().err.count("its tensors are not verified (checkpoint.verify=false)") == 1


def test_a_resume_sets_the_damaged_one_aside_and_goes_on(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(17)
    for number, name in enumerate(names_of(layout.step_dir(finished.run_dir, 4))):
        run_dir = tmp_path / str(number)
        shutil.copytree(finished.run_dir, run_dir)
        newest, older = (layout.step_dir(run_dir, step) for step in (4, 2))
        place = 20 if name == "train_state.json" else draw.randrange((newest / name).stat().st_size)
        flip(newest / name, min(place, (newest / name).stat().st_size - 2), draw.randrange(7))
        resume = ("auto", str(run_dir), f"{run_dir}@last")[number % 3]
        start = find_resume(tiny_run(f"checkpoint.resume={resume}", run_dir=run_dir))
        assert start is not None and start.path == older and start.state["step"] == 2, name
        assert (run_dir / "checkpoints" / "step_00000004.damaged" / name).is_file() and not newest.exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"step_00000004 is now {newest}.damaged\n" in said


def test_the_run_ends_as_the_unbroken_one(finished: TinyRun, tmp_path: Path) -> None:
    from tests.checkpoints import full_tensors

    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    flip(layout.step_dir(run_dir, 4) / "model" / "__0_0.distcp", 9000)
    assert main(["pretrain", "--config", str(run_dir / "config.yaml"), f"run_dir={run_dir}"]) == 0
    ours, theirs = (full_tensors(layout.step_dir(folder, 4)) for folder in (run_dir, finished.run_dir))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_none_left_stops_and_stays_stopped(finished: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    for step in (2, 4):
        flip(layout.step_dir(run_dir, step) / "config.yaml")
    for _ in range(2):  # a job that is queued again must not begin anew
        with pytest.raises(UserError, match="all of its checkpoints are damaged, and renamed to step_0"):
            find_resume(tiny_run(run_dir=run_dir))
    assert find_resume(tiny_run("checkpoint.resume=never", run_dir=run_dir)) is None


def test_the_checkpoint_of_another_run_is_not_renamed(finished: TinyRun, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.run_dir, other)
    flip(layout.step_dir(other, 4) / "model" / "__0_0.distcp", 9000)
    start = find_resume(tiny_run(f"checkpoint.resume={other}", run_dir=tmp_path / "mine"))
    assert start is not None and start.path == layout.step_dir(other, 2)
    assert layout.is_complete(layout.step_dir(other, 4))
