"""Evaluates one model on one task in one mode with one seed, by the commands that a user would type.

Each unit has a folder of its own. What the commands leave there is read back; a unit that was finished is not
done again, and one that was interrupted goes on where its commands go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm2mega.autoeval.contacts import counts_of_maps
from esm2mega.autoeval.eval_model import EvalModel
from esm2mega.autoeval.places import Places
from esm2mega.autoeval.prediction_table import ID
from esm2mega.autoeval.probe.labels import SPLITS, TEST, TRAIN, VALID
from esm2mega.autoeval.probe.run import PREDICTIONS, RESULTS
from esm2mega.autoeval.recipe import finetune_settings
from esm2mega.autoeval.task_data import RunCommand, TaskData
from esm2mega.autoeval.tasks import FINETUNE, LAYOUT, LORA, PROBE, ZERO_SHOT
from esm2mega.autoeval.together import alone
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS
from esm2mega.files import read_json, write_json
from esm2mega.finetune.contact_metrics import contact_metrics
from esm2mega.infer.correlation import spearman
from esm2mega.infer.variant_tables import write_table
from esm2mega.report.results.predictions import read_rows
from esm2mega.train.loop import defined

_RESULT, _MAPS = "result.json", "contacts.h5"
_BEGIN_AGAIN = "remove that folder, and start again"

PROBE_RESIDUES = 50_000
"""Limits the labelled residues that a probe is fitted to: of many more, a regression would take hours."""

_VARIED = {39: "V", 40: "D", 41: "G", 54: "V"}
"""Gives the wild type's residue at each position, from 1, that gb1 varies (Wu et al. 2016)."""


@dataclass(frozen=True)
class Unit:
    """Says what is evaluated, and how.

    Attributes:
        model: The model.
        mode: One of the modes.
        seed: Seed of the head.
        folder: Folder of the unit.
        embeddings: Folder of the model's embeddings of the task, which units of other seeds share.
        layers: Hidden states that a probe tries, as for `esm2mega embed`; empty for the last one.
        overrides: What the user changes of the fine-tuning, and of the layout of every command.
    """

    model: EvalModel
    mode: str
    seed: int
    folder: Path
    embeddings: Path
    layers: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def layout(self) -> list[str]:
        """Return the overrides that say how processes share the work, which every command takes."""
        return [word for word in self.overrides if word.startswith(LAYOUT)]


@dataclass(frozen=True)
class Outcome:
    """Holds what a unit gave.

    Attributes:
        metrics: Metrics of the test split by name.
        predictions: File of the predictions, in the form of `esm2mega predict`, relative to the folder of the
            unit; None for ProteinGym.
        commands: The commands that were run, see `esm2mega.autoeval.places`.
    """

    metrics: dict[str, float | None]
    predictions: str | None
    commands: list[list[str]]


class Commands:
    """Runs the commands of a unit, but for those whose output is there, and remembers all of them."""

    def __init__(self, run_command: RunCommand, say: Callable[[str], None], places: Places) -> None:
        self.all: list[list[str]] = []
        self._run, self._say, self._places = run_command, say, places

    def run(self, output: Path, *words: object) -> Path:
        """Run a command, unless its output is there; all ranks call this together."""
        command = [str(word) for word in words]
        self.all.append(self._places.noted(command))
        if not alone(output.exists):
            self._say(" ".join(["esm2mega", *command]))
            if command[0] == PROBE:  # this command is for one process
                alone(lambda: self._run(command))
            else:
                self._run(command)
        return output


Made = tuple[dict[str, float | None], Path | None]
"""Holds metrics and the file of predictions, as in `Outcome`."""


def run_unit(unit: Unit, data: TaskData, commands: Commands) -> Outcome:
    """Evaluate, unless that is done already; all ranks call this together."""
    return recorded(unit, commands, lambda: _MODES[unit.mode](unit, data, commands))


def recorded(unit: Unit, commands: Commands, make: Callable[[], Made]) -> Outcome:
    """Return what `make` gives, or gave in an earlier start; all ranks call this together."""
    path = unit.folder / _RESULT
    if not alone(path.is_file):
        metrics, predictions = make()
        name = None if predictions is None else str(predictions.relative_to(unit.folder))
        found = Outcome(metrics, name, commands.all)
        alone(lambda: write_json(path, asdict(found)))
    return alone(lambda: Outcome(**read_json(path, _BEGIN_AGAIN)))


def _probe(unit: Unit, data: TaskData, commands: Commands) -> Made:
    files = embed_splits(unit, data, commands, SPLITS)
    out = unit.folder / PROBE
    words = [PROBE, *files, "--labels", data.folder, "--out", out, f"seed={unit.seed}", *data.settings]
    # Intervals are made later for all modes alike; what a killed probe left is replaced.
    words += ["task.bootstrap=0", "--overwrite"]
    if data.task.kind in RESIDUE_KINDS:
        words += ["--max-residues", PROBE_RESIDUES]
    commands.run(out / RESULTS, *words)
    result = alone(lambda: read_json(out / RESULTS, _BEGIN_AGAIN)[TEST])
    return _numbers(result), out / PREDICTIONS


