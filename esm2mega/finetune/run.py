"""`finetune` builds the objects of a run on labelled proteins, resumes or starts, and runs the loop.

This module does no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import layout
from esm2mega.config.best_metric import HEADLINES
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.lora import check_start
from esm2mega.config.model import tail_multiple
from esm2mega.config.schema import DataConfig, Run, TaskConfig, TrainConfig
from esm2mega.config.split import is_cut
from esm2mega.config.task import masks_of, validate_task
from esm2mega.config.validate import validate
from esm2mega.convert.heads.plain_head import export_notes
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.start_point import StartPoint
from esm2mega.data.labels.dataset import LabelledProteins, agreed_forms, label
from esm2mega.data.labels.degenerate import check_classes, question_classes
from esm2mega.data.labels.forms import SAID
from esm2mega.data.labels.in_memory import Proteins, table_in_memory
from esm2mega.data.labels.rows import Table, limited, read_table
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.data.labels.splits import cut, split_file, with_split_column, write_splits
from esm2mega.data.labels.stream import LabelledPacks, LabelledStream
from esm2mega.data.overlap import check_overlap
from esm2mega.data.stream.build import BatchSpec
from esm2mega.data.stream.recipe import proteins_hash
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.finetune.defaults import choose, choose_batch
from esm2mega.finetune.evaluate import UNSEEN, Measured, measure, packs_of, packs_to_a_label, task_recipe
from esm2mega.finetune.loaded_head import check_units, loaded_targets
from esm2mega.finetune.losses import loss_of_task
from esm2mega.finetune.metrics import check_packages
from esm2mega.finetune.param_groups import scales_of, set_trainable
from esm2mega.finetune.result import Intervals, interval_words, intervals_of, result_of, write_result
from esm2mega.finetune.user_code import GivenCode
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.decimals import four_decimals
from esm2mega.report.predicted import TEST_RESULT
from esm2mega.train import users_code
from esm2mega.train.build import HeadTraining, build
from esm2mega.train.loop import Evaluation, LoopState
from esm2mega.train.session import Session, data_set, resolve_epochs, run_session
from esm2mega.train.start import open_training_start, with_batches

_STEPS_PER_WINDOW = 4
"""Sets how many steps' proteins are packed together where `data.pack_window` is not set."""


@dataclass(frozen=True)
class UserParts:
    """Holds what a user brings instead of what the configuration names.

    Attributes:
        data: Split (``train``, ``valid``, ``test``) -> proteins with labels.
        code: Model, head and loss.
        transform: Freezes weights of a chunk and adds the adapters of the section ``lora``; None for the
            usual way.
    """

    data: Mapping[str, Proteins] = field(default_factory=dict)
    code: GivenCode = field(default_factory=GivenCode)
    transform: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Splits:
    """Holds the labelled proteins of a run.

    Attributes:
        of: Split -> proteins.
        info: Meaning of the predictions, from the training split.
        notes: What the splits have in common.
        cut: The splits as they were cut from one table; None where tables are given for each.
    """

    of: dict[str, LabelledProteins]
    info: TargetInfo
    notes: list[str] = field(default_factory=list)
    cut: dict[str, Table] | None = None


