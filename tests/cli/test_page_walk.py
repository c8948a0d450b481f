"""The commands that the pages print are run, in their order, on small files of the names that they have."""

from __future__ import annotations

import csv
import gzip
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.cli.app import main
from esm2mega.model.kernels.int8 import int8_defect
from tests.cli.pages import COMMANDS, README, ROOT, TEXT, Command, blocks, name_of
from tests.flip_files import LETTERS, write_gb1, write_secondary_structure
from tests.infer_models import write_fasta
from tests.proteingym_files import write_assays

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")

SHAPE = (
    *("model.size=null", "model.num_layers=4", "model.hidden_size=24", "model.num_attention_heads=3"),
    *("model.ffn_hidden_size=96", "model.precision=fp32"),
)
BATCH = (
    *("data.max_seq_length=64", "train.micro_batch_tokens=256", "train.global_batch_tokens=512"),
    *("schedule.warmup_steps=0", "train.max_steps=1", "train.eval_batches=1"),
)
STEP = (*BATCH, "train.eval_every=1")

BEHIND: dict[str, tuple[str, ...]] = {
    "downstream.tasks": (*SHAPE, *STEP, "run_dir=runs/measured"),
    "pretrain --config pretrain_esm2_tiny run_dir=runs/adapted": (*SHAPE, *STEP),
    "global_batch_size": (*SHAPE, "--fast-dev-run", "data.max_seq_length=64"),
    "pretrain": (*SHAPE, *BATCH, "--fast-dev-run"),
    "data.split": (*STEP, "run_dir=runs/variants"),
    "esm2mega finetune": STEP,
    "--val-size 1000": ("--val-size", "5"),
    "prepare flip": ("--allow-other-sizes",),
    "watch": ("--once",),
}
"""Maps parts of commands to what is added to them here; the first that fits counts."""

INSTEAD = {"@step_200": "@step_1", "@step_400": "@step_2", "esm2_650M ": "published "}
"""Maps parts of commands to what stands in their place here."""

PUBLISHED = "contacts"
"""In commands with this word a model from elsewhere stands for `runs/mine`, which has no contact head."""

ELSEWHERE = {
    "torchrun": "tests/cli/test_readme.py",
    "esm2mega autoeval": "tests/cli/test_readme.py",
    "esm2mega doctor": "tests/unit/doctor/test_run.py",
    "esm2mega drill": "tests/distributed/test_drill.py",
    "esm2mega plan": "tests/unit/plan/test_command.py",
    "esm2mega benchmark": "tests/unit/benchmark/test_command.py",
    "plot runs/mine --results": "tests/unit/autoeval/test_of_run.py",
    "runs/length": "tests/unit/finetune/classes",
    "--config infer": "tests/unit/infer/test_embed.py",
    "tape/secondary_structure": "tests/cli/test_migrate_bionemo1.py",
    "--config tape_secondary_structure": "tests/cli/test_migrate_bionemo1.py",
    "deeploc2": "tests/cli/test_benchmark_examples.py",
    "prepare uniref": "tests/unit/data/uniref",
    "docs/migrate": "tests/cli",  # each page has a script with its commands, and a test of it
}
"""Maps commands that are not run here, or the pages that have them, to what tests them."""


def place_of(page: Path, command: Command) -> str | None:
    """Where a command is tested that is not run here."""
    named = f"{page.relative_to(ROOT)}: {command.line}"
    return next((tested for part, tested in ELSEWHERE.items() if part in named), None)


WALKED: dict[Path, list[Command]] = {}
for page, command in COMMANDS:
    if page != README and "esm2mega" in command.words[:1] and place_of(page, command) is None:
        WALKED.setdefault(page, []).append(command)


def test_what_is_not_run_here_is_tested_elsewhere() -> None:
    for part, tested in ELSEWHERE.items():
        assert (ROOT / tested).exists(), f"{part}: {tested}"
    assert sum(map(len, WALKED.values())) > 60


