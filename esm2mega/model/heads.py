"""Heads of tasks: from hidden states of a pack to a prediction per protein or per residue.

They are replicated over the tensor-parallel group: all ranks hold the same weights and see the same tokens.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``n`` proteins and ``R`` residues of it, ``k`` targets or
classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import RESIDUE_KINDS
from esm2mega.data.labelled_batch import Segments
from esm2mega.model import pooling
from esm2mega.model.dropout import KeyedDropout
from esm2mega.model.task import MakeHead

_KERNEL = 7
"""Residues that a convolution sees, as in the FLIP and BioNeMo baselines."""


class TaskHead(MegatronModule, ABC):
    """A head in two parts: `features`, without weights of its own, and what is learned on them.

    Subclass it and write both. Parameters are filled by `esm2mega.model.init`. With a frozen encoder the
    features of a protein are computed once.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        """Args: config: Megatron-Core's, without sequence parallelism. device: where weights live."""
        super().__init__(config=config)
        self._linear = partial(torch.nn.Linear, device=device, dtype=config.params_dtype)

    @abstractmethod
    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """What the head reads of all tokens' ``[T, h]``: ``[n, h]`` of proteins or ``[R, h]`` of residues."""

    @abstractmethod
    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        """``[n, k]`` of proteins, or ``[R, k]`` of residues."""

    def forward(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """Predict from hidden states of all tokens, ``[T, h]``."""
        return self.predict(self.features(hidden_states, segments), segments)


class PooledHead(TaskHead):
    """A head on one vector per protein, as `task.pooling` says."""

    def __init__(self, config: Any, device: torch.device, kind: str) -> None:
        """Args: kind: mean, cls, max or attention."""
        super().__init__(config, device)
        self._kind = kind
        if kind == "attention":
            # Zero at the start, which is the mean.
            self.query = torch.nn.Parameter(
                torch.empty(config.hidden_size, device=device, dtype=config.params_dtype)
            )

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        read = {
            "mean": pooling.mean_of_residues,
            "cls": pooling.first_tokens,
            "max": pooling.max_of_residues,
            "attention": pooling.residue_states,
        }[self._kind]
        return read(hidden_states, segments)

    def pooled(self, features: Tensor, segments: Segments) -> Tensor:
        """``[n, h]``."""
        if self._kind != "attention":
            return features
        return pooling.attention_over_residues(features, segments, self.query)


class MLPHead(PooledHead):
    """Pooling, linear, ReLU, dropout, linear."""

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device, task.pooling)
        width = task.hidden_size or 256
        self.dense = self._linear(config.hidden_size, width)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(width, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        hidden = F.relu(self.dense(self.pooled(features, segments)))
        return self.output(self.dropout(hidden, segments.keys))


class LinearHead(PooledHead):
    """Pooling, dropout, linear."""

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device, task.pooling)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(config.hidden_size, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(self.pooled(features, segments), segments.keys))


class ClsHead(PooledHead):
    """`<cls>`, dense of the model's width, tanh or GELU, dropout, linear.

    With `as_hf` there is dropout before the dense layer too, as in `EsmForSequenceClassification`; without it
    this is the pooler of BERT.
    """

    def __init__(
        self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int, as_hf: bool = False
    ) -> None:
        super().__init__(config, device, "cls")
        self.first_dropout = KeyedDropout(task.dropout if as_hf else 0.0, layer=0)
        self.dense = self._linear(config.hidden_size, config.hidden_size)
        gelu = task.pooler_activation == "gelu" and not as_hf
        self.activation = F.gelu if gelu else torch.tanh
        self.dropout = KeyedDropout(task.dropout, layer=1)
        self.output = self._linear(config.hidden_size, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        pooled = self.activation(self.dense(self.first_dropout(features, segments.keys)))
        return self.output(self.dropout(pooled, segments.keys))


class ResidueHead(TaskHead):
    """A head on the states of residues."""

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.residue_states(hidden_states, segments)


class ResidueLinearHead(ResidueHead):
    """Dropout and linear for each residue, as in `EsmForTokenClassification`."""

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(config.hidden_size, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(features, segments.keys[segments.owners], segments.numbers))


class ResidueCNNHead(ResidueHead):
    """Convolution over 7 residues, ReLU, dropout, convolution over 7 residues.

    Beyond the ends of a protein there are zeros, never its neighbour in the pack: proteins are laid out with
    as many zeros between them as half a kernel reaches.
    """

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        width = task.hidden_size or 32
        convolution = partial(
            torch.nn.Conv1d,
            kernel_size=_KERNEL,
            padding=_KERNEL // 2,
            device=device,
            dtype=config.params_dtype,
        )
        self.first = convolution(config.hidden_size, width)
        self.dropout = KeyedDropout(task.dropout)
        self.second = convolution(width, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        gap = _KERNEL // 2
        places = torch.arange(len(features), device=features.device) + gap * segments.owners
        length = len(features) + gap * segments.num_proteins + 1

        def convolved(convolution: torch.nn.Module, values: Tensor) -> Tensor:
            spread = values.new_zeros(length, values.shape[1]).index_copy(0, places, values)
            # [length, channels] -> [1, channels, length] and back
            return convolution(spread.T[None])[0].T.index_select(0, places)

        hidden = F.relu(convolved(self.first, features))
        hidden = self.dropout(hidden, segments.keys[segments.owners], segments.numbers)
        return convolved(self.second, hidden)


_OF_PROTEINS: dict[str, Any] = {
    "auto": MLPHead,
    "mlp": MLPHead,
    "linear": LinearHead,
    "pooler": ClsHead,
    "hf": partial(ClsHead, as_hf=True),
}
_OF_RESIDUES: dict[str, Any] = {
    "auto": ResidueLinearHead,
    "linear": ResidueLinearHead,
    "hf": ResidueLinearHead,
    "cnn": ResidueCNNHead,
}


def head_of_task(task: TaskConfig, num_outputs: int) -> MakeHead:
    """What makes the head that a configuration names."""
    heads = _OF_RESIDUES if task.kind in RESIDUE_KINDS else _OF_PROTEINS
    return lambda config, device: heads[task.head](config, device, task, num_outputs)
