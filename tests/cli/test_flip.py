"""FLIP's shipped configurations on published files, whole and in cuts, and on small ones of that layout."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
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


NEEDS_FILES = pytest.mark.skipif(
    not REAL.is_dir(), reason="FLIP's files are not beside the repository (../shared/data/flip)"
)


@NEEDS_FILES
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


def records(path: Path) -> list[tuple[str, str, str]]:
    """Id, header and body of each record of a published file."""
    lines = path.read_text().splitlines()
    return [(head[1:].split()[0], head, body) for head, body in zip(lines[::2], lines[1::2], strict=True)]


def baseline_of_gb1() -> dict[str, float]:
    """The error of the mean of training on the test split, from the file alone."""
    values: dict[str, list[float]] = {"train": [], "valid": [], "test": []}
    for _, head, _ in records(REAL / "gb1/two_vs_rest.fasta"):
        split = "test" if "SET=test" in head else "valid" if "VALIDATION=True" in head else "train"
        values[split].append(float(re.search(r"TARGET=(\S+)", head)[1]))  # type: ignore[index]
    errors = np.array(values["test"]) - np.mean(values["train"])
    return {"test_baseline_rmse": float(np.sqrt((errors**2).mean()))}


def baseline_of_secondary_structure() -> dict[str, float]:
    """The share of the most frequent state of training among the test residues that count."""
    masks = {name: body for name, _, body in records(REAL / "secondary_structure/mask.fasta")}
    counts = {"train": Counter[str](), "valid": Counter[str](), "test": Counter[str]()}
    for name, head, body in records(REAL / "secondary_structure/sampled.fasta"):
        split = "test" if "SET=test" in head else "valid" if "VALIDATION=True" in head else "train"
        counts[split].update(state for state, mark in zip(body, masks[name], strict=True) if mark == "1")
    ((commonest, _),) = counts["train"].most_common(1)
    return {"test_baseline_accuracy": counts["test"][commonest] / counts["test"].total()}


@NEEDS_FILES
@pytest.mark.parametrize(
    ("task", "baseline"),
    [("gb1", baseline_of_gb1), ("secondary_structure", baseline_of_secondary_structure)],
)
def test_shipped_configuration_on_the_published_files(
    tmp_path: Path,
    task: str,
    baseline: Callable[[], dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every protein of them, with the smallest of models and one step."""
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "flip", task, "--source", str(REAL / task), "--out", f"flip/{task}"]) == 0
    shape = [
        "num_layers=1",
        "hidden_size=8",
        "num_attention_heads=2",
        "ffn_hidden_size=8",
        "layer_spec=local",
    ]
    steps = ["train.max_epochs=null", "train.max_steps=1", "train.eval_every=0", "train.eval_batches=1"]
    settings = [f"model.{setting}" for setting in shape] + steps + ["schedule.warmup_steps=0"]
    assert main(["finetune", "--config", f"flip_{task}", *settings]) == 0
    said = capsys.readouterr().err
    sizes = FLIP_TASKS[task].splits[FLIP_TASKS[task].default]
    assert f"train: {sizes.train} proteins" in said and f"test: {sizes.test} proteins" in said
    assert "nothing to learn" not in said and "as wrong" not in said
    test = json.loads((tmp_path / f"runs/flip_{task}/log.jsonl").read_text().splitlines()[-1])
    for name, value in baseline().items():
        assert test[name] == pytest.approx(value, rel=1e-12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("encoder")
    pairs = [("MKT", 1.0), ("LA", 2.0)]
    return train_model(
        [*SETTINGS, f"run_dir={run_dir}", "task.kind=regression", "train.max_steps=1"], pairs
    ).checkpoint


@pytest.mark.some(3)
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
