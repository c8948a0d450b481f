"""`train_model` and `infer_model` fine-tune and predict from a program, on lists of sequences and values.

The configuration takes all keys of the command `esm2mega finetune`. Data may be lists instead of tables, and
a subclass of `esm2mega.model.heads.TaskHead` or `esm2mega.finetune.losses.TaskLossReduction` can replace the
configured head or loss.

Workers that prepare or load data import the program again, so its own work belongs under
``if __name__ == "__main__":``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.checkpoint.layout import step_of
from esm2mega.config.best_metric import check_best_metric
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.schema import LoRAConfig, Run
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.data.labels.dataset import Pairs, apply_length_policy, proteins_of_sequences
from esm2mega.errors import UserError
from esm2mega.finetune.checkpoint import open_task, run_task, without_dropping
from esm2mega.finetune.losses import TaskLossReduction
from esm2mega.finetune.output import contact_maps, shown_predictions
from esm2mega.finetune.run import UserParts, finetune
from esm2mega.model.task import MakeHead
from esm2mega.report.log import LOG_NAME, read_log
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
    train: Pairs | None = None,
    valid: Pairs | None = None,
    test: Pairs | None = None,
    config: str | None = None,
    make_head: MakeHead | None = None,
    loss: TaskLossReduction | None = None,
    lora: LoRAConfig | None = None,
) -> TrainedModel:
    """Fine-tune a model; like the command, go on where an earlier start in the same ``run_dir`` ended.

    Args:
        overrides: ``key=value``, such as ``task.kind=regression`` and ``init_from=DIR``.
        train: ``(sequence, value)`` of each training protein; None for the table ``data.train``.
        valid: Validation proteins, given as `train` is; None for the table ``data.valid``.
        test: Proteins of the test at the end, given as `train` is; None for the table ``data.test``.
        config: Path or name of the configuration that the overrides change; None for the defaults.
        make_head: Makes a head from Megatron-Core's configuration and a device; None for the configured one.
        loss: Loss in place of the configured one; None for that.
        lora: Adapters of the encoder, which are trained with the head instead of all weights; equal to
            ``finetune.mode=lora`` with the section ``lora``.

    Raises:
        UserError: The configuration or the data are not valid, or do not fit together.
    """
    run, opened = load_run_with_start(config, overrides)
    if lora is not None:
        if run.finetune.mode == "frozen" or run.lora != LoRAConfig():
            raise UserError(
                f"finetune.mode={run.finetune.mode}, lora.rank={run.lora.rank} and the argument lora: "
                "adapters are configured by one of them; leave out these keys, or the argument"
            )
        run.lora, run.finetune.mode = lora, "lora"
    data = {"train": train, "valid": valid, "test": test}
    given = {split: pairs for split, pairs in data.items() if pairs is not None}
    for split in given:
        if getattr(run.data, split) is not None:
            raise UserError(
                f"data.{split}={getattr(run.data, split)} and the argument {split} are both set; give one"
            )
    validate(run, world_size_from_environment())
    validate_task(run)
    check_best_metric(run.checkpoint, run.task, valid is not None or run.data.valid is not None)
    if run.train.eval_every and valid is None and run.data.valid is None:
        raise UserError(f"train.eval_every={run.train.eval_every} needs validation data; give valid")
    finetune(run, UserParts(given, make_head, loss), opened=opened)
    checkpoint = choose_checkpoint(run.run_dir).path
    metrics: dict[str, Any] = {}
    for record in read_log(Path(run.run_dir) / LOG_NAME):
        if record["kind"] != "eval" or record["step"] == step_of(checkpoint):
            metrics |= {name: value for name, value in record.items() if name not in ("kind", "step")}
    return TrainedModel(checkpoint, choose_checkpoint(run.run_dir, resuming=True).path, metrics, run)


def infer_model(
    checkpoint: str | Path,
    sequences: Sequence[str],
    overrides: Sequence[str] = (),
    make_head: MakeHead | None = None,
    loss: TaskLossReduction | None = None,
) -> list[Any]:
    """Predict the labels of sequences.

    Args:
        checkpoint: A checkpoint of `train_model`; or a run directory for its best one, or ``RUN@last`` and
            the like.
        sequences: The sequences to predict.
        overrides: ``key=value`` over the configuration of the checkpoint.
        make_head: The function that made the head, if it was not a configured one.
        loss: The loss of the training, if it was not a configured one.

    Returns:
        A prediction for each sequence, in input order, in the form of the labels of training: a number, a
        dictionary of several, a class name, a list of names, or a string or list with one entry per residue;
        for contacts an array ``[L, L]`` of probabilities. Processes other than the first get an empty list.
    """
    if isinstance(sequences, str):
        raise UserError("give a list of sequences, not one string")
    task = open_task(checkpoint, overrides)
    data = without_dropping(task.run.data)
    proteins = apply_length_policy(proteins_of_sequences(sequences), data, "sequences")
    measured, _ = run_task(task, proteins, "predict", make_head, loss)
    if measured.predictions is None:
        return []
    if task.info.per_pair:
        return list(contact_maps(measured.predictions, proteins))
    return shown_predictions(measured.predictions, task.info, proteins)
