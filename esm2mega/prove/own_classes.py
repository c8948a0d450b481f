"""Defines a head, a loss and a model as users write them, whose training is proven to be equal everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.finetune.classes import FineTuneConfig, FineTuneModel, LossReduction, TaskHead
from esm2mega.model import pooling


class OwnHead(TaskHead):
    """Applies the mean over residues, linear, tanh, dropout of PyTorch, linear to two outputs."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.dense = torch.nn.Linear(config.hidden_size, config.width)
        self.dropout = torch.nn.Dropout(config.ft_dropout)
        self.output = torch.nn.Linear(config.width, 2)

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.mean_of_residues(hidden_states, segments)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(torch.tanh(self.dense(features))))


class OwnLoss(LossReduction):
    """Computes the logarithm of the hyperbolic cosine of errors, as a mean over the labels of a pack."""

    names = ("loss", "mae")

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        errors = (forward_out - batch["labels"])[batch["loss_mask"]]
        loss = errors.cosh().log().mean()
        return loss, {"avg": loss, "mae": errors.detach().abs().mean()}


class OwnModel(FineTuneModel):
    """Keeps the token table as it is."""

    head_cls = OwnHead

    def __init__(self, config: Any, *stage: Any, **head: Any) -> None:
        super().__init__(config, *stage, **head)
        if self.pre_process:
            self.embedding.requires_grad_(False)


@dataclass
class OwnConfig(FineTuneConfig):
    """Names the model and the loss."""

    model_cls: type[FineTuneModel] = OwnModel
    width: int = 20

    def get_loss_reduction_class(self) -> type[LossReduction]:
        return OwnLoss