def embed_splits(unit: Unit, data: TaskData, commands: Commands, splits: Sequence[str]) -> list[Path]:
    """Embed the proteins of some splits, each into a file of its own."""
    kind = "residue" if data.task.kind in RESIDUE_KINDS else "pooled"
    words = ["--include", kind, "--max-seq-length", data.longest + 2, "--resume"]
    if unit.layers:
        words += ["--layers", ",".join(unit.layers)]
    files = []
    for split in splits:
        out = unit.embeddings / f"{split}.h5"
        embed = ["embed", unit.model.path, data.table(split), "--out", out, *words, *unit.layout]
        files.append(commands.run(out, *embed))
    return files


def _finetune(unit: Unit, data: TaskData, commands: Commands) -> Made:
    kind = data.task.kind
    assert kind is not None
    num_train, run_dir = len(data.rows[TRAIN]), unit.folder / "run"
    settings = [
        f"init_from={unit.model.path}",
        f"run_dir={run_dir}",
        f"data.train={data.table(TRAIN)}",
        f"data.valid={data.table(VALID)}",
        f"seed={unit.seed}",
        # Benchmarks are taken as they are published, with the proteins that their splits share.
        "data.allow_overlap=true",
        *data.settings,
        *finetune_settings(unit.mode, kind, num_train, data.longest, unit.model.parameters, unit.overrides),
        *unit.overrides,
    ]
    trained = unit.folder / "trained"
    commands.run(trained, FINETUNE, *settings)
    alone(lambda: trained.touch())
    test = data.table(TEST)
    # Adapters name the model that they belong to by where it was when they were trained.
    base = [f"init_from={unit.model.path}"] if unit.mode == LORA else []
    if kind == PAIR_KIND:
        maps = unit.folder / _MAPS
        return _of_maps(commands.run(maps, "predict", run_dir, test, "--out", maps, "--resume", *base), data)
    evaluation, table = unit.folder / "evaluation.json", unit.folder / PREDICTIONS
    commands.run(evaluation, "evaluate", run_dir, "--data", test, "--out", evaluation, *base)
    result = alone(lambda: read_json(evaluation, _BEGIN_AGAIN))
    commands.run(table, "predict", run_dir, test, "--out", table, "--resume", *base)
    return _numbers(result), table


def _of_maps(maps: Path, data: TaskData) -> Made:
    """Judge maps of contacts, which are read from the file in every mode alike."""
    metrics = alone(lambda: contact_metrics(counts_of_maps(maps, data.splits[TEST])))
    return {name: defined(value) for name, value in metrics.items()}, maps


_NO_METRICS = ("step", "num_labels", "num_sequences")


def _numbers(result: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics of a file of results, without baselines and counts."""
    return {
        name: value
        for name, value in result.items()
        if (value is None or isinstance(value, (int, float)))
        and name not in _NO_METRICS
        and not name.startswith("baseline_")
    }


def _zero_shot(unit: Unit, data: TaskData, commands: Commands) -> Made:
    if data.task.kind == PAIR_KIND:  # contacts of the model's own regression
        maps = unit.folder / _MAPS
        words = ["--include", "contacts", "--max-seq-length", data.longest + 2, "--resume", *unit.layout]
        embed = ["embed", unit.model.path, data.table(TEST), "--out", maps, *words]
        return _of_maps(commands.run(maps, *embed), data)
    # Beside the tables, since the commands read these two as well.
    fasta, table = data.folder.parent / "wild_type.fasta", data.folder.parent / "variants.csv"
    scores, predictions = unit.folder / "scores.csv", unit.folder / PREDICTIONS
    (column,) = data.columns

    def write_variants() -> None:
        sequence = wild_type(data.rows[TEST][0]["sequence"])
        unit.folder.mkdir(parents=True, exist_ok=True)
        fasta.write_text(f">gb1\n{sequence}\n")
        rows = [[row[ID], mutations(row["sequence"], sequence), row[column]] for row in data.rows[TEST]]
        write_table(table, ["variant", "mutant", column], rows)

    alone(write_variants)
    words = ["score", unit.model.path, "--fasta", fasta, "--variants", table, "--out", scores]
    commands.run(scores, *words, "--measured", column, *unit.layout)

    def read_scores() -> float:
        rows = read_rows(scores)
        write_table(predictions, [ID, column], [[row["variant"], row["score"]] for row in rows])
        return spearman([float(row[column]) for row in rows], [float(row["score"]) for row in rows])

    return {"spearman": defined(alone(read_scores))}, predictions


def wild_type(variant: str) -> str:
    """Return the wild type of a variant of gb1, which differs from it at the varied positions alone."""
    letters = list(variant)
    for position, letter in _VARIED.items():
        letters[position - 1] = letter
    return "".join(letters)


def mutations(variant: str, sequence: str) -> str:
    """Return the substitutions that make a variant of a sequence of the same length, as ``V39A:D40C``."""
    pairs = enumerate(zip(sequence, variant, strict=True), start=1)
    changes = [f"{wild}{position}{letter}" for position, (wild, letter) in pairs if wild != letter]
    return ":".join(changes) or "WT"


_MODES: dict[str, Callable[[Unit, TaskData, Commands], Made]] = {
    PROBE: _probe,
    FINETUNE: _finetune,
    LORA: _finetune,
    ZERO_SHOT: _zero_shot,
}