def rows(path: str, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and runs that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _write_inputs()
        store = ["prepare", "fasta", "my_proteins.fasta", "--valid-size", "12", "--workers", "1", "--out"]
        assert main([*store, "my_store"]) == 0
        train = ["pretrain", *SHAPE, *BATCH, "data.train=my_store/train", "data.valid=my_store/valid"]
        train += ["train.max_steps=2", "train.eval_every=1", "checkpoint.save_every=1", "run_dir=runs/mine"]
        assert main(train) == 0
        tune = ["finetune", *STEP, "init_from=runs/mine", "task.kind=regression", "data.train=train.csv"]
        tune += ["task.target_columns=[fitness]", "data.valid=valid.csv"]
        for seed in (1, 2, 3):
            assert main([*tune, f"run_dir=runs/seed{seed}", f"seed={seed}"]) == 0
        classes = ["task.kind=classification", "task.head=hf", "data.train=classes.csv"]
        classes += ["run_dir=runs/classes", "train.eval_every=0"]
        assert main(["finetune", *BATCH, "init_from=runs/mine", *classes]) == 0
        for run, name in (("classes", "my_hf_classifier"), ("mine", "published")):
            assert main(["convert", f"runs/{run}", name, "--to", "hf"]) == 0
        file = Path("published/model.safetensors")
        state = load_file(file)
        for name in (name for name in state if "contact_head" in name):
            state[name] = torch.randn_like(state[name])
        save_file(state, file, {"format": "pt"})
    for copy in ("DIR", "family_store"):
        shutil.copytree(folder / "my_store", folder / copy)
    for run in ("a", "b", *(f"{side}{number}" for side in "ab" for number in (1, 2, 3))):
        shutil.copytree(folder / "runs/mine", folder / "runs" / run)
    shutil.copytree(folder / "runs/seed1", folder / "runs/fitness")
    return folder


def _write_inputs() -> None:
    rng = np.random.default_rng(7)
    proteins = [
        (f"p{n}", "".join(rng.choice(list(LETTERS), size))) for n, size in enumerate(rng.integers(12, 50, 60))
    ]
    few = ("proteome", "new_proteins", "proteins", "my_labelled", "held_out")
    for name, part in (
        ("my_proteins", proteins),
        *((name, proteins[:12]) for name in few),
        ("designs", proteins[:4]),
        ("train", proteins[:40]),
    ):
        write_fasta(Path(f"{name}.fasta"), part)
    Path("train.fasta.gz").write_bytes(gzip.compress(Path("train.fasta").read_bytes()))
    # Of other proteins than the FASTA files, so that no splits share any.
    others = ["".join(rng.choice(list(LETTERS), size)) for size in rng.integers(12, 50, 60)]
    for name, part in (("train", others[:24]), ("valid", others[24:44]), ("test", others[44:])):
        rows(f"{name}.csv", ("sequence", "fitness"), [(s, s.count("L") + 0.5) for s in part])
    rows("classes.csv", ("sequence", "target"), [(s, "ab"[len(s) % 2]) for s in others[:24]])
    rows("my_proteins.csv", ("id", "sequence"), proteins)
    parts = ("train", "train", "valid", "test")
    labels = [(n, "xy"[k % 2], len(s) / 10, parts[k % 4], s) for k, (n, s) in enumerate(proteins)]
    header = ("id", "family", "fitness", "split", "sequence")
    rows("labels.csv", header, labels[:12])
    rows("measured.csv", ("aa",), [(s,) for _, s in proteins])
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install esm2mega[parquet]")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"aa": others[:9]}), "more.parquet")
    wild = "MKTAYIAKQRQISFVKSHFSRQ"
    for name in ("wild_type", "wt"):
        write_fasta(Path(f"{name}.fasta"), [("w", wild)])
    changes = [(f"{letter}{at}W", at % 5 + 0.5) for at, letter in enumerate(wild, 1)]
    rows("variants.csv", ("mutant", "fitness"), changes)
    rows("indels.csv", ("mutated_sequence",), [(wild[:1] + wild[2:],), (wild[:3] + "WW" + wild[3:],)])
    book = openpyxl.Workbook()
    for row in (("mutant", "target"), *changes):
        book.active.append(row)
    book.save("measured.xlsx")
    write_gb1(Path("FLIP/gb1"))
    write_gb1(Path("FLIP/gb1-sampled"), "sampled")
    shutil.move("FLIP/gb1-sampled/sampled.fasta", "FLIP/gb1/sampled.fasta")
    write_secondary_structure(Path("FLIP/secondary_structure"))
    table = "".join(f"{mutant},{score}\n" for mutant, score in (("mutant", "DMS_score"), *changes))
    assays = Path("DMS_ProteinGym_substitutions")
    write_assays(Path("DMS_substitutions.csv"), assays, {"a": (wild, table)})
    (code,) = (
        text for text in blocks(TEXT[ROOT / "docs/finetuning.md"], "python") if "class MeanHead" in text
    )
    Path("my_code.py").write_text(code)


@pytest.mark.slow
@pytest.mark.parametrize("page", WALKED, ids=name_of)
def test_commands_of_a_page_run(
    page: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    if page.name == "benchmarks.md":
        flip = ["prepare", "flip", "secondary_structure", "--source", "FLIP/secondary_structure", "--out"]
        assert main([*flip, "data/flip/secondary_structure", "--allow-other-sizes"]) == 0
    made: set[str] = set()
    for command in WALKED[page]:
        line = command.line
        for part, other in INSTEAD.items():
            line = line.replace(part, other)
        if PUBLISHED in line:
            line = line.replace("runs/mine", "published")
        if "--precision int8" in line and int8_defect() is not None:
            continue
        if "--to onnx" in line and find_spec("onnxscript") is None:
            continue
        more = next((words for part, words in BEHIND.items() if part in line), ())
        if "finetune" in line and not any(part in line for part in ("data.valid", "--config", "data.split")):
            more = (*more, "train.eval_every=0")
        words = [*Command(line).words[1:], *more]
        outs = [words[words.index("--out") + 1]] if "--out" in words else []
        outs += [word.partition("=")[2] for word in words if word.startswith("run_dir=")]
        for out in {*outs} - made:
            shutil.rmtree(out, ignore_errors=True)  # it is there for other pages
        made.update(outs)
        code = main(words)
        assert code == 0, f"{name_of(page)}: esm2mega {' '.join(words)}\n{capfd.readouterr().err[-2000:]}"
