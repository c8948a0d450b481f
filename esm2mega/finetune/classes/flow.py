"""`train_model` and `infer_model` fine-tune and predict with the classes that a user writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esm2mega.config.scalars import as_word
from esm2mega.config.schema import Run
from esm2mega.errors import UserError
from esm2mega.finetune.api import infer_with, train_with
from esm2mega.finetune.classes.config import FineTuneConfig, configured
from esm2mega.finetune.classes.data import FineTuneDataModule
from esm2mega.finetune.run import UserParts
from esm2mega.lora.transform import LoRATransform


def train_model(
    experiment_name: str,
    experiment_dir: str | Path,
    config: FineTuneConfig,
    data_module: FineTuneDataModule,
    n_steps_train: int,
    transform: LoRATransform | None = None,
) -> tuple[Path, dict[str, Any], Run]:
    """Fine-tune a model; go on where an earlier start of the same experiment ended.

    Args:
        experiment_name: Name of the directory of the run.
        experiment_dir: Directory in which it is made.
        config: Model, loss, weights to start from, and settings. Without others there, the learning rate is
            5e-4 in all steps.
        data_module: Training proteins, and validation proteins unless there are none.
        n_steps_train: Number of optimizer steps.
        transform: Freezes weights and adds adapters, which are trained; None for no adapters.

    Returns:
        The best checkpoint by the validation loss, or the last one without validation; the last values of
        the training, such as ``loss``, and of the validation of that checkpoint, ``valid_…``; and the
        complete configuration of the run.

    Raises:
        UserError: A class, the configuration or the data are not valid, or do not fit together.
    """
    settings = configured(config).settings()
    if data_module.train_dataset is None:
        raise UserError("train_dataset is not set; give FineTuneDataModule(train_dataset=…)")
    if transform is not None and not isinstance(transform, LoRATransform):
        raise UserError(
            f"transform is {transform!r}; give an instance of LoRATransform, as LoRATransform(rank=8)"
        )
    data = {"train": data_module.train_dataset, "valid": data_module.valid_dataset}
    given = {split: proteins for split, proteins in data.items() if proteins is not None}
    settings += [
        as_word("run_dir", Path(experiment_dir) / experiment_name),
        as_word("train.max_steps", n_steps_train),
    ]
    lora = None if transform is None else transform.config
    trained = train_with(settings, UserParts(given, config.code(), transform), lora=lora, chooses=False)
    return trained.checkpoint, trained.metrics, trained.run


def infer_model(config: FineTuneConfig, data_module: FineTuneDataModule) -> list[Any]:
    """Predict `predict_dataset` with the checkpoint `initial_ckpt_path`; one with adapters finds its base.

    Args:
        config: Names the classes of the training, and as `initial_ckpt_path` its checkpoint or run; no weight
            may be skipped. Its `overrides` change the configuration of the training, such as the layout.
        data_module: The proteins to predict.

    Returns:
        A prediction for each protein, as `esm2mega.finetune.infer_model` returns them.
    """
    checkpoint = configured(config).initial_ckpt_path
    if checkpoint is None:
        raise UserError("initial_ckpt_path is not set; give the checkpoint that train_model returned")
    if skipped := config.initial_ckpt_skip_keys_with_these_prefixes:
        raise UserError(
            f"initial_ckpt_skip_keys_with_these_prefixes={skipped} would predict with random weights; set it "
            "to []"
        )
    return infer_with(checkpoint, data_module.sequences(), config.overrides, config.code())
