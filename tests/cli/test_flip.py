"""The FLIP commands of docs/finetuning.md, as printed, on small cuts of the published files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.finetune.api import train_model
from tests.unit.runs import SETTINGS

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "flip"
SMALL = (
    "train.max_epochs=null",
    "train.max_steps=3",
    "train.micro_batch_tokens=2048",
    "train.global_batch_tokens=2048",
    "train.eval_every=0",
    "schedule.warmup_steps=1",
)


def commands() -> list[list[str]]:
    """Words behind `esm2mega` of the commands under the heading FLIP."""
    section = (ROOT / "docs/finetuning.md").read_text().partition("\n## FLIP\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert all(words[0] == "esm2mega" for words in lines)
    return [words[1:] for words in lines]


def write_cut(folder: Path, task: str, names: list[str], chosen: range, longest: int) -> None:
    """Some records of each file, the same ones of all."""
    (folder / task).mkdir(parents=True)
    for name in names:
        lines = (REAL / task / f"{name}.fasta").read_text().splitlines()
        cut = [(lines[2 * i], lines[2 * i + 1]) for i in chosen if len(lines[2 * i + 1]) <= longest]
        (folder / task / f"{name}.fasta").write_text("".join(f"{a}\n{b}\n" for a, b in cut))


@pytest.mark.skipif(
    not REAL.is_dir(), reason="FLIP's files are not beside the repository (../shared/data/flip)"
)
def test_commands_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what the page says, with fewer steps and other sizes; metrics stand beside the baseline."""
    monkeypatch.chdir(tmp_path)
    write_cut(tmp_path / "FLIP", "gb1", ["sampled"], range(0, 8000, 60), 300)
    files = ["sequences", "sampled", "mask"]
    write_cut(tmp_path / "FLIP", "secondary_structure", files, range(0, 11156, 30), 100)
    train_model([*SETTINGS, "run_dir=runs/mine", "task.kind=regression", "train.max_steps=1"], [("MKT", 1.0)])
    printed = commands()
    assert [words[:2] for words in printed[::3]] == [["prepare", "flip"]] * 2
    for words in printed:
        extra = {"prepare": ["--allow-other-sizes"], "finetune": SMALL, "evaluate": ["task.bootstrap=0"]}
        assert main([*words, *extra[words[0]]]) == 0, words
    test = json.loads((tmp_path / "runs/flip_gb1/test.json").read_text())
    assert {"spearman", "rmse", "baseline_rmse"} <= test.keys()
    records = [
        json.loads(line)
        for line in (tmp_path / "runs/flip_secondary_structure/log.jsonl").read_text().splitlines()
    ]
    assert {"test_accuracy", "test_accuracy_per_protein", "test_baseline_accuracy"} <= records[-1].keys()
    # The shape is that of init_from, though the configuration begins with `base`.
    for run in ("gb1", "secondary_structure"):
        text = (tmp_path / f"runs/flip_{run}/config.yaml").read_text()
        assert "hidden_size: 24" in text and "max_steps: 3" in text
