"""The commands that are killed, what each of them writes, and how two results are compared."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esm2mega.checkpoint.layout import find_checkpoints, step_of
from esm2mega.config.keys import known_keys
from esm2mega.drill.compare import Remains, differences, unaccounted
from esm2mega.errors import UserError
from tests.distributed.runs import SETTINGS, write_fasta
from tests.proteingym_files import write_assays
from tests.ranks import run_ranks

ASYNC = "checkpoint.async_save"

# Small enough for a start of a tenth of a second, and several checkpoints and an evaluation on the way.
_TRAINING = (
    *SETTINGS,
    "model.num_layers=2",
    "train.global_batch_tokens=1024",
    "train.max_steps=12",
    "train.eval_every=6",
    "train.eval_batches=2",
    "checkpoint.save_every=2",
    "checkpoint.keep_last=3",
    "logging.samples=true",
)
_SHORT = ("train.max_steps=1", "train.eval_every=0")
_LAYOUTS = {
    "1": (1, ()),
    "2": (2, ("parallel.distributed_optimizer=true",)),
    "4": (
        4,
        (
            "parallel.tensor_model_parallel_size=2",
            "parallel.pipeline_model_parallel_size=2",
            "train.global_batch_tokens=512",
        ),
    ),
    "cp": (2, ("parallel.context_parallel_size=2",)),
}

_RESUMED = re.compile(r"^run {6}.*?(?:resumed from step_(\d+).*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        name: Its name in the journal.
        words: Words of the command that writes into the folder; the same for every start.
        processes: Number of ranks.
        is_training: Whether the folder is that of a run, with a log and checkpoints.
        result: Name in the folder, of commands that refuse to replace what they have made: when it is there,
            the command was killed at its very end, and the next start has to say so.
        program: What Python runs with these words.
    """

    name: str
    words: Callable[[Path], Sequence[str]]
    processes: int = 1
    is_training: bool = False
    result: str | None = None
    program: Sequence[str] = ("-m", "esm2mega")

    def is_done(self, folder: Path) -> bool:
        return self.result is not None and (folder / self.result).exists()

    def newest_step(self, folder: Path) -> int:
        """The step from which the next start has to go on; 0 for the beginning."""
        complete = find_checkpoints(folder)[0] if self.is_training else []
        return step_of(complete[-1]) if complete else 0

    def compare(self, expected: Path, actual: Path) -> Iterator[str]:
        """Say what in `actual` is not the same bit by bit, or should not be there."""
        if self.is_training:
            try:
                yield from differences(Remains(expected), Remains(actual))
                yield from unaccounted(Remains(actual))
            except UserError as error:
                yield str(error)
        mine, theirs = (_files(folder) for folder in (actual, expected))
        for name in sorted(mine | theirs):
            # A start without a checkpoint keeps the log of an earlier one.
            if name not in theirs and not (self.is_training and re.fullmatch(r"log\.jsonl\.\d+", name)):
                yield f"{name} is left over"
            elif name not in mine:
                yield f"{name} is missing"
            elif not self.is_training and mine[name].read_bytes() != theirs[name].read_bytes():
                yield f"{name} is another file"


def resumed_step(output: str) -> int | None:
    """The step from which a start said that it goes on; 0 for the beginning, None if it said nothing."""
    found = _RESUMED.search(output)
    return None if found is None else int(found[1] or 0)


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}


