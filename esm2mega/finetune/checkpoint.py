"""Opens a fine-tuned checkpoint, loads it at any layout, and evaluates it on labelled proteins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.finite import too_large
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import load_run_over
from esm2mega.config.machine import on_this_machine
from esm2mega.config.schema import DataConfig, Run
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.start_point import StartPoint, asks_to_verify, open_checkpoint
from esm2mega.data.labels.dataset import LabelledProteins, proteins_of_pairs, read_labelled
from esm2mega.data.labels.in_memory import Proteins
from esm2mega.data.labels.schema import TargetInfo, with_columns
from esm2mega.data.labels.splits import with_masks_beside
from esm2mega.errors import UserError
from esm2mega.files import check_out
from esm2mega.finetune.evaluate import Measured, measure, packs_of, task_recipe
from esm2mega.finetune.losses import TaskLossReduction, loss_of_task
from esm2mega.finetune.metrics import check_packages
from esm2mega.finetune.result import intervals_of, result_of, write_result
from esm2mega.finetune.run import batch_spec
from esm2mega.finetune.user_code import GivenCode, Predict
from esm2mega.lora.base import open_base
from esm2mega.lora.checkpoint import load_model
from esm2mega.model.build import build_model
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.parallel.paths import expand_paths
from esm2mega.report.progress import Progress
from esm2mega.train.evaluate import adapt_layout
from esm2mega.train.finite import refuse_not_finite


@dataclass(frozen=True)
class TaskCheckpoint:
    """Holds a fine-tuned checkpoint and how it is to be used.

    Attributes:
        start: The checkpoint; one of adapters comes with its base.
        run: Configuration of the checkpoint, changed by the overrides of this start.
        info: Meaning of the predictions.
        head: The head, as the checkpoint describes it.
        code: The user's own head and loss, if there are.
    """

    start: StartPoint
    run: Run
    info: TargetInfo
    head: HeadDescription
    code: GivenCode

    @property
    def predict(self) -> Predict:
        """Return what turns outputs into predictions, the same with and without the loss of the training."""
        return self.code.predictor(self.run.task, self.info, self.head.code)

    @property
    def loss(self) -> TaskLossReduction:
        """Return the user's own loss, or the configured one."""
        return self.code.loss or loss_of_task(self.run.task, self.info)

    def refuse_not_finite(self, measured: Measured, proteins: LabelledProteins) -> None:
        """Raise `UserError` if outputs or their loss are not finite; all ranks call this together."""
        refuse_not_finite(measured.not_finite, proteins.id, "its prediction", self.start)
        # A loss of the user's own may have no value where its metrics have.
        if self.code.loss is None and measured.loss is not None and math.isinf(measured.loss):
            raise too_large(str(proteins.path), "the loss overflows", self.start.path)

    @property
    def recipe(self) -> str:
        """Return the hash that names how the checkpoint is evaluated."""
        return task_recipe(self.run.task, self.run.data, self.run.seed, self.loss)


def open_task(
    checkpoint: str | Path | StartPoint,
    overrides: Sequence[str] = (),
    code: GivenCode | None = None,
    needs_loss: bool = False,
) -> TaskCheckpoint:
    """Open a fine-tuned checkpoint, without reading weights yet; all ranks call this together.

    Args:
        checkpoint: As for `esm2mega.checkpoint.choice.choose_checkpoint`, or what was opened.
        overrides: ``key=value`` over its configuration, such as the parallel layout of this start.
        code: The user's own head and loss, if it was trained with such.
        needs_loss: Whether the loss will be computed.

    Raises:
        UserError: There is no checkpoint, it has no task head, its head was trained on other columns, or
            `code` is not what it was trained with.
    """
    code = code or GivenCode()
    verify = asks_to_verify(overrides)
    start = open_checkpoint(checkpoint, verify)
    if start.task is None:
        raise UserError(
            f"{start.path}: is a pretrained model without the head of a task; fine-tune it with "
            "`esm2mega finetune`, or use `esm2mega embed` or `esm2mega score`"
        )
    saved = on_this_machine(start.run)
    # The columns of the training table say nothing about those of another table.
    saved.data.id_column = None
    run = adapt_layout(expand_paths(load_run_over(saved, overrides)), overrides)
    validate(run, world_size_from_environment())
    validate_task(run)
    info = with_columns(start.task.info, run.task, str(start.path))
    code.check(start.task, str(start.path), needs_loss)
    return TaskCheckpoint(open_base(start, run.init_from, verify), run, info, start.task, code)


