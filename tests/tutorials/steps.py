"""Reads what a tutorial asks its reader to do, in order: commands, programs, and files to save."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.cli.pages import TUTORIALS as TUTORIALS
from tests.cli.pages import commands

ELSEWHERE = {
    "--nproc-per-node 8": None,  # needs GPUs
    "sbatch --nodes 2 examples/slurm/pretrain.sbatch": "tests/cli/test_slurm_examples.py",
}
"""Parts of commands that are not run here, and the test that runs them, if any can."""


@dataclass(frozen=True)
class Step:
    """Something to do: a ``bash`` command on one line, a ``python`` program, or the text of ``mine.yaml``."""

    language: str
    text: str

    @property
    def words(self) -> list[str]:
        """What is executed."""
        return ["bash", "-c", self.text] if self.language == "bash" else ["python", "-c", self.text]

    @property
    def is_elsewhere(self) -> bool:
        return any(part in self.text for part in ELSEWHERE)


def steps(page: Path) -> list[Step]:
    """The steps of a page, in its order."""
    found = []
    for block in re.finditer(r"^```(bash|python|yaml)\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if block[1] == "bash":
            found += [Step("bash", command.line) for command in commands(block[0])]
        else:
            found.append(Step(block[1], block[0].removeprefix(f"```{block[1]}\n").removesuffix("```")))
    return found


def do(step: Step, folder: Path) -> bool:
    """Save the file of a step, if it is one."""
    if step.language == "yaml":
        (folder / "mine.yaml").write_text(step.text)
    return step.language == "yaml"
