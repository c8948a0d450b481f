"""Defines the heads of tasks, which predict per protein, residue or pair from the hidden states of a pack.

They are replicated over the tensor-parallel group: all ranks hold the same weights and see the same tokens.

Legend: ``T`` tokens, ``n`` proteins, ``R`` residues and ``P`` pairs of residues of a pack, ``h`` hidden size,
``l`` residues of a protein, ``k`` targets or classes, ``V`` values sent from stage to stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from esm2mega.batch import Segments
from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS
from esm2mega.model import pooling
from esm2mega.model.contact_maps import ContactMaps, Span
from esm2mega.model.dropout import KeyedDropout
from esm2mega.model.heads.task import MakeHead
from esm2mega.model.pipeline_payload import carried_dtype
from esm2mega.pairs import num_pairs
from esm2mega.parallel.context_collectives import sum_for_all

_KERNEL = 7
"""Sets how many residues a convolution sees, as in the FLIP and BioNeMo baselines."""


class TaskHead(MegatronModule, ABC):
    """Predicts in two steps: `features`, which has no weights, and `predict`, which has the learned ones.

    Subclass it and write both. Parameters are filled by `esm2mega.model.init`. With a frozen encoder the
    features of a protein are computed once.
    """

    reads_states = True
    """Says whether the head predicts from hidden states."""

    spans_stages = False
    """Says whether every pipeline stage has a part of the head, and not the last one alone."""

    def __init__(self, config: Any, device: torch.device) -> None:
        """Prepare to build the head's modules.

        Args:
            config: Megatron-Core's configuration, without sequence parallelism.
            device: Where the weights live.
        """
        super().__init__(config=config)
        self._linear = partial(torch.nn.Linear, device=device, dtype=config.params_dtype)

    def watch(self, layers: Iterable[Any], is_last: bool) -> None:
        """Attach the head to the transformer layers, if it reads from inside them; called once.

        Args:
            layers: Layers of this pipeline stage.
            is_last: Whether this is the stage that predicts.
        """

    def begin(self, segments: Segments, carried: Tensor | None) -> None:
        """Prepare for a pack; called before the layers of the stage compute it.

        Args:
            segments: Proteins and residues of the pack.
            carried: What the part of the head on the previous stage sent, ``[V]``; see `SpanningHead`.
        """

    @abstractmethod
    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """Reduce ``[T, h]`` to what the head reads: ``[n, h]`` of proteins or ``[R, h]`` of residues."""

    @abstractmethod
    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        """Predict from `features`: ``[n, k]`` of proteins, or ``[R, k]`` of residues."""

    def forward(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """Predict from hidden states of all tokens, ``[T, h]``."""
        return self.predict(self.features(hidden_states, segments), segments)


class PooledHead(TaskHead):
    """Predicts from one vector per protein, pooled as `task.pooling` says."""

    def __init__(self, config: Any, device: torch.device, kind: str) -> None:
        """Choose the pooling; `kind` is mean, cls, max or attention."""
        super().__init__(config, device)
        self._kind = kind
        if kind == "attention":
            # It starts at zero, which gives the mean.
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
        """Return one vector per protein, ``[n, h]``."""
        if self._kind != "attention":
            return features
        return pooling.attention_over_residues(features, segments, self.query)


class MLPHead(PooledHead):
    """Applies pooling, linear, ReLU, dropout, linear."""

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
    """Applies pooling, dropout, linear."""

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device, task.pooling)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(config.hidden_size, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(self.pooled(features, segments), segments.keys))


class ClsHead(PooledHead):
    """Applies to `<cls>` a dense layer of the model's width, tanh or GELU, dropout, linear.

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
    """Predicts from the hidden states of residues."""

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.residue_states(hidden_states, segments)


class ResidueLinearHead(ResidueHead):
    """Applies dropout and linear to each residue, as `EsmForTokenClassification` does."""

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(config.hidden_size, num_outputs)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        return self.output(self.dropout(features, segments.keys[segments.owners], segments.numbers))


class ResidueCNNHead(ResidueHead):
    """Applies a convolution over 7 residues, ReLU, dropout, and a convolution over 7 residues.

    Beyond the ends of a protein a convolution sees zeros, never the neighbour in the pack: between proteins
    there are as many zeros as half a kernel covers.
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
        owners, count, gap = segments.owners, segments.num_proteins, _KERNEL // 2
        hidden = F.relu(convolved(self.first, features, owners, count, gap))
        hidden = self.dropout(hidden, segments.keys[owners], segments.numbers)
        return convolved(self.second, hidden, owners, count, gap)


def convolved(
    convolution: torch.nn.Module, values: Tensor, owners: Tensor, num_proteins: int, gap: int
) -> Tensor:
    """Apply a convolution that keeps the length to each protein alone, with zeros beyond its ends.

    Args:
        convolution: Takes and returns ``[1, channels, length]``.
        values: Residues or tokens of all proteins, one protein behind the other, ``[rows, channels]``.
        owners: Which protein each row belongs to, int64 ``[rows]``.
        num_proteins: Number of proteins.
        gap: Rows of zeros between proteins, at least half of a kernel.
    """
    positions = torch.arange(len(values), device=values.device) + gap * owners
    length = len(values) + gap * num_proteins + 1
    spread = values.new_zeros(length, values.shape[1]).index_copy(0, positions, values)
    # [length, channels] -> [1, channels, length] and back
    return convolution(spread.T[None])[0].T.index_select(0, positions)


class ProductHead(ResidueHead):
    """Predicts contacts from products and differences of two residues' states, as TAPE does.

    It applies dropout and a linear layer from both to two classes, and averages over both orders of a pair.

    In that mean the differences cancel and the rest is a matrix product, so TAPE's tensor ``[l, l, 2h]`` is
    never made; where TAPE drops elements of that tensor, this head drops elements of the states. The weights
    of the differences are kept, as in TAPE.
    """

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        self.dropout = KeyedDropout(task.dropout)
        self.output = self._linear(2 * config.hidden_size, 2)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        """Return the logits of a contact, ``[P, 1]``: those of the class of contacts minus the other's."""
        states = self.dropout(features, segments.keys[segments.owners], segments.numbers)
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        none, contact = self.output.weight[:, : states.shape[1]].to(states.dtype)
        maps = [(x * (contact - none)) @ x.T for x in states.split(segments.residue_counts)]
        bias = (self.output.bias[1] - self.output.bias[0]).to(states.dtype)
        # Adding the states times zero keeps a pack without proteins part of the graph.
        return (upper_triangles(maps, states.new_zeros(0)) + (states.sum() * 0.0 + bias))[:, None]