def finetune(
    run: Run,
    parts: UserParts | None = None,
    on_gradients: Callable[[list[Any]], None] | None = None,
    opened: StartPoint | None = None,
    begun: float | None = None,
    given: Collection[str] | None = None,
    is_trial: bool = False,
) -> LoopState:
    """Train as configured; every process of the world calls this with the same, validated configuration.

    Args:
        run: The configuration.
        parts: Parts that replace what the configuration names.
        on_gradients: See `esm2mega.train.step.TrainState`.
        opened: The checkpoint that `init_from` names, if it has been opened for the configuration.
        begun: See `esm2mega.train.session.run_session`.
        given: The keys that the user has set; `esm2mega.finetune.defaults` chooses others. None for a
            configuration that is taken as it is.
        is_trial: Whether the test split is read, but not evaluated.

    Returns:
        The final state of the loop, the same on every rank.

    Raises:
        UserError: The input is missing or not valid.
        MachineError: Loss, gradient or weights are not finite, or a checkpoint could not be written.
        StoppedBySignal: A signal came or the time was up, and the state was saved.
    """
    parts = parts or UserParts()
    validate_task(run)
    check_start(run.lora, run.init_from)
    check_packages()
    start = open_training_start(run, opened)
    loaded = loaded_targets(run.task, run.finetune, start, parts.code)
    splits = read_splits(run.data, run.task, parts, loaded)
    info = parts.code.units(run.task, splits.info)
    if start is not None and start.is_resumed:
        _check_resumed(start, parts.code, splits.info, info)
    elif loaded is not None and start is not None:
        check_units(f"init_from={start.path}", loaded, info)
    splits, train = replace(splits, info=info), splits.of["train"]
    check_classes(info, run.task.target_columns, train.notes)
    if is_trial:
        splits.of.pop("test", None)
    if start is None or not start.is_resumed:
        question_classes(info, run.task)
    run, chosen = _chosen(run, splits, start, given)
    if is_trial and "valid" in splits.of:
        run = _reaching_a_label(run, splits.of["valid"])
    if "valid" in splits.of:
        _check_predictable(run, splits.of["valid"])
    elif run.train.eval_every:
        raise UserError(
            f"data.split_by={run.data.split_by}: no row of {train.path} has valid there, and "
            f"train.eval_every={run.train.eval_every} needs validation data; add some, or set "
            "train.eval_every=0"
        )
    run = with_batches(run, start)
    run = resolve_epochs(run, lambda: _stream(run, run.train, train))
    with process_groups(run.parallel, run.seed) as ranks:

        def make(start: StartPoint | None) -> Session:
            return _session(run, ranks, splits, parts, start, on_gradients, chosen)

        return run_session(run, ranks, make, start, begun)


def read_splits(
    data: DataConfig, task: TaskConfig, parts: UserParts, loaded: TargetInfo | None = None
) -> Splits:
    """Read all splits that are given; held-out ones take the classes and scale of the training split.

    All ranks call this together.

    Args:
        data: Names of the tables, and how they are read.
        task: Meaning of their labels.
        parts: Data that replace the tables.
        loaded: Classes and scale of a head that was trained before, which then hold for all splits.
    """
    tables: dict[str, Table] = {}
    read_task = with_split_column(task, data) if is_cut(data) else task
    for split, path in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        key = f"data.{split}"
        if split in parts.data:
            tables[split] = table_in_memory(parts.data[split], read_task, data, key)
        elif path is not None:
            tables[split] = read_table(path, read_task, data, key)
        elif split == "train":
            raise UserError(
                "data.train is not set: give a table with sequences and labels, as data.train=FILE"
            )
    if is_cut(data):
        if extra := [split for split in tables if split != "train"]:
            raise UserError(
                f"data.split and data.split_by cut data.train into all splits, and {extra[0]} is given too; "
                "leave one of them out"
            )
        tables = cut(tables["train"], data)
    tables = {split: limited(table, data) for split, table in tables.items()}
    forms = agreed_forms(task, list(tables.values()))
    found: dict[str, LabelledProteins] = {}
    info: TargetInfo | None = None
    for split, table in tables.items():
        proteins, info = label(table, task, data, forms, info, loaded)
        found[split] = proteins
    assert info is not None
    named = {f"data.{split}": [proteins] for split, proteins in found.items()}
    notes = check_overlap(named, data.allow_overlap)
    return Splits(found, info, notes, tables if is_cut(data) else None)


def batch_spec(run: Run) -> BatchSpec:
    """Return the settings that decide the content of the batches of evaluation and prediction."""
    multiple = tail_multiple(run.model, run.parallel)
    return BatchSpec(run.data, run.train.micro_batch_tokens, run.seed, tail_multiple=multiple)


def train_spec(run: Run, proteins: LabelledProteins) -> BatchSpec:
    """Return the settings that decide the content of the batches of training.

    Packs are made of proteins of similar length where there is a choice, and lengths often correlate with
    labels. So the choice is small by default: among the proteins of a few steps, each of them once.
    """
    spec = BatchSpec.of_training(run)
    if run.data.pack_window is not None or spec.global_batch_size is not None:
        return spec
    mean_tokens = len(proteins.tokens) / len(proteins) + 2
    window = round(_STEPS_PER_WINDOW * run.train.global_batch_tokens / mean_tokens)
    return replace(spec, data=replace(run.data, pack_window=max(1, min(window, len(proteins)))))