def make_inputs(folder: Path) -> list[Case]:
    """Make what the commands read, unless it is there, and return the cases."""
    fasta, store, table = folder / "proteins.fasta", folder / "store", folder / "table.csv"
    model, tuned, adapted, assays = (folder / name for name in ("model", "tuned", "adapted", "assays"))
    adapters = [f"init_from={model}", "finetune.mode=lora", "lora.rank=2"]
    labelled = [f"data.train={table}", "task.kind=regression", "task.target_columns=[value]"]
    if not (folder / "made-2").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_fasta(fasta)
        _write_table(table)
        _write_assays(assays)
        for words in (
            ["prepare", "fasta", str(fasta), "--out", str(store), "--valid-size", "12"],
            ["pretrain", *_TRAINING, f"run_dir={model}", f"data.train={store}/train", *_SHORT],
            ["finetune", *_TRAINING, f"run_dir={tuned}", *labelled, *_SHORT],
            ["finetune", *_TRAINING, f"run_dir={adapted}", *labelled, *adapters, *_SHORT],
        ):
            run_ranks(["-m", "esm2mega", "-v", *words], 1, folder / "output")
        (folder / "made-2").touch()
    cases = []
    for name, (processes, layout) in _LAYOUTS.items():
        for mode in ("sync", "async"):
            # Saving in the background is an option of later versions.
            if mode == "async" and ASYNC not in known_keys():
                continue
            settings = [*_TRAINING, *layout, *([f"{ASYNC}=true"] if mode == "async" else [])]
            settings += [f"data.train={store}/train", f"data.valid={store}/valid"]
            cases.append(_training(f"pretrain-{name}-{mode}", "pretrain", settings, processes))
    tuning = [*_TRAINING, *labelled, f"data.valid={table}.valid.csv"]
    cases.append(_training("finetune", "finetune", tuning, 1))
    cases.append(_training("finetune-lora-2", "finetune", [*tuning, *adapters, f"{ASYNC}=true"], 2))

    def embed(folder: Path) -> list[str]:
        out = ["--out", str(folder / "x.h5"), "--resume", "--pack-tokens", "512"]
        return ["embed", str(model), str(fasta), *out, "--max-seq-length", "300", "--too-long", "chunk"]

    def embed_in_pieces(folder: Path) -> list[str]:
        out = ["--out", str(folder / "x.npz"), "--resume", "--include", "pooled", "--pooling", "cls"]
        return ["embed", str(model), str(fasta), *out, "--max-seq-length", "300", "--too-long", "crop"]

    def score(folder: Path) -> list[str]:
        out = ["--out", str(folder / "gym"), "--resume"]
        return ["score", str(model), "--proteingym", str(assays / "gym.csv"), "--assays", str(assays), *out]

    def export(folder: Path) -> list[str]:
        return ["lora", "export", str(adapted), "--out", str(folder / "peft")]

    def predict(folder: Path) -> list[str]:
        out = ["--out", str(folder / "x.csv"), "--resume", "--too-long", "crop"]
        return ["predict", str(tuned), str(fasta), *out]

    def prepare(folder: Path) -> list[str]:
        return ["prepare", "fasta", str(fasta), "--out", str(folder / "data"), "--valid-size", "12"]

    def convert(folder: Path) -> list[str]:
        return ["convert", str(model), str(folder / "hf"), "--to", "hf"]

    return [
        *cases,
        Case("embed", embed),
        Case("embed-2", embed_in_pieces, 2),
        Case("score", score),
        Case("predict", predict),
        Case("prepare", prepare, result="data"),
        Case("convert", convert, result="hf"),
        Case("lora-export", export, result="peft"),
    ]


def _training(name: str, command: str, settings: Sequence[str], processes: int) -> Case:
    return Case(name, lambda folder: [command, *settings, f"run_dir={folder}"], processes, is_training=True)


def _write_table(path: Path) -> None:
    """Proteins with a number each, and other ones beside them for validation."""
    rng = np.random.default_rng(3)
    letters = list("LAGVSERTIDPKQNFYMHWC")
    for file, count in ((path, 60), (Path(f"{path}.valid.csv"), 12)):
        rows = ["".join(rng.choice(letters, size=int(rng.integers(20, 120)))) for _ in range(count)]
        lines = [f"{row},{row.count('L') + 0.5}" for row in rows]
        file.write_text("\n".join(["sequence,value", *lines]) + "\n")


def _write_assays(folder: Path) -> None:
    """Write three assays of a protein, each of every third residue."""
    protein = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    tables = {}
    for shift, name in enumerate("abc"):
        variants = [f"{letter}{at}W,{at % 5}" for at, letter in enumerate(protein, 1) if at % 3 == shift]
        tables[name] = (protein, "\n".join(["mutant,DMS_score", *variants]) + "\n")
    write_assays(folder / "gym.csv", folder, tables)
