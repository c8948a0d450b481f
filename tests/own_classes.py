"""Loss, head, model, configuration and transform as users of `esm2mega.finetune.classes` write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.finetune.classes import FineTuneConfig, FineTuneModel, LoRATransform, LossReduction, TaskHead
from esm2mega.model import pooling


class SquaredError(LossReduction):
    """A mean over the micro-batch."""

    def forward(self, batch: Any, forward_out: Tensor) -> Any:
        loss = torch.nn.functional.mse_loss(forward_out, batch["labels"])
        return loss, {"avg": loss}


class RootOfSquaredError(SquaredError):
    """The same gradients; the root in the log."""

    def reduce(self, losses_reduced_per_micro_batch: Any) -> Any:
        return super().reduce(losses_reduced_per_micro_batch).sqrt()


class SmallHead(TaskHead):
    """Mean over residues, linear, ReLU, dropout, linear."""

    def __init__(self, config: Any, device: torch.device) -> None:
        super().__init__(config, device)
        self.dense = torch.nn.Linear(config.hidden_size, config.width)
        self.dropout = torch.nn.Dropout(config.ft_dropout)
        self.output = torch.nn.Linear(config.width, 1)

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.mean_of_residues(hidden_states, segments)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(torch.relu(self.dense(features))))


class SmallModel(FineTuneModel):
    """Keeps the feed-forward parts of all layers."""

    head_cls = SmallHead

    def __init__(self, config: Any, *stage: Any, **head: Any) -> None:
        super().__init__(config, *stage, **head)
        for layer in self.encoder.layers:
            layer.mlp.requires_grad_(False)


@dataclass
class SmallConfig(FineTuneConfig):
    """The classes above."""

    model_cls: type[FineTuneModel] = SmallModel
    width: int = 11

    def get_loss_reduction_class(self) -> Any:
        return SquaredError


@dataclass
class RootConfig(SmallConfig):
    """The same with the root of the loss in the log."""

    def get_loss_reduction_class(self) -> Any:
        return RootOfSquaredError


class OtherModel(SmallModel):
    """The same weights, and another function of them."""

    def forward(self, *inputs: Any) -> Any:
        output = super().forward(*inputs)
        return 2 * output if self.post_process else output


class EncoderLoRA(LoRATransform):
    """Freezes the encoder alone, so that the token table is trained too."""

    def selective_freeze(self, module: Any, name: str, prefix: str) -> Any:
        if name == "encoder":
            module.requires_grad_(False)
        return module
