"""Defines `Weights`, to which every format is read: our tensors, read when asked for, and a description."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.presets import ModelShape
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.heads.user_code import UserCode
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, Shape, is_lm_head, our_shapes
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError


@dataclass(frozen=True)
class HeadDescription:
    """Describes the head of a task, which takes the place of the masked-language-model head.

    Attributes:
        task: Section ``task`` of the configuration, which says what kind of head it is.
        info: What its outputs mean.
        shapes: Shapes of its tensors, whose names begin with ``head.``.
        code: Names of a user's own model, head and loss; None where they are not known, as in checkpoints of
            earlier versions.
    """

    task: TaskConfig
    info: TargetInfo
    shapes: Mapping[str, Shape]
    code: UserCode | None = None

    @property
    def is_configured(self) -> bool:
        """Tell whether the section ``task`` says all that turns hidden states into predictions."""
        code = self.code or UserCode()
        return code.model is None and code.head is None and not code.loss_predicts


@dataclass(frozen=True)
class Description:
    """Describes a model as far as its tensors alone do not.

    Attributes:
        shape: Dimensions of the model.
        layernorm_epsilon: Epsilon of every LayerNorm.
        activation: GELU of the feed-forward layers, ``gelu`` (erf) or ``gelu_tanh``; the head has erf.
        dtype: Dtype of all weights; the frequencies are fp32, or fp64 in an fp64 model.
        family, final_layernorm, max_positions: As in `ModelConfig`.
        head: ``lm`` for the masked-language-model head, the head of a task, or None for a bare encoder.
    """

    shape: ModelShape
    layernorm_epsilon: float
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    family: str = "esm2"
    final_layernorm: bool = True
    max_positions: int | None = None
    head: Literal["lm"] | HeadDescription | None = "lm"

    @property
    def task(self) -> HeadDescription | None:
        """Return the head if it is that of a task, else None."""
        return self.head if isinstance(self.head, HeadDescription) else None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor that the model may have, see `our_shapes`."""
        shapes = our_shapes(self.shape, self.max_positions)
        if self.head == "lm":
            return shapes
        encoder = {name: shape for name, shape in shapes.items() if not is_lm_head(name)}
        return encoder if self.task is None else encoder | dict(self.task.shapes)

    @property
    def head_dim(self) -> int:
        return self.shape.hidden_size // self.shape.num_attention_heads


@dataclass
class Notes:
    """Holds what a conversion did besides moving tensors, all of which is reported.

    Attributes:
        dropped: Tensors of the source that the target does not have, and why.
        filled: Tensors of the target that the source did not have, and their values.
        changed: Differences between the two models that no tensor shows.
        kept: Peculiarities of the source that the target has too.
    """

    dropped: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return all notes, a line each."""
        return [
            *(f"dropped: {line}" for line in self.dropped),
            *(f"filled:  {line}" for line in self.filled),
            *(f"changed: {line}" for line in self.changed),
            *(f"kept:    {line}" for line in self.kept),
        ]


@dataclass
class Weights:
    """Holds a model under our names, with tensors that are read when asked for.

    Attributes:
        description: What the tensors alone do not say.
        infos: Shape and dtype of every tensor by name, in the order of the model.
        read: Returns the value of a tensor by name.
        notes: What reading and writing did besides moving tensors. Everything derived from one source shares
            the object and adds to it.
        origin: Format and path of the source; of merged adapters also their training.
        absent: What the source lacks of a tensor, by its name, in words; empty unless the source was read in
            part. Such a tensor is in `infos` if a part of it is there.
        present: Returns which elements of such a tensor are there, bool in its shape; the others read as 0.
    """

    description: Description
    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    notes: Notes = field(default_factory=Notes)
    origin: dict[str, Any] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    present: Callable[[str], Tensor] | None = None

    @property
    def has_contact_head(self) -> bool:
        return f"{CONTACT_HEAD}weight" in self.infos

    def cast(self, dtype: torch.dtype) -> Weights:
        """Convert the weights to another dtype, rounded once when read; the frequencies stay as they are."""
        if dtype == self.description.dtype:
            return self
        old, read = self.description.dtype, self.read
        rounded = "" if torch.promote_types(old, dtype) == dtype else ", rounded"
        self.notes.changed.append(f"weights from {dtype_name(old)} to {dtype_name(dtype)}{rounded}")
        infos = {
            name: info if name == FREQUENCIES else TensorInfo(info.shape, dtype)
            for name, info in self.infos.items()
        }
        return replace(
            self,
            description=replace(self.description, dtype=dtype),
            infos=infos,
            read=lambda name: read(name).to(infos[name].dtype),
        )


_FLAGS = {"true": True, "1": True, "false": False, "0": False, "none": False}
"""Gives the meaning of truth values by their text, as Python and JSON write them."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def shape_from(location: Path, values: Mapping[str, Any], *keys: str) -> ModelShape:
    """Read the dimensions of a model from a configuration.

    Args:
        location: File of the configuration, named in errors.
        values: Content of the configuration.
        keys: Its keys for the number of layers, hidden size, feed-forward width and number of heads.

    Raises:
        UserError: A value is not a positive integer, or the hidden size does not divide into heads of an even
            width.
    """
    sizes = [values.get(key) for key in keys]
    for key, size in zip(keys, sizes, strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{location}: {key} is {size!r}, not a positive number")
    shape = ModelShape(*sizes)  # type: ignore[arg-type]
    if shape.hidden_size % (2 * shape.num_attention_heads):
        raise UserError(
            f"{location}: {keys[1]}={shape.hidden_size} does not divide into {shape.num_attention_heads} "
            "heads of an even width"
        )
    return shape


def epsilon_from(location: Path, values: Mapping[str, Any], key: str, default: float) -> float:
    """Read the LayerNorm epsilon of a configuration; `default` is that of the format for an absent key."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{location}: {key} is {value!r}, not a number between 0 and 1")
    return float(value)


def flag_from(location: Path, values: Mapping[str, Any], key: str, default: bool) -> bool:
    """Read a truth value of a configuration, also where another program wrote it as text.

    Args:
        location: File of the configuration, named in errors.
        values: Content of the configuration.
        key: Its key.
        default: Value of the format for an absent key; null is false.

    Raises:
        UserError: The value is neither true nor false, in any spelling.
    """
    value = values.get(key, default)
    found = _FLAGS.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{location}: {key} is {value!r}, neither true nor false; correct it")
    return found


def number_from(location: Path, values: Mapping[str, Any], key: str, default: float) -> float:
    """Read a finite number of a configuration, also where another program wrote it as text.

    Args:
        location: File of the configuration, named in errors.
        values: Content of the configuration.
        key: Its key.
        default: Value for a key that is absent or null.

    Raises:
        UserError: The value is no finite number.
    """
    value = values.get(key)
    if value is None:
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{location}: {key} is {value!r}, not a number; correct it")
    return number