class SpanningHead(TaskHead):
    """Has a part on every pipeline stage, each of which sends values to the part on the next stage."""

    spans_stages = True

    @abstractmethod
    def num_carried(self, segments: Segments) -> int:
        """Return how many values a stage sends for a pack, ``V``."""

    @abstractmethod
    def carry(self, segments: Segments) -> Tensor:
        """Return the values to send, ``[V]`` of `carried_dtype`; called when the layers have run."""


class AttentionMapHead(SpanningHead):
    """Predicts contacts by logistic regression on the attention maps of all layers and heads, as ESM-2 does.

    Hidden states are not read. The regression is a sum over layers: each pipeline stage has the weights for
    the maps of its own layers, adds its share of the logits to that of the earlier stages, and sends the sum.
    Weights start at zero, as usual for a logistic regression, and weight decay acts on them.

    Attributes:
        weights: Weights for each layer of this stage, ``[1, heads]``, by its number in the model, from 0.
        bias: ``[1]``; on the last stage only.
    """

    reads_states = False

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        self._empty = partial(torch.empty, device=device, dtype=config.params_dtype)
        self.weights = torch.nn.ParameterDict()
        self._maps: ContactMaps | None = None
        self._carried: Tensor | None = None

    def watch(self, layers: Iterable[Any], is_last: bool) -> None:
        layers = list(layers)
        for layer in layers:
            weight = torch.nn.Parameter(self._empty(1, self.config.num_attention_heads))
            weight.starts_at = 0.0  # type: ignore[attr-defined]
            self.weights[str(layer.layer_number - 1)] = weight
        if is_last:
            self.bias = torch.nn.Parameter(self._empty(1))
        self._maps = ContactMaps(layers)

    def begin(self, segments: Segments, carried: Tensor | None) -> None:
        assert self._maps is not None
        self._carried = carried
        spans = [
            Span(start, len(text), span)
            for start, text, span in zip(segments.starts, segments.tokens, segments.spans, strict=True)
        ]
        # Each tensor-parallel rank uses the weights of its own heads; the gradient is summed over the ranks.
        shared = {
            int(number) + 1: copy_to_tensor_model_parallel_region(weight)[0]
            for number, weight in self.weights.items()
        }
        self._maps.begin(spans, shared)

    def num_carried(self, segments: Segments) -> int:
        return sum(map(num_pairs, segments.residue_counts))

    def carry(self, segments: Segments) -> Tensor:
        """Return contact logits without the bias, ``[P]``, of all layers so far and of this rank's heads."""
        assert self._maps is not None
        empty = self._empty(0, dtype=carried_dtype(self.config.params_dtype))
        logits = upper_triangles(self._maps.sums, empty)
        return logits if self._carried is None else logits + self._carried

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        return pooling.residue_states(hidden_states, segments)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        """Return the logits of a contact, ``[P, 1]``."""
        logits = reduce_from_tensor_model_parallel_region(self.carry(segments))
        if self.config.context_parallel_size > 1:
            logits = sum_for_all(logits)
        # Adding the states times zero keeps a pack without proteins part of the graph.
        return (logits + features.sum() * 0.0)[:, None] + self.bias


def upper_triangles(maps: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Return the pairs i < j of maps ``[l, l]`` back to back, ``[P]``, in the dtype of `empty`, ``[0]``."""
    chosen = [empty]
    for logits in maps:
        first, second = torch.triu_indices(len(logits), len(logits), 1, device=logits.device)
        chosen.append(logits[first, second].to(empty.dtype))
    return torch.cat(chosen)


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

_OF_PAIRS: dict[str, Any] = {
    "auto": ProductHead,
    "product": ProductHead,
    "attention_maps": AttentionMapHead,
}


def head_of_task(task: TaskConfig, num_outputs: int) -> MakeHead:
    """Return the function that makes the head which a configuration names."""
    # This module is built on the one here.
    from esm2mega.model.heads import tape_heads

    if task.head in tape_heads.WIDTHS:
        make = tape_heads.head_class(task)
        return lambda config, device: make(config, device, task, num_outputs)
    heads = _OF_RESIDUES if task.kind in RESIDUE_KINDS else _OF_PROTEINS
    heads = _OF_PAIRS if task.kind == PAIR_KIND else heads
    return lambda config, device: heads[task.head](config, device, task, num_outputs)
