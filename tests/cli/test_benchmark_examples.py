"""`examples/benchmarks` with `--quick`, on small data in the layouts in which benchmarks are published."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm2mega.data.benchmarks.deeploc2 import LOCATIONS
from esm2mega.data.benchmarks.names import TAPE_TASKS
from tests.cli.scripts import run, warm_python
from tests.flip_files import write_gb1, write_secondary_structure
from tests.infer_models import make_reference, random_proteins

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed: pip install esm2mega[tape]")

RNG = np.random.default_rng(7)


def write_flip(folder: Path) -> None:
    write_gb1(folder / "gb1")
    write_secondary_structure(folder / "secondary_structure")


def write_tape(folder: Path) -> None:
    for name in ("stability", "remote_homology"):
        task = TAPE_TASKS[name]
        (folder / task.folder).mkdir(parents=True)
        for split in task.splits:
            path = str(folder / task.folder / f"{task.folder}_{split}.lmdb")
            with (
                lmdb.open(path, map_size=1 << 20) as environment,
                environment.begin(write=True) as transaction,
            ):
                sequences = random_proteins(RNG.integers(12, 30, 16).tolist(), seed=len(split))
                for number, sequence in enumerate(sequences):
                    label: Any = number % 2 if name == "remote_homology" else np.array([RNG.normal()])
                    record = {"primary": sequence, "id": f"{split}{number}", task.field: label}
                    transaction.put(str(number).encode(), pickle.dumps(record))
                transaction.put(b"num_examples", pickle.dumps(len(sequences)))


def write_deeploc2(folder: Path) -> None:
    folder.mkdir()
    columns = ["", "ACC", "Kingdom", "Partition", "Membrane", *LOCATIONS, "Sequence"]
    with (folder / "Swissprot_Train_Validation_dataset.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for number, sequence in enumerate(random_proteins([100] * 40)):
            flags = RNG.integers(0, 2, 11).astype(float).tolist()
            table.writerow([number, f"P{number}", "Metazoa", number % 5, *flags, sequence])


def write_proteingym(folder: Path) -> None:
    """Four assays of two classes of function, of which three are scored."""
    (folder / "DMS_ProteinGym_substitutions").mkdir(parents=True)
    lines = ["DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\n"]
    for number, wild in enumerate(random_proteins([12] * 4)):
        lines.append(f"A{number},A{number}.csv,P{number % 3},{wild},{('Binding', 'Stability')[number % 2]}\n")
        rows = [
            f"{old}{i}{'A' if old != 'A' else 'G'},x,{RNG.normal()}\n" for i, old in enumerate(wild, start=1)
        ]
        table = folder / "DMS_ProteinGym_substitutions" / f"A{number}.csv"
        table.write_text("mutant,mutated_sequence,DMS_score\n" + "".join(rows))
    (folder / "DMS_substitutions.csv").write_text("".join(lines))


WRITERS = {
    "flip": (write_flip, ["flip/gb1:two_vs_rest", "flip/secondary_structure:sampled"]),
    "tape": (write_tape, ["tape/stability:test", "tape/remote_homology:test_fold_holdout"]),
    "deeploc2": (write_deeploc2, ["deeploc2:locations", "deeploc2:membrane"]),
    "proteingym": (write_proteingym, ["proteingym"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    make_reference(folder)
    with warm_python(folder):
        yield folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flip", "tape", "deeploc2", "proteingym"])
def test_a_benchmark_in_its_quick_form(name: str, model: Path, tmp_path: Path) -> None:
    """A second start finds everything done."""
    write, tasks = WRITERS[name]
    write(tmp_path / name)
    done = run(f"benchmarks/{name}.sh", "--quick", cwd=tmp_path, MODEL=str(model))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "benchmarks" / name
    path = (folder / "results" if name == "proteingym" else folder) / "results.json"
    found = json.loads(path.read_text())
    assert [task["task"] for task in found["tasks"]] == tasks
    for task in found["tasks"]:
        kinds = [row["row"] for row in task["rows"]]
        assert kinds.count("model") == 1 and "baseline" in kinds
        assert all(-1 <= row["value"] <= 1 for row in task["rows"] if row["row"] == "model" and row["value"])
        assert task["limited"] is None or set(task["limited"].values()) == {500, 200}
    if name == "proteingym":
        (summary,) = path.parent.glob("work/**/summary.csv")
        assert [row["DMS_id"] for row in csv.DictReader(summary.open())] == ["A0", "A1", "A2"]
        again = run(f"benchmarks/{name}.sh", "--quick", cwd=tmp_path, MODEL=str(model))
        assert again.returncode == 0, again.stderr
        assert json.loads(path.read_text()) == found
