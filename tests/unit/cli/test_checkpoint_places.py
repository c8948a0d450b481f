"""A checkpoint chooses no place on the machine that reads it, whatever stands in its configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from esm2mega.checkpoint import layout
from esm2mega.cli.app import main
from esm2mega.config.schema import Run
from tests.infer_models import write_fasta
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

FORMS = ("{trap}/KEY", "${{oc.env:TRAP}}/KEY", "{trap}/KEY/{{version}}", "{trap}/KEY/{{time}}", "~/KEY")


STEP = (
    *("train.max_steps=1", "schedule.name=constant", "schedule.warmup_steps=0", "data.max_seq_length=64"),
    *("train.micro_batch_tokens=128", "train.global_batch_tokens=128"),
)


def _path_keys() -> list[str]:
    """All keys that are marked as paths in the schema."""

    def keys(section: Any, prefix: str = "") -> Iterator[str]:
        for entry in dataclasses.fields(section):
            if dataclasses.is_dataclass(value := getattr(section, entry.name)):
                yield from keys(value, f"{prefix}{entry.name}.")
            elif entry.metadata.get("is_path"):
                yield f"{prefix}{entry.name}"

    found = list(keys(Run()))
    assert {"data.wild_type", "downstream.tasks", "init_from", "run_dir", "task.label_file"} <= set(found)
    return found


def _trapped(source: Path, target: Path, trap: Path, first: int) -> Path:
    """A copy of a checkpoint whose configuration names places in `trap`, and trackers that write there.

    Args:
        first: Which of `FORMS` the first key has; the others follow in turn.
    """
    shutil.copytree(source, target)
    config = target / layout.CONFIG
    content = yaml.safe_load(config.read_text())
    for number, key in enumerate(_path_keys(), first):
        form = FORMS[number % len(FORMS)]
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section[name]
        value = form.format(trap=trap).replace("KEY", key)
        section[last] = [value] if isinstance(section[last], list) else value
    content["logging"] = {"tensorboard": True, "wandb": False, "wandb_project": f"{trap}/project"}
    content["data"]["workers"] = 2
    config.write_text(yaml.safe_dump(content))
    # As of an earlier version: what was changed has no digest.
    (target / "digests.json").unlink(missing_ok=True)
    (target / layout.COMPLETE).write_text("")
    return target


@pytest.mark.parametrize("first", [0, 2])
def test_no_command_writes_where_a_checkpoint_says(
    finished: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: int,
) -> None:
    trap, here = tmp_path / "trap", tmp_path / "here"
    trap.mkdir()
    here.mkdir()
    for name, value in {"TRAP": trap, "HOME": trap, "XDG_CACHE_HOME": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(here)
    checkpoint = _trapped(layout.step_dir(finished.run_dir, 4), here / "checkpoint", trap, first)
    write_fasta(here / "x.fasta", [("a", "MKTAYIAKQRQISFVKSH"), ("b", "MKLVINGKTLKGEITV")])
    before = sorted(path for path in here.rglob("*"))
    name = str(checkpoint)
    commands = [
        ["evaluate", name, "--data", "x.fasta", "--out", "e.json"],
        ["compare", name, name, "--data", "x.fasta", "--out", "c.json"],
        ["embed", name, "x.fasta", "--out", "e.h5"],
        ["score", name, "--sequence", "MKT", "--out", "s.csv"],
        ["inspect", name],
        ["convert", name, "converted", "--to", "hf"],
        ["convert", name, "copied", "--to", "esm2mega"],
    ]
    if first:
        commands.append(["finetune", f"init_from={name}", "run_dir=tuned", "task.kind=regression", *STEP])
        commands[-1].append("data.train=t.csv")
        (here / "t.csv").write_text("sequence,target\nMKTAY,1\nMKLVI,2\n")
        before.append(here / "t.csv")
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert list(trap.iterdir()) == []
    new = {path.relative_to(here).parts[0] for path in here.rglob("*") if path not in before}
    assert new <= {"e.json", "c.json", "e.h5", "s.csv", "converted", "copied", "tuned"}
    # What had to be prepared lies in the user's cache, or where this call says.
    assert [path.name for path in (tmp_path / "cache").rglob("train")] == ["train"]
    assert main([*commands[0][:-1], "e2.json", f"data.cache_dir={here / 'mine'}"]) == 0
    assert [path.name for path in (here / "mine").rglob("train")] == ["train"]
    assert json.loads((here / "e.json").read_text()) == json.loads((here / "e2.json").read_text())


def test_no_command_reads_what_a_checkpoint_names(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configuration leads to a store and a checkpoint that are there, and can be read."""
    monkeypatch.chdir(tmp_path)
    trap = shutil.copytree(finished.run_dir, tmp_path / "trap")
    for name, path in (("train", finished.train), ("valid", finished.valid)):
        shutil.copytree(path, trap / name)
    checkpoint = shutil.copytree(layout.step_dir(finished.run_dir, 4), tmp_path / "checkpoint")
    content = yaml.safe_load((checkpoint / layout.CONFIG).read_text())
    content["data"] |= {"train": [f"{trap}/train"], "valid": f"{trap}/valid"}
    content |= {"run_dir": str(trap), "init_from": str(trap)}
    (checkpoint / layout.CONFIG).write_text(yaml.safe_dump(content))
    (checkpoint / "digests.json").unlink()
    (checkpoint / layout.COMPLETE).write_text("")
    write_fasta(tmp_path / "x.fasta", [("a", "MKTAYIAKQRQISFVKSH"), ("b", "MKLVINGKTLKGEITV")])
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on and event in ("open", "os.listdir", "os.scandir"):
            name = arguments[0]
            opened.append("" if name is None or isinstance(name, int) else os.fsdecode(name))

    is_on = True
    sys.addaudithook(note)  # for the life of the process, so it is switched off behind
    try:
        for words in (
            ["evaluate", "checkpoint", "--data", "x.fasta", "--out", "e.json"],
            ["embed", "checkpoint", "x.fasta", "--out", "e.h5"],
            ["score", "checkpoint", "--sequence", "MKT", "--out", "s.csv"],
            ["inspect", "checkpoint"],
            ["convert", "checkpoint", "converted", "--to", "hf"],
            ["convert", "checkpoint", "copied", "--to", "esm2mega"],
        ):
            assert main(words) == 0, (words, capsys.readouterr().err)
    finally:
        is_on = False
    assert any(name.endswith("x.fasta") for name in opened), "the hook sees what is opened"
    assert [name for name in opened if name.startswith(str(trap))] == []


