"""Fine-tunes by classes that a user writes: loss, head, model, configuration, data and adapters."""

from __future__ import annotations

from esm2mega.finetune.classes.config import FineTuneConfig
from esm2mega.finetune.classes.data import FineTuneDataModule, InMemorySingleValueDataset
from esm2mega.finetune.classes.flow import infer_model, train_model
from esm2mega.finetune.classes.loss import LossReduction
from esm2mega.finetune.classes.model import FineTuneModel
from esm2mega.lora.transform import LoRATransform
from esm2mega.model.heads import TaskHead

__all__ = [
    "FineTuneConfig",
    "FineTuneDataModule",
    "FineTuneModel",
    "InMemorySingleValueDataset",
    "LoRATransform",
    "LossReduction",
    "TaskHead",
    "infer_model",
    "train_model",
]
