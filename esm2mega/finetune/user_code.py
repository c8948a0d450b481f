"""Takes a user's own model, head and loss, checks them, and compares them with those of a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.convert.heads.user_code import UserCode, is_same, name_of
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.finetune.losses import RegressionLossReduction, TaskLossReduction, loss_of_task
from esm2mega.finetune.own_head import OwnHead, check_output, other_code, own_model, shown_type
from esm2mega.model.heads import TaskHead, head_of_task
from esm2mega.model.heads.task import MakeHead, MakeModel
from esm2mega.train import users_code

Predict = Callable[[Tensor], Tensor]
"""Turns outputs of a head, ``[rows, k]``, into predictions, as `TaskLossReduction.predictions` does."""

_OF_THE_LOSS = ("loss", "huber_delta", "class_weights", "label_smoothing")
"""These keys of the section ``task`` set up the configured loss."""


@dataclass(frozen=True)
class OwnModel:
    """Holds the model that a user brings: its class, and what makes a chunk of it."""

    cls: type
    make: MakeModel


@dataclass(frozen=True)
class GivenCode:
    """Holds the head, the loss and the model that a user brings.

    Attributes:
        make_head: Makes the head: a subclass of `TaskHead`, or a function; None for the configured head.
        loss: The loss; None for the configured one.
        model: The model around the head; None for `ESM2ForTask`.

    Raises:
        UserError: One of them is something else.
    """

    make_head: MakeHead | None = None
    loss: TaskLossReduction | None = None
    model: OwnModel | None = None

    def __post_init__(self) -> None:
        _check_maker(self.make_head)
        _check_loss(self.loss)

    @property
    def loss_name(self) -> str | None:
        """Return the qualified name of the class of the loss; None without a loss."""
        return None if self.loss is None else name_of(type(self.loss))

    @property
    def model_name(self) -> str | None:
        """Return the qualified name of the class of the model; None without a model."""
        return None if self.model is None else name_of(self.model.cls)

    @property
    def make_model(self) -> MakeModel | None:
        """Return what makes a chunk of the model; None without a model."""
        return None if self.model is None else own_model(self.model.cls, self.model.make)

    def check(self, head: HeadDescription, location: str, needs_loss: bool = False) -> None:
        """Compare with what a checkpoint records; one of an earlier version records nothing.

        Args:
            head: The head of the checkpoint.
            location: The checkpoint, for messages.
            needs_loss: Whether the loss will be computed.

        Raises:
            UserError: Something is missing, or another one than in training.
        """
        recorded = head.code
        if recorded is None:
            return
        self._check_model(recorded, location)
        is_class = isinstance(self.make_head, type)
        given = name_of(self.make_head) if is_class else "a function"  # type: ignore[arg-type]
        if recorded.head is None and self.make_head is not None:
            raise UserError(
                f"{location}: has the head of its configuration (task.head={head.task.head}), not {given}; "
                "leave that out"
            )
        if recorded.head is not None and self.make_head is None:
            raise UserError(
                f"{location}: has a head of your own code, {recorded.head}; {_how_to_give(recorded.head)} or "
                "as make_head in Python"
            )
        if recorded.head is not None and is_class and not is_same(given, recorded.head):
            raise other_code(location, "head", recorded.head, given)
        if recorded.loss is None and self.loss_name is not None:
            raise UserError(
                f"{location}: was trained with the loss of its configuration, not with {self.loss_name}; "
                "leave that out"
            )
        if recorded.loss is None:
            return
        if self.loss_name is None and (needs_loss or recorded.loss_predicts):
            what = "computes the loss" if needs_loss else "turns its outputs into predictions"
            raise UserError(
                f"{location}: was trained with a loss of your own code, {recorded.loss}, which {what}; "
                f"{_how_to_give(recorded.loss)} or as loss in Python"
            )
        if self.loss_name is not None and not is_same(self.loss_name, recorded.loss):
            raise other_code(location, "loss", recorded.loss, self.loss_name)

    def _check_model(self, recorded: UserCode, location: str) -> None:
        if recorded.model is None and self.model_name is not None:
            raise UserError(
                f"{location}: was trained with the usual model, not with {self.model_name}; leave that out"
            )
        if recorded.model is not None and self.model_name is None:
            raise UserError(
                f"{location}: is a model of your own code, {recorded.model}; give the configuration that "
                "names it as --code MODULE:CLASS, or to esm2mega.finetune.classes in Python"
            )
        if recorded.model is not None and not is_same(self.model_name or "", recorded.model):
            raise other_code(location, "model", recorded.model, self.model_name or "")

    def units(self, task: TaskConfig, info: TargetInfo) -> TargetInfo:
        """Return `info` with the scale of the outputs of a model that is trained with the loss.

        The configured loss compares outputs with scaled labels. A user's compares them with the labels as
        they are, unless it is a `RegressionLossReduction` that was given a scale.

        Raises:
            UserError: The configuration sets up the loss that this one replaces.
        """
        if self.loss is None:
            return info
        for key in _OF_THE_LOSS:
            if (value := getattr(task, key)) != getattr(TaskConfig(), key):
                raise UserError(
                    f"task.{key}={value} sets up the loss of the configuration, which {self.loss_name} "
                    "replaces; leave it out"
                )
        if info.kind not in NUMERIC_KINDS:
            return info
        scale = [0.0] * info.num_outputs, [1.0] * info.num_outputs
        if isinstance(self.loss, RegressionLossReduction):
            scale = self.loss.scale(info.num_outputs)
        return replace(info, mean=scale[0], std=scale[1])

    def predicts(self, task: TaskConfig, info: TargetInfo) -> bool:
        """Tell whether the loss has a method of its own that turns outputs into predictions."""
        if self.loss is None:
            return False
        found = getattr(self.loss.predictions, "__func__", None)
        return found not in (TaskLossReduction.predictions, type(loss_of_task(task, info)).predictions)

    def as_trained(self, task: TaskConfig, info: TargetInfo, head: str | None) -> UserCode:
        """Return what a checkpoint records of this training, whose own head is of the class `head`."""
        return UserCode(head, self.loss_name, self.predicts(task, info), self.model_name)

    def predictor(self, task: TaskConfig, info: TargetInfo, recorded: UserCode | None) -> Predict:
        """Return what turns outputs into predictions, with or without the loss.

        Args:
            task: Section ``task`` of the training.
            info: Meaning of the predictions, with the recorded scale.
            recorded: What the checkpoint records; None if an earlier version wrote it.
        """
        by_loss = self.loss is not None if recorded is None else recorded.loss_predicts
        if not by_loss or self.loss is None:
            return loss_of_task(task, info).predictions
        return partial(_predicted, self.loss, info.num_outputs)

    def head(
        self, task: TaskConfig, info: TargetInfo, head: HeadDescription | None, location: str
    ) -> OwnHead:
        """Return what makes the head, the user's or the configured one.

        Args:
            task: The configured task.
            info: Meaning of the predictions.
            head: The head of a checkpoint that is to be loaded; None for a new one.
            location: The checkpoint, for messages.
        """
        recorded = None if head is None or head.code is None else head.code.head
        width = None if self.predicts(task, info) else info.num_outputs
        if self.make_head is None:
            return OwnHead(head_of_task(task, info.num_outputs), None)
        return OwnHead(self.make_head, partial(check_output, info, width), recorded, location)


def _check_maker(make_head: Any) -> None:
    if make_head is None:
        return
    head = "a subclass of esm2mega.model.heads.TaskHead, or a function of (config, device) that makes one"
    if isinstance(make_head, torch.nn.Module):
        raise UserError(f"make_head is {shown_type(make_head)} that is built already; give {head}")
    if isinstance(make_head, type) and not issubclass(make_head, TaskHead):
        raise UserError(f"make_head is the class {name_of(make_head)}; give {head}")
    if not callable(make_head):
        raise UserError(f"make_head is {shown_type(make_head)}; give {head}")
    if inspect.isabstract(make_head):
        raise UserError(
            f"make_head: {name_of(make_head)} lacks {', '.join(sorted(make_head.__abstractmethods__))}; "
            "define them"
        )
    _check_arguments("make_head", make_head, ("config", "device"))


def _check_loss(loss: Any) -> None:
    if loss is None:
        return
    if isinstance(loss, type):
        raise UserError(f"loss is the class {loss.__name__}; give an instance, as loss={loss.__name__}()")
    if not isinstance(loss, TaskLossReduction):
        raise UserError(
            f"loss is {shown_type(loss)}; give an instance of a subclass of "
            "esm2mega.finetune.losses.TaskLossReduction, whose forward(batch, output) returns LossTerms"
        )
    _check_arguments(f"{type(loss).__name__}.forward", loss.forward, ("batch", "output"))


def _check_arguments(name: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Refuse a function that cannot be called with the expected arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of compiled code
        return
    try:
        signature.bind(*expected)
    except TypeError:
        taken = ", ".join(signature.parameters)
        raise UserError(f"{name} takes ({taken}); it is called with ({', '.join(expected)})") from None


def _predicted(loss: TaskLossReduction, width: int, output: Tensor) -> Tensor:
    """Call `predictions` of a user's loss, and refuse what is not a row for each row of the output."""
    values = users_code.call(f"{type(loss).__name__}.predictions", loss.predictions, output)
    found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if found != [len(output), width]:
        raise UserError(
            f"{type(loss).__name__}.predictions returned {found} for outputs {list(output.shape)} instead of "
            f"[{len(output)}, {width}]; correct it"
        )
    return values


def _how_to_give(name: str) -> str:
    return (
        f"give it as --code {name}" if not name.startswith("__main__:") else "give it as --code MODULE:CLASS"
    )