def test_the_base_of_adapters_is_the_one_path_that_is_read(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From where it was, from where the user says, and only with the weights that were trained on."""
    run_dir = tmp_path / "adapted"
    base = shutil.copytree(layout.step_dir(finished.run_dir, 4), tmp_path / "base")
    start = ["pretrain", *SETTINGS, *STEP, f"init_from={base}", f"run_dir={run_dir}"]
    assert main([*start, "lora.rank=2", f"data.train={finished.train}"]) == 0, capsys.readouterr().err
    score = ["score", str(run_dir), "--sequence", "MKT", "--out", str(tmp_path / "s.csv"), "--overwrite"]
    assert main(score) == 0
    before = (tmp_path / "s.csv").read_text()
    other = layout.step_dir(finished.run_dir, 2)
    assert main([*score, f"init_from={other}"]) == 2  # although the right one is still where it was
    assert "its adapters belong to other weights than those of" in capsys.readouterr().err
    assert main([*score, f"init_from={tmp_path / 'absent'}"]) == 2
    assert "absent does not exist; name the base of" in capsys.readouterr().err
    moved = base.rename(tmp_path / "moved")
    assert main(score) == 2
    assert "which is not there any more; say where it is with init_from=PATH" in capsys.readouterr().err
    assert main([*score, f"init_from={moved}"]) == 0
    assert (tmp_path / "s.csv").read_text() == before
    os.mkfifo(base)
    assert main(score) == 2
    assert f"the base of its adapters, {base}: is a stream" in capsys.readouterr().err
    base.unlink()
    shutil.copytree(other, base)
    assert main(score) == 2
    assert "its adapters belong to other weights" in capsys.readouterr().err
