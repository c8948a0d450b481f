"""Describes a fine-tuning by classes: its model and loss, where weights come from, and what is trained."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from esm2mega.config.scalars import as_word
from esm2mega.errors import UserError
from esm2mega.finetune.classes.model import FineTuneModel, made_head
from esm2mega.finetune.classes.whole import whole_model
from esm2mega.finetune.losses import TaskLossReduction
from esm2mega.finetune.user_code import GivenCode, OwnModel
from esm2mega.model.heads import TaskHead
from esm2mega.model.heads.task import MakeHead

_HEAD = ("head", "head.")
"""These prefixes mean all weights of the head."""

_FIELDS = {
    "init_from": "initial_ckpt_path",
    "finetune.load_head": "initial_ckpt_skip_keys_with_these_prefixes",
    "finetune.skip": "initial_ckpt_skip_keys_with_these_prefixes",
    "finetune.mode": "encoder_frozen",
    "task.dropout": "ft_dropout",
    "task.kind": "task_kind",
}
"""Maps keys of the configuration to the fields that set them."""


@dataclass
class FineTuneConfig:
    """Describes a fine-tuning; subclass it to name a model and a loss, and to add fields for the head.

    Attributes:
        model_cls: Class of the model.
        initial_ckpt_path: Checkpoint, run or model in any format that is read, with the weights to start
            from, or to predict with; None for random weights.
        initial_ckpt_skip_keys_with_these_prefixes: Weights whose names begin so are not loaded, and start
            anew; ``head`` means the head. For predictions the list must be empty.
        encoder_frozen: Train the head alone; what it reads of a protein is computed once.
        ft_dropout: Probability of dropout in the head.
        task_kind: What the values are: the key `task.kind`.
        overrides: Further settings, ``key=value``, as in ``optim.lr=1e-4`` or ``model.size=8M``.
    """

    model_cls: type[FineTuneModel] = FineTuneModel
    initial_ckpt_path: str | None = None
    initial_ckpt_skip_keys_with_these_prefixes: list[str] = field(default_factory=lambda: ["head"])
    encoder_frozen: bool = False
    ft_dropout: float = 0.25
    task_kind: str = "regression"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            written = getattr(type(self), entry.name, dataclasses.MISSING)
            # Python's dataclasses pass over such a line, and would keep the default of the parent.
            if written is not entry.default:
                raise UserError(
                    f"{type(self).__name__}.{entry.name} changes a field without being one; write a type, as "
                    f"in `{entry.name}: Any = …`, and @dataclass above the class"
                )

    def get_loss_reduction_class(self) -> type[TaskLossReduction] | None:
        """Return the class of the loss; None, the default, for the one that `task.loss` names."""
        return None

    def configure_model(self, *stage: Any, make_head: MakeHead | None = None) -> FineTuneModel:
        """Make the model, or the pipeline stage of it that this process holds.

        `train_model` and `infer_model` call this. Without arguments it returns a whole model with the weights
        of `initial_ckpt_path`, to look at.

        Args:
            *stage: Arguments of `ESM2Model`.
            make_head: Makes the head.
        """
        if not stage:
            return whole_model(self.settings(), self.code(), self.configure_model)
        assert make_head is not None
        return self.model_cls(self, *stage, make_head=make_head)

    def code(self) -> GivenCode:
        """Return model, head and loss for what trains, predicts and evaluates.

        Raises:
            UserError: A class is not what it should be.
        """
        model = self.model_cls
        if not (isinstance(model, type) and issubclass(model, FineTuneModel)):
            raise UserError(
                f"model_cls={model!r} is no subclass of esm2mega.finetune.classes.FineTuneModel; name one"
            )
        head = model.head_cls
        is_head = isinstance(head, type) and issubclass(head, TaskHead) and not inspect.isabstract(head)
        if head is not None and not is_head:
            raise UserError(
                f"{model.__name__}.head_cls={head!r} is no subclass of esm2mega.finetune.classes.TaskHead "
                "with `features` and `predict`; name one"
            )
        own = None if model is FineTuneModel else OwnModel(model, self.configure_model)
        return GivenCode(None if head is None else partial(made_head, self), self._loss(), own)

    def _loss(self) -> TaskLossReduction | None:
        cls = self.get_loss_reduction_class()
        if cls is None:
            return None
        location = f"{type(self).__name__}.get_loss_reduction_class"
        if not (isinstance(cls, type) and issubclass(cls, TaskLossReduction)):
            raise UserError(
                f"{location} returned {cls!r}; return a subclass of esm2mega.finetune.classes.LossReduction"
            )
        try:
            return cls()
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{location}: {cls.__name__}() failed: {line}; correct it") from error

    def settings(self) -> list[str]:
        """Return the fields and `overrides` as ``key=value``.

        Raises:
            UserError: `overrides` set what a field sets.
        """
        for text in self.overrides:
            key = text.partition("=")[0].lstrip("+")
            if key in _FIELDS:
                raise UserError(f"overrides: {text!r} is set by {_FIELDS[key]}; give it there")
        skipped = self.initial_ckpt_skip_keys_with_these_prefixes
        load_head = self.initial_ckpt_path is not None and not set(_HEAD) & set(skipped)
        values: dict[str, Any] = {
            "optim.lr": 5e-4,
            "schedule.name": "constant",
            "schedule.warmup_steps": 0,
            "task.kind": self.task_kind,
            "task.dropout": self.ft_dropout,
            "finetune.mode": "frozen" if self.encoder_frozen else "full",
            "finetune.load_head": load_head,
        }
        if self.initial_ckpt_path is not None:
            values["init_from"] = self.initial_ckpt_path
            values["finetune.skip"] = [prefix for prefix in skipped if prefix not in _HEAD]
        return [*(as_word(key, value) for key, value in values.items()), *self.overrides]


def configured(config: Any) -> FineTuneConfig:
    """Return `config`, or raise `UserError` if it is no `FineTuneConfig`."""
    if not isinstance(config, FineTuneConfig):
        raise UserError(
            f"config is {config!r}; give an instance of a subclass of "
            "esm2mega.finetune.classes.FineTuneConfig"
        )
    return config
