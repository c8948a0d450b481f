"""FLIP's shipped configurations: on cuts of the published files by the commands of docs/finetuning.md, and on
small files in the published layout.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from esm2mega.cli.app import main
from esm2mega.data.benchmarks.names import FLIP_TASKS
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


LOCATIONS = [
    *("Cytoplasm", "Nucleus", "Cell_membrane", "Mitochondrion", "Endoplasmic_reticulum", "Lysosome/Vacuole"),
    *("Golgi_apparatus", "Peroxisome", "Extracellular", "Plastid"),
]
CLASSES: dict[str, Sequence[str]] = {
    "scl": LOCATIONS,
    "sav": ["neutral", "effect"],
    "bind": "0123456",
    "conservation": "123456789",
}
"""The classes of the training split."""


def write_small(folder: Path, task: str) -> None:
    """Forty proteins in the files and headers that FLIP publishes: 24 train, 8 validate, 8 test."""
    rng = np.random.default_rng(3)
    published = FLIP_TASKS[task]
    stem = published.files.get(published.default, published.default)
    sequences, labels, targets = [], [], []
    for number in range(40):
        residues = "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), int(rng.integers(12, 40))))
        marks = f"SET={'test' if number >= 32 else 'train'} VALIDATION={24 <= number < 32}"
        sequences.append(f">Sequence{number}\n{residues}\n")
        if published.per_residue:
            of_residues = list(CLASSES[task]) + rng.choice(list(CLASSES[task]), len(residues)).tolist()
            if task == "bind" and number >= 38:
                of_residues[number - 38] = "7"
            labels.append(f">Sequence{number} {marks}\n{''.join(of_residues[: len(residues)])}\n")
        else:
            value = (
                CLASSES[task][number % len(CLASSES[task])] if task in CLASSES else f"{rng.normal(40, 9):.6f}"
            )
            targets.append(f">Sequence{number} TARGET={value} {marks}\n{residues}\n")
    folder.mkdir(parents=True)
    (folder / f"{stem}.fasta").write_text("".join(labels or targets))
    if labels:
        (folder / "sequences.fasta").write_text("".join(sequences) + ">unlabelled\nMKT\n")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("encoder")
    pairs = [("MKT", 1.0), ("LA", 2.0)]
    return train_model(
        [*SETTINGS, f"run_dir={run_dir}", "task.kind=regression", "train.max_steps=1"], pairs
    ).checkpoint


@pytest.mark.parametrize("task", [x for x in FLIP_TASKS if x not in ("gb1", "secondary_structure")])
def test_shipped_configuration_on_the_published_layout(
    tmp_path: Path,
    encoder: Path,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tasks whose files are not at hand: prepared, trained, scored; size and steps alone are changed."""
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path / "FLIP" / task, task)
    out = f"flip/{task}"
    assert (
        main(["prepare", "flip", task, "--source", f"FLIP/{task}", "--out", out, "--allow-other-sizes"]) == 0
    )
    steps = [*SMALL, "train.eval_every=3"]
    assert main(["finetune", "--config", f"flip_{task}", f"init_from={encoder}", *steps]) == 0
    said = capsys.readouterr().err
    lines = (tmp_path / f"runs/flip_{task}/log.jsonl").read_text().splitlines()
    test = json.loads(lines[-1])
    kind = FLIP_TASKS[task].kind
    measures = {"test_loss", "test_spearman" if kind == "regression" else "test_accuracy"}
    assert (test["kind"], test["step"]) == ("test", 3) and measures <= test.keys()
    if task != "bind":
        assert "test_unseen_classes" not in test and "as wrong" not in said
        return
    assert "data     data.train has no label of the class '7' in column 'target'" in said
    note = "2 labels are of the class '7' in data.test in column 'target', first at flip/bind/test.csv:8; t"
    assert note in said
    assert test["test_unseen_classes"] == {"7": 2}
    result = f"runs/flip_{task}/test.json"
    assert (
        main(
            [
                "evaluate",
                f"runs/flip_{task}",
                "--data",
                f"{out}/test.csv",
                "--out",
                result,
                "task.bootstrap=0",
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / result).read_text())
    right = [
        known == given != "7"
        for protein in found["predictions"]
        for known, given in zip(protein["label"], protein["prediction"], strict=True)
    ]
    assert found["accuracy"] == test["test_accuracy"] == pytest.approx(np.mean(right), rel=1e-15)
    assert found["unseen_classes"] == {"7": 2} and len(right) == found["num_labels"]
