"""Defines the model that a user subclasses: ESM-2 with a head that its class names."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from esm2mega.model.heads import TaskHead
from esm2mega.model.heads.task import ESM2ForTask, MakeHead


class FineTuneModel(ESM2ForTask):
    """Computes the encoder of ESM-2 and a head; subclass it to name a head, or to freeze weights.

    In `__init__` a subclass may set ``requires_grad = False`` for weights that training keeps, the same in
    all layers; it may override `forward`. The attributes `pre_process` and `post_process` say whether this
    pipeline stage has the embedding and the head.

    Attributes:
        head_cls: Class of the head; None for the one that the section ``task`` of the configuration names,
            which by default is the mean over residues, linear to 256, ReLU, dropout, linear. It is made from
            (config, device), where `config` is Megatron-Core's configuration with the fields of the
            `FineTuneConfig` added to it.
    """

    head_cls: type[TaskHead] | None = None

    def __init__(self, config: Any, *stage: Any, make_head: MakeHead) -> None:
        """Build the stage.

        Args:
            config: The `FineTuneConfig`.
            *stage: Arguments of `ESM2Model`.
            make_head: Makes the head that `head_cls` names.
        """
        super().__init__(*stage, make_head=make_head)


def made_head(settings: Any, config: Any, device: torch.device) -> TaskHead:
    """Make the head that a model names.

    Args:
        settings: The `FineTuneConfig`, whose fields the head finds in its own configuration.
        config: Megatron-Core's configuration; a copy that belongs to the head.
        device: Where the weights live.
    """
    for field in dataclasses.fields(settings):
        if not hasattr(config, field.name):
            setattr(config, field.name, getattr(settings, field.name))
    return settings.model_cls.head_cls(config, device)