def _chosen(
    run: Run, splits: Splits, start: StartPoint | None, given: Collection[str] | None
) -> tuple[Run, list[str]]:
    """Choose what the user has not set; return the run and lines that say so."""
    if given is None:
        return run, []
    train = splits.of["train"]
    saved = start.run if start is not None and start.is_resumed else None
    run, batch = choose_batch(run, given, train, saved)
    counted = with_batches(run, start)

    def num_steps(settings: TrainConfig) -> int:
        with _stream(counted, settings, train) as stream:
            return stream.num_steps(settings.global_batch_tokens // settings.micro_batch_tokens)

    run, lines = choose(counted, given, "valid" in splits.of, saved, num_steps)
    if run.train.max_epochs is None:  # else `resolve_epochs` validates
        validate(run, world_size_from_environment())
    return run, [*batch, *lines]


def _stream(run: Run, settings: TrainConfig, train: LabelledProteins) -> LabelledStream:
    """Return the training batches of all ranks, as their number is counted."""
    return LabelledStream(train, train_spec(replace(run, train=settings), train))


def _reaching_a_label(run: Run, proteins: LabelledProteins) -> Run:
    """Let the few packs that a trial evaluates go on to the first one with a label, which may be rare."""
    found = packs_to_a_label(LabelledPacks(proteins, batch_spec(run)))
    limit = 0 if found is None else max(found, run.train.eval_batches)
    return replace(run, train=replace(run.train, eval_batches=limit))


def _check_predictable(run: Run, proteins: LabelledProteins) -> None:
    """Refuse validation data without any label: they have no loss that could be best or stop the run."""
    spec, limit = batch_spec(run), run.train.eval_batches
    if packs_to_a_label(LabelledPacks(proteins, spec, limit)) is None:
        part = f" in train.eval_batches={limit} packs" if limit else ""
        raise UserError(
            f"data.valid={proteins.path}: every label of its {len(proteins)} proteins is missing or masked"
            f"{part}, so there is nothing to predict; give some with labels, or leave validation out "
            "(data.valid=null and train.eval_every=0)"
        )


def _session(
    run: Run,
    ranks: Ranks,
    splits: Splits,
    parts: UserParts,
    start: StartPoint | None,
    on_gradients: Callable[[list[Any]], None] | None,
    chosen: Sequence[str],
) -> Session:
    code, info = parts.code, splits.info
    resumed = start.task if start is not None and start.is_resumed else None
    make_head = code.head(run.task, info, resumed, "" if start is None else str(start.path))
    loss = code.loss or loss_of_task(run.task, info)
    head = HeadTraining(
        make_head,
        lambda chunks: set_trainable(chunks, run.finetune),
        lambda chunks: scales_of(chunks, run.finetune),
        code.make_model,
        parts.transform and partial(users_code.call, type(parts.transform).__name__, parts.transform),
    )
    built = build(run, ranks, start, loss, on_gradients, head)
    trained_code = code.as_trained(run.task, info, make_head.name)
    predict = code.predictor(run.task, info, trained_code)
    spec, train = batch_spec(run), splits.of["train"]
    recipe = task_recipe(run.task, run.data, run.seed, loss)
    # Without a test split, validation is what is compared with the baseline.
    compared = "test" if "test" in splits.of else "valid"
    found: dict[str, Measured] = {}
    intervals: Intervals = {}
    test_file = Path(run.run_dir) / TEST_RESULT

    def evaluation(split: str, limit: int) -> Evaluation | None:
        if split not in splits.of:
            return None

        def evaluate(abandon: Callable[[], bool]) -> dict[str, Any] | None:
            packs = packs_of(splits.of[split], spec, ranks, limit)
            measured = measure(
                *(built.state.model, loss, predict, packs, info, ranks),
                abandon=abandon,
                baseline=split == compared,
            )
            if measured is None:
                return None
            if split == "test":
                found[split] = measured
            named = {f"{split}_{name}": value for name, value in measured.metrics.items()}
            unseen = {f"{split}_{UNSEEN}": measured.unseen} if measured.unseen else {}
            return {f"{split}_loss": measured.loss, **named, **unseen, "eval_recipe": recipe}

        return evaluate

    def tested(checkpoint: Path, step: int) -> None:
        measured, proteins = found["test"], splits.of["test"]
        data = proteins.path if splits.cut is None else split_file(run.run_dir, "test")
        outcome = result_of(measured, proteins, str(checkpoint), str(data), step, recipe)

        def write() -> Intervals:
            if measured.not_finite:
                test_file.unlink(missing_ok=True)  # of an earlier test
                return {}
            computed = intervals_of(measured, info, run, of_all=False)
            write_result(test_file, outcome, computed, measured, info, proteins)
            return computed

        intervals.update(on_one_rank(write))

    def result(record: dict[str, Any], split: str) -> str:
        if record[f"{split}_loss"] is None:
            return "loss none: nothing to predict"
        headline = HEADLINES[info.kind]
        value = record[f"{split}_{headline}"]
        shown = "not defined" if value is None else four_decimals(value)
        words = f"loss {four_decimals(record[f'{split}_loss'])}, {headline} {shown}"
        if split != "test":
            return words
        interval = interval_words(intervals.get(headline))
        where = f"; all metrics and predictions are in {test_file}" if test_file.is_file() else ""
        return f"{words}{interval and f' ({interval})'}{where}"

    valid = splits.of.get("valid")
    columns = [*run.task.target_columns, *dict.fromkeys(filter(None, masks_of(run.task)))]

    def begin() -> None:
        if splits.cut is not None:
            write_splits(run.run_dir, splits.cut, columns, run.data.numbers, resumed is not None)

    return Session(
        name="finetune",
        begin=begin,
        built=built,
        stream=LabelledStream(train, train_spec(run, train), ranks.dp_rank, ranks.dp_size),
        evaluation=evaluation,
        eval_recipe=recipe,
        eval_proteins=None if valid is None else proteins_hash(valid.fingerprint, run.train.eval_batches),
        extra_state={
            "task": info.to_dict(),
            "token_counts": None,
            **trained_code.as_state(),
            layout.DATA_SETS: [
                data_set(split, proteins.path, proteins.lengths) for split, proteins in splits.of.items()
            ],
        },
        banner=[
            *chosen,
            *export_notes(HeadDescription(run.task, info, {}, trained_code)),
            *_described(splits, run.task.target_columns),
            *trained_code.lines(),
        ],
        result=result,
        training_values=lambda metrics: {name: metrics[name] for name in loss.names},
        tested=tested,
    )


def _described(splits: Splits, columns: Sequence[str]) -> list[str]:
    """Describe the task, its target columns and the data in the lines that a run prints at its start."""
    info = splits.info
    lines = [f"task     {info.kind} of {info.num_outputs} outputs: {first_of(info.names)}"]
    if info.columns:
        lines = [
            f"task     {info.kind} of {x.name}, {len(x.names)} classes: {first_of(x.names)}"
            for x in info.targets
        ]
    for column, form in zip(columns, info.forms, strict=False):
        lines.append(f"labels   column {column} holds {SAID[form]}")
    for split, proteins in splits.of.items():
        lines.append(
            f"data     {split}: {len(proteins)} proteins of {proteins.path}, {_labels(proteins, info)}"
        )
        lines += [f"data     {note}" for note in proteins.notes]
    return [*lines, *(f"data     {note}" for note in splits.notes)]


def _labels(proteins: LabelledProteins, info: TargetInfo) -> str:
    """Say how many labels are missing, for several targets by name."""
    if not proteins.num_missing:
        return "no label missing"
    if len(info.targets) == 1:
        return f"{proteins.num_missing} labels missing or masked"
    missing = proteins.is_missing.sum(axis=0).tolist()
    each = [
        f"{count if count < len(proteins.is_missing) else 'all'} of {target.name}"
        for target, count in zip(info.targets, missing, strict=True)
        if count
    ]
    return f"labels missing or masked: {', '.join(each)}"


def _check_resumed(start: StartPoint, code: GivenCode, learned: TargetInfo, info: TargetInfo) -> None:
    """Refuse to resume a run with another head, loss, classes or scale than it began with.

    Args:
        start: The checkpoint to resume.
        code: Head and loss of this start.
        learned: Meaning of the predictions of a configured loss, which `data.train` decides.
        info: Meaning of the predictions of the loss of this start; earlier versions did not record it.
    """
    assert start.task is not None
    code.check(start.task, str(start.path), needs_loss=True)
    if start.task.info != (learned if start.task.code is None else info):
        raise UserError(
            f"{start.path}: was trained on other labels than data.train holds now; set data.train and the "
            "keys of task back, or start a new run from the weights with init_from"
        )
