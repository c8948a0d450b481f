"""`Weights` is what every format becomes: our tensors, read when asked for, and a description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from esm2mega.checkpoint.tensors import TensorInfo
from esm2mega.config.presets import ModelShape
from esm2mega.config.schema import TaskConfig
from esm2mega.convert.name_table import CONTACT_HEAD, FREQUENCIES, Shape, is_lm_head, our_shapes
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError


@dataclass(frozen=True)
class HeadDescription:
    """The head of a task, in the place of that of masked language modelling.

    Attributes:
        task: Which head, and of what.
        info: What its outputs mean.
        shapes: Its tensors, whose names begin with ``head.``.
    """

    task: TaskConfig
    info: TargetInfo
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class Description:
    """Describes a model as far as its tensors alone do not.

    Attributes:
        shape: Dimensions.
        layernorm_epsilon: Of every LayerNorm.
        activation: GELU of the feed-forward layers, ``gelu`` (erf) or ``gelu_tanh``. That of the head is erf.
        dtype: Of all weights; the frequencies are fp32, or fp64 in an fp64 model.
        family, final_layernorm, max_positions: As in `ModelConfig`.
        head: That of masked language modelling (``lm``), that of a task, or None of a bare encoder.
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
        """The head, if it is that of a task."""
        return self.head if isinstance(self.head, HeadDescription) else None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor that the model may have, see `our_shapes`."""
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
    """What a conversion did besides moving tensors; all of it is reported.

    Attributes:
        dropped: Tensors of the source that the target does not have, and why.
        filled: Tensors of the target that the source did not have, and with what.
        changed: Differences between the two models that no tensor shows.
        kept: Peculiarities that both have.
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
    """A model in our terms.

    Attributes:
        description: What the tensors alone do not say.
        infos: Every tensor, in the order of the model.
        read: Gives the value of one.
        notes: What reading and writing did besides moving tensors; one object for all that is derived from a
            source, added to as things happen.
        origin: Where it came from: format and path.
    """

    description: Description
    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    notes: Notes = field(default_factory=Notes)
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def has_contact_head(self) -> bool:
        return f"{CONTACT_HEAD}weight" in self.infos

    def cast(self, dtype: torch.dtype) -> Weights:
        """The same in another dtype, rounded once while being read; the frequencies keep at least fp32."""
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


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def shape_from(location: Path, values: Mapping[str, Any], *keys: str) -> ModelShape:
    """The dimensions out of a configuration.

    Args:
        location: The file, for errors.
        values: The configuration.
        keys: Its names of layers, hidden size, feed-forward width and heads.

    Raises:
        UserError: One is not a positive number, or the heads do not divide the hidden size evenly.
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
    """The LayerNorm epsilon of a configuration, or what its reader takes where the key is absent."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"{location}: {key} is {value!r}, not a number between 0 and 1")
    return float(value)
