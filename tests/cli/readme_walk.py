"""The README's recipes as commands that take seconds, with the files that they begin with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np

from esm2mega.vocabulary import VOCAB
from tests.cli.pages import Command, walk
from tests.flip_files import write_gb1, write_secondary_structure

# Appended to the README's training commands, which are otherwise taken word by word.
SMALL = (
    "data.max_seq_length=64",
    "train.micro_batch_tokens=256",
    "train.global_batch_tokens=512",
    "train.eval_every=1",
    "train.eval_batches=4",
    "train.log_every=1",
    "schedule.warmup_steps=0",
)
STEPS_PER_START = 2


def reduced() -> list[tuple[Command, str]]:
    """Each command of the walk, and the line that is run in its place."""
    lines, starts = [], 0
    for command in walk():
        line = command.line
        if "pretrain" in command.words:
            starts += 1
            line += f" {shlex.join(SMALL)} train.max_steps={starts * STEPS_PER_START}"
        elif "finetune" in command.words:
            line += f" {shlex.join(SMALL)} train.max_steps={STEPS_PER_START}"
            if "data.valid=valid.csv" not in command.words:
                line += " train.eval_every=0"
        lines.append((command, line))
    return lines


def write_inputs(folder: Path) -> None:
    """Short random proteins, more than the README holds out, and tables of labelled ones, under its names."""
    _write_fasta(folder / "my_proteins.fasta")
    _write_labels(folder)
    write_gb1(folder / "flip" / "gb1")
    write_secondary_structure(folder / "flip" / "secondary_structure")


def _write_fasta(path: Path, count: int = 430) -> None:
    rng = np.random.default_rng(5)
    letters = np.frombuffer("".join(VOCAB[4:24]).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        for number, length in enumerate(rng.integers(8, 40, count)):
            file.write(b">p%d\n%s\n" % (number, rng.choice(letters, size=length).tobytes()))


def _write_labels(folder: Path) -> None:
    records = (folder / "my_proteins.fasta").read_text().split()
    sequences = records[1:61:2]
    rows = [f"{sequence},{len(sequence) / 100}" for sequence in sequences]
    for name, part in (("train.csv", rows[:24]), ("valid.csv", rows[24:])):
        (folder / name).write_text("\n".join(["sequence,fitness", *part]) + "\n")
    (folder / "new_proteins.fasta").write_text("\n".join(records[:20]) + "\n")


def path_with_commands(folder: Path, python: Path) -> str:
    """A search path on which `esm2mega` and `torchrun` are those of this interpreter and this checkout."""
    for name, module in (("esm2mega", "esm2mega"), ("torchrun", "torch.distributed.run")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} -m {module} "$@"\n')
        script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
