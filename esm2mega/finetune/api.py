"""`train_model`, `infer_model` and `evaluate_model` fine-tune, predict and evaluate from a program.

The configuration takes all keys of the command `esm2mega finetune`. Data may be in memory instead of tables:
pairs of sequence and value, rows, data frames and others, see `esm2mega.data.labels.in_memory`. A subclass of
`esm2mega.model.heads.TaskHead` or `esm2mega.finetune.losses.TaskLossReduction` can replace the configured
head or loss; a checkpoint records its name, and what reads the checkpoint takes it from the caller again.

Workers that prepare or load data import the program again, so its own work belongs under
``if __name__ == "__main__":``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.checkpoint.layout import step_of
from esm2mega.config.best_metric import check_best_metric
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import given_keys, run_from_yaml
from esm2mega.config.schema import LoRAConfig, Run
from esm2mega.config.split import has_valid
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.data.labels.dataset import apply_length_policy, proteins_of_sequences
from esm2mega.data.labels.in_memory import Proteins, sequences_in_memory
from esm2mega.errors import UserError
from esm2mega.finetune.checkpoint import evaluate_task, open_task, run_task, without_dropping
from esm2mega.finetune.defaults import provisional
from esm2mega.finetune.losses import TaskLossReduction
from esm2mega.finetune.output import contact_maps, shown_predictions
from esm2mega.finetune.run import UserParts, finetune
from esm2mega.finetune.user_code import GivenCode
from esm2mega.model.heads.task import MakeHead
from esm2mega.report.log import EVAL, LOG_NAME, TEST, TRAIN, read_log
from esm2mega.train.start import load_run_with_start


@dataclass(frozen=True)
class TrainedModel:
    """Holds the result of `train_model`.

    Attributes:
        checkpoint: The best checkpoint by `checkpoint.best_metric`; the last one if there is no best.
        last_checkpoint: The last checkpoint, with which a later start would go on.
        metrics: The last values of the training, such as ``loss``; and what was measured of `checkpoint`:
            ``valid_…`` and ``test_…``.
        run: The complete configuration.
    """

    checkpoint: Path
    last_checkpoint: Path
    metrics: dict[str, Any]
    run: Run


def train_model(
    overrides: Sequence[str],
    train: Proteins | None = None,
    valid: Proteins | None = None,
    test: Proteins | None = None,
    config: str | None = None,
    make_head: MakeHead | None = None,
    loss: TaskLossReduction | None = None,
    lora: LoRAConfig | None = None,
) -> TrainedModel:
    """Fine-tune a model; like the command, go on where an earlier start in the same ``run_dir`` ended.

    Args:
        overrides: ``key=value``, such as ``task.kind=regression`` and ``init_from=DIR``.
        train: Training proteins: ``(sequence, value)`` of each, or rows or a table with the columns of
            sequences and labels; None for the file ``data.train``.
        valid: Validation proteins, given as `train` is; None for the file ``data.valid``.
        test: Proteins of the test at the end, given as `train` is; None for the file ``data.test``.
        config: Path or name of the configuration that the overrides change; None for the defaults.
        make_head: Makes a head from Megatron-Core's configuration and a device, such as a subclass of
            `TaskHead`; None for the configured one.
        loss: Loss in place of the configured one, which compares outputs with labels as they are; None for
            the configured one.
        lora: Adapters of the encoder, which are trained with the head instead of all weights; equal to
            ``finetune.mode=lora`` with the section ``lora``.

    Raises:
        UserError: The configuration, the data, the head or the loss are not valid, or do not fit together.
    """
    if lora is not None and not isinstance(lora, LoRAConfig):
        raise UserError(
            f"lora is a {type(lora).__name__}; give an esm2mega.config.schema.LoRAConfig, as in "
            "LoRAConfig(rank=8, alpha=16)"
        )
    data = {"train": train, "valid": valid, "test": test}
    parts = UserParts(
        {split: pairs for split, pairs in data.items() if pairs is not None}, GivenCode(make_head, loss)
    )
    return train_with(_settings(overrides), parts, config, lora)


def train_with(
    overrides: Sequence[str],
    parts: UserParts,
    config: str | None = None,
    lora: LoRAConfig | None = None,
    chooses: bool = True,
) -> TrainedModel:
    """Fine-tune as `train_model` does, with what a user brings in `parts`.

    Args:
        overrides: As for `train_model`.
        parts: Data and code; without a transform of theirs, adapters are added in the usual way.
        config: As for `train_model`.
        lora: As for `train_model`; a transform needs it.
        chooses: Whether keys that are not set get the values that the command chooses, or else those of
            `conf/base.yaml`.
    """
    run, opened = load_run_with_start(config, overrides)
    if lora is not None:
        if run.finetune.mode == "frozen" or run.lora != LoRAConfig():
            argument, frozen = ("lora", "") if parts.transform is None else ("transform", " (encoder_frozen)")
            raise UserError(
                f"finetune.mode={run.finetune.mode}{frozen}, lora.rank={run.lora.rank} and the argument "
                f"{argument}: adapters are configured by one of them; leave out these keys, or the argument"
            )
        run.lora, run.finetune.mode = lora, "lora"
    given = parts.data
    for split in given:
        if getattr(run.data, split) is not None:
            raise UserError(
                f"data.{split}={getattr(run.data, split)} and the argument {split} are both set; give one"
            )
    validates = "valid" in given or has_valid(run.data)
    keys = given_keys(config, overrides) if chooses else None
    if keys is not None:
        run = provisional(run, keys, validates)
    validate(run, world_size_from_environment())
    validate_task(run)
    check_best_metric(run.checkpoint, run.task, validates)
    if run.train.eval_every and not validates:
        raise UserError(f"train.eval_every={run.train.eval_every} needs validation data; give valid")
    finetune(run, parts, opened=opened, given=keys)
    if keys is not None:
        run = run_from_yaml(Path(run.run_dir) / "config.yaml")
    checkpoint = choose_checkpoint(run.run_dir).path
    metrics: dict[str, Any] = {}
    for record in read_log(Path(run.run_dir) / LOG_NAME):
        if record["kind"] in (TRAIN, TEST) or (record["kind"], record["step"]) == (EVAL, step_of(checkpoint)):
            metrics |= {name: value for name, value in record.items() if name not in ("kind", "step")}
    return TrainedModel(checkpoint, choose_checkpoint(run.run_dir, resuming=True).path, metrics, run)


def infer_model(
    checkpoint: str | Path,
    sequences: Proteins,
    overrides: Sequence[str] = (),
    make_head: MakeHead | None = None,
    loss: TaskLossReduction | None = None,
) -> list[Any]:
    """Predict the labels of sequences.

    Args:
        checkpoint: A checkpoint of `train_model`; or a run directory for its best one, or ``RUN@last`` and
            the like.
        sequences: The sequences to predict: a list, or rows or a table with a column of them.
        overrides: ``key=value`` over the configuration of the checkpoint.
        make_head: What made the head, if it was not a configured one.
        loss: The loss of the training; needed only if that was one with `predictions` of its own.

    Returns:
        A prediction for each sequence, in input order, in the form of the labels of training: a number, a
        dictionary of several, a class name, a list of names, or a string or list with one entry per residue;
        for contacts an array ``[L, L]`` of probabilities. Processes other than the first get an empty list.
    """
    return infer_with(checkpoint, sequences, _settings(overrides), GivenCode(make_head, loss))


def infer_with(
    checkpoint: str | Path, sequences: Proteins, overrides: Sequence[str], code: GivenCode
) -> list[Any]:
    """Predict as `infer_model` does, with what a user brings in `code`."""
    task = open_task(checkpoint, overrides, code)
    data = without_dropping(task.run.data)
    texts = sequences_in_memory(sequences, data.sequence_column)
    proteins = apply_length_policy(proteins_of_sequences(texts), data, "sequences")
    measured, _ = run_task(task, proteins, "predict")
    if measured.predictions is None:
        return []
    if task.info.per_pair:
        return list(contact_maps(measured.predictions, proteins))
    return shown_predictions(measured.predictions, task.info, proteins)


def evaluate_model(
    checkpoint: str | Path,
    data: Proteins,
    overrides: Sequence[str] = (),
    make_head: MakeHead | None = None,
    loss: TaskLossReduction | None = None,
) -> dict[str, Any]:
    """Compute loss and metrics on labelled proteins, the numbers of the command `esm2mega evaluate`.

    Args:
        checkpoint: A checkpoint of `train_model`, or a run directory.
        data: Proteins with labels, given as the training data of `train_model`; or the path of a table.
        overrides: ``key=value`` over the configuration of the checkpoint.
        make_head: What made the head, if it was not a configured one.
        loss: The loss of the training, if it was not a configured one.

    Returns:
        Loss, metrics and counts by name; a metric that is not defined is None. Under ``intervals`` stands
        the 95 % interval of the metric that judges the task, where it is quickly computed.
    """
    code = GivenCode(make_head, loss)
    return evaluate_task(checkpoint, data, overrides=_settings(overrides), code=code)


def _settings(overrides: Any) -> Sequence[str]:
    """Refuse what is not a list of ``key=value``."""
    if isinstance(overrides, (str, bytes)) or not isinstance(overrides, Iterable):
        raise UserError(f"overrides is {overrides!r}; give a list of texts, as in ['task.kind=regression']")
    if isinstance(overrides, Mapping):
        key = next(iter(overrides), "task.kind")
        raise UserError(f"overrides is a {type(overrides).__name__}; give a list of texts, as in ['{key}=…']")
    settings = list(overrides)
    for number, text in enumerate(settings):
        if not isinstance(text, str):
            raise UserError(f"overrides[{number}] is {text!r}; give text, as in 'task.kind=regression'")
    return settings