@contextmanager
def loaded(task: TaskCheckpoint) -> Iterator[tuple[list[Any], Ranks]]:
    """Yield this rank's chunks with the weights of the checkpoint, within process groups."""
    with process_groups(task.run.parallel, task.run.seed) as ranks:
        yield load_task(task, ranks), ranks


def load_task(task: TaskCheckpoint, ranks: Ranks) -> list[Any]:
    """Return this rank's chunks with the weights of the checkpoint; all ranks call this together."""
    run = task.run
    head = task.code.head(run.task, task.info, task.head, str(task.start.path))
    has_lora = run.lora.rank is not None
    device, make_model = ranks.device, task.code.make_model
    chunks = build_model(run.model, run.parallel, device, run.seed, head, has_lora, make_model)
    load_model(task.start, run, chunks)
    return chunks


def run_task(task: TaskCheckpoint, proteins: LabelledProteins, words: str) -> tuple[Measured, bool]:
    """Predict proteins, and compare the predictions with the labels where there are labels.

    Args:
        task: The checkpoint, from `open_task`.
        proteins: The proteins to predict.
        words: Description in the progress bar.

    Returns:
        The predictions, loss and metrics, and whether this is the main process.

    Raises:
        UserError: The model gives values that are not finite.
    """
    with loaded(task) as (chunks, ranks):
        packs = packs_of(proteins, batch_spec(task.run), ranks)
        with Progress(len(packs), words, "pack", enabled=ranks.is_main) as progress:
            measured = measure(
                chunks,
                task.loss,
                task.predict,
                packs,
                task.info,
                ranks,
                progress,
                baseline=True,
            )
        assert measured is not None
        task.refuse_not_finite(measured, proteins)
        return measured, ranks.is_main


def evaluate_task(
    checkpoint: str | Path | StartPoint,
    data: str | Path | Proteins,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    code: GivenCode | None = None,
) -> dict[str, Any]:
    """Compute loss and metrics of a fine-tuned checkpoint on labelled proteins, at any layout.

    Args:
        checkpoint: As for `open_task`.
        data: A table like that of training, or proteins in memory as `train_model` takes them.
        out: JSON file for the result, with the intervals of all metrics and the prediction of every protein.
        overrides: As for `open_task`.
        code: As for `open_task`.

    Returns:
        Loss, metrics and counts; a loss or metric that is not defined is None. Under ``intervals`` stand
        the 95 % intervals of metrics by name, without `out` at most that of the metric that judges the task.
    """
    if out is not None:
        check_out(Path(out))
    check_packages()
    task = open_task(checkpoint, overrides, code, needs_loss=True)
    proteins = labelled(task, data)
    measured, is_main = run_task(task, proteins, "evaluate")
    step, checkpoint = task.start.state["step"], str(task.start.path)
    result = result_of(measured, proteins, checkpoint, str(proteins.path), step, task.recipe)
    intervals = on_one_rank(lambda: intervals_of(measured, task.info, task.run, of_all=out is not None))
    if out is not None and is_main:
        write_result(Path(out), result, intervals, measured, task.info, proteins)
    return {**result, "intervals": intervals}


def labelled(task: TaskCheckpoint, data: str | Path | Proteins, option: str = "--data") -> LabelledProteins:
    """Read labelled proteins by the classes and scale of the checkpoint; `option` names them in messages."""
    if isinstance(data, (str, Path)):
        how = with_masks_beside(task.run.task, data)
        proteins, _ = read_labelled(data, how, task.run.data, task.info, option)
    else:
        proteins, _ = proteins_of_pairs(data, task.run.task, task.info, "data", task.run.data)
    return proteins


def without_dropping(data: DataConfig) -> DataConfig:
    """Refuse what training would drop, since no protein may be missing from predictions."""
    if data.too_long == "drop":
        data.too_long = "error"
    return data
