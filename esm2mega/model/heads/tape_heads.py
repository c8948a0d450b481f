"""Defines the heads of TAPE and of ProteinLM's TAPE, which convert to their files and back.

They differ from the heads of `esm2mega.model.heads` in what they read: ``<cls>`` and ``<eos>`` stand beside
the residues that convolutions see. Where TAPE normalises by the statistics of a batch, a loss would depend on
which proteins share it; here a normalisation is its scale and shift for each channel, which are trained.

Legend: ``T`` tokens of a pack, ``E`` those of its proteins, ``n`` proteins, ``R`` residues and ``P`` pairs of
residues, ``h`` hidden size, ``s`` tokens of a protein, ``k`` targets or classes, ``c`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esm2mega.batch import Segments
from esm2mega.config.schema import TaskConfig
from esm2mega.config.task import PAIR_KIND, RESIDUE_KINDS
from esm2mega.model.dropout import KeyedDropout
from esm2mega.model.heads.task_heads import PooledHead, ProductHead, TaskHead, convolved, upper_triangles
from esm2mega.parcel import Parcel

_FIRST_KERNEL, _SECOND_KERNEL = 5, 3
"""Sets how many tokens the two convolutions over a protein see."""

WIDTHS = {"tape": 512, "proteinlm": 1024}
"""Gives the width of the hidden layer for proteins; for residues it is 512 in both."""

RESIDUE_WIDTH = WIDTHS["tape"]

CHANNELS, BLOCKS = 64, 30
"""Sets the width and the number of residual blocks of ProteinLM's head for contacts."""


class WeightNormed(torch.nn.Module):
    """Holds a weight as a length and a direction, ``g v / |v|`` with the norm over all of ``v``, and a bias.

    Attributes:
        weight_v: The direction, in the shape of the weight; outputs come first.
        weight_g: The length, ``[1]``.
        bias: A number for each output.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        """Make parameters of a weight of `shape`."""
        super().__init__()
        self.weight_v = torch.nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        self.weight_g = torch.nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        # This is the expected length of the direction, so the weight starts as that of any other head.
        self.weight_g.starts_at = math.sqrt(shape[0])  # type: ignore[attr-defined]
        self.bias = torch.nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm())

    def forward(self, values: Tensor) -> Tensor:
        """Apply a linear layer, ``[rows, inputs]``, or a convolution that keeps the length, ``[1, c, s]``."""
        if self.weight_v.dim() == 2:
            return F.linear(values, self.weight, self.bias)
        return F.conv1d(values, self.weight, self.bias, padding=self.weight_v.shape[2] // 2)


class ChannelScale(torch.nn.Module):
    """Scales and shifts each of ``c`` channels: what a batch normalisation does in evaluation."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype, start: float = 1.0) -> None:
        """Make the parameters.

        Args:
            width: Number of channels.
            device: Where they live.
            dtype: Their dtype.
            start: Initial scale.
        """
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.weight.starts_at = start  # type: ignore[attr-defined]
        self.bias = torch.nn.Parameter(torch.empty(width, device=device, dtype=dtype))


class TapeProteinHead(PooledHead):
    """Applies to ``<cls>`` a weight-normed linear layer, ReLU, dropout, and a weight-normed linear layer.

    In TAPE a dense layer and tanh, BERT's pooler, come first; ProteinLM has none.
    """

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device, "cls")
        width, h = task.hidden_size or WIDTHS[task.head], config.hidden_size
        self.dense = self._linear(h, h) if task.head == "tape" else None
        self.first = WeightNormed((width, h), device, config.params_dtype)
        self.dropout = KeyedDropout(task.dropout)
        self.output = WeightNormed((num_outputs, width), device, config.params_dtype)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        pooled = features if self.dense is None else torch.tanh(self.dense(features))
        hidden = F.relu(self.first(pooled))
        return self.output(self.dropout(hidden, segments.keys))


class TokenHead(TaskHead):
    """Predicts from the hidden states of all tokens of the proteins, ``<cls>`` and ``<eos>`` included."""

    def features(self, hidden_states: Tensor, segments: Segments) -> Tensor:
        """Reduce ``[T, h]`` to the tokens of proteins, ``[E, h]``."""
        return hidden_states.index_select(0, _Tokens.of(segments).places)

    def _dropped(self, dropout: KeyedDropout, values: Tensor, segments: Segments, tokens: _Tokens) -> Tensor:
        """Drop elements of ``[E, c]`` by protein, number of the token in its piece, and channel."""
        return dropout(values, segments.keys[tokens.owners], tokens.numbers)


class _Tokens(NamedTuple):
    """Says what the tokens of the proteins of a pack are, on the device.

    Attributes:
        places: Where they are in the pack, int64 ``[E]``.
        owners: Which protein each belongs to, int64 ``[E]``.
        numbers: Number of each within its piece of a protein, from 0, int64 ``[E]``.
        residues: Which of them are residues, int64 ``[R]``.
    """

    places: Tensor
    owners: Tensor
    numbers: Tensor
    residues: Tensor

    @classmethod
    def of(cls, segments: Segments) -> _Tokens:
        """Compute them on the host, and send them without waiting."""
        lengths = np.array([len(text) for text in segments.tokens], dtype=np.int64)
        before = [0, *np.cumsum(lengths).tolist()]
        owners = np.repeat(np.arange(len(lengths)), lengths)
        numbers = np.arange(before[-1]) - np.array(before, dtype=np.int64)[owners]
        places = np.array(segments.starts, dtype=np.int64)[owners] + numbers
        residues = [
            np.arange(at + x.start, at + x.stop) for at, x in zip(before, segments.spans, strict=False)
        ]
        arrays = [places, owners, numbers, np.concatenate([np.zeros(0, dtype=np.int64), *residues])]
        return cls(*Parcel.of([torch.from_numpy(array) for array in arrays]).to(segments.keys.device))


class TapeResidueHead(TokenHead):
    """Applies scale and shift, and weight-normed convolutions over 5 and 3 tokens with ReLU between them.

    Beyond the ends of a protein a convolution sees zeros. Dropout stands before the second convolution.
    """

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        width, h, dtype = task.hidden_size or RESIDUE_WIDTH, config.hidden_size, config.params_dtype
        self.norm = ChannelScale(h, device, dtype)
        self.first = WeightNormed((width, h, _FIRST_KERNEL), device, dtype)
        self.dropout = KeyedDropout(task.dropout)
        self.output = WeightNormed((num_outputs, width, _SECOND_KERNEL), device, dtype)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        tokens, gap = _Tokens.of(segments), _FIRST_KERNEL // 2
        scaled = features * self.norm.weight + self.norm.bias
        hidden = F.relu(convolved(self.first, scaled, tokens.owners, segments.num_proteins, gap))
        hidden = self._dropped(self.dropout, hidden, segments, tokens)
        outputs = convolved(self.output, hidden, tokens.owners, segments.num_proteins, gap)
        return outputs.index_select(0, tokens.residues)


class _ResidualBlock(torch.nn.Module):
    """Computes ``relu(x + norm2(conv2(relu(norm1(conv1(x))))))`` of maps ``[1, c, s, s]``.

    The last scale starts at zero, so that a new block passes on what it gets, and 30 of them can be trained.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype, "bias": False}
        self.conv1 = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, **where)
        self.norm1 = ChannelScale(CHANNELS, device, dtype)
        self.conv2 = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, **where)
        self.norm2 = ChannelScale(CHANNELS, device, dtype, start=0.0)

    def forward(self, maps: Tensor) -> Tensor:
        hidden = F.relu(self._half(maps, self.conv1, self.norm1))
        return F.relu(maps + self._half(hidden, self.conv2, self.norm2))

    @staticmethod
    def _half(maps: Tensor, convolution: torch.nn.Conv2d, norm: ChannelScale) -> Tensor:
        maps = F.conv2d(maps, convolution.weight.to(maps.dtype), padding=1)
        scale, shift = (x.to(maps.dtype)[:, None, None] for x in (norm.weight, norm.bias))
        return maps * scale + shift


class ResidualContactHead(TokenHead):
    """Predicts contacts by 30 residual blocks on maps of products and differences, as ProteinLM does.

    A linear layer from the products and differences of two states to 64 channels is followed by the blocks
    and a linear layer to two classes, which is averaged over both orders of a pair. The products are never
    made, since a channel of their linear layer is a matrix product. Blocks are computed again in the backward
    pass. Dropout is that of the states, as in `esm2mega.model.heads.ProductHead`.
    """

    def __init__(self, config: Any, device: torch.device, task: TaskConfig, num_outputs: int) -> None:
        super().__init__(config, device)
        self.dropout = KeyedDropout(task.dropout)
        self.first = self._linear(2 * config.hidden_size, CHANNELS)
        self.blocks = torch.nn.ModuleList(_ResidualBlock(device, config.params_dtype) for _ in range(BLOCKS))
        self.output = self._linear(CHANNELS, 2)

    def predict(self, features: Tensor, segments: Segments) -> Tensor:
        """Return the logits of a contact, ``[P, 1]``: those of the class of contacts minus the other's."""
        states = self._dropped(self.dropout, features, segments, _Tokens.of(segments))
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        lengths = [len(text) for text in segments.tokens]
        maps = [
            self._map(x)[span, span] for x, span in zip(states.split(lengths), segments.spans, strict=True)
        ]
        bias = (self.output.bias[1] - self.output.bias[0]).to(states.dtype)
        # Adding the states times zero keeps a pack without proteins part of the graph.
        return (upper_triangles(maps, states.new_zeros(0)) + (states.sum() * 0.0 + bias))[:, None]

    def _map(self, states: Tensor) -> Tensor:
        """Return the logits of a contact of all pairs of tokens, without the last bias, ``[s, s]``."""
        weight, bias = self.first.weight.to(states.dtype), self.first.bias.to(states.dtype)
        of_product, of_difference = weight.chunk(2, dim=1)
        # [c, s, h] x [h, s] -> [c, s, s], and differences as [c, s, 1] - [c, 1, s]
        maps = (states * of_product[:, None, :]) @ states.T
        single = of_difference @ states.T
        maps = (maps + single[:, :, None] - single[:, None, :] + bias[:, None, None])[None]
        for block in self.blocks:
            if torch.is_grad_enabled():
                maps = checkpoint(block, maps, use_reentrant=False, preserve_rng_state=False)
            else:
                maps = block(maps)
        none, contact = self.output.weight.to(maps.dtype)
        logits = torch.einsum("c,cij->ij", contact - none, maps[0])
        return (logits + logits.T) / 2


def head_class(task: TaskConfig) -> Any:
    """Return the class of the head ``tape`` or ``proteinlm`` for the kind of a task."""
    if task.kind == PAIR_KIND:
        return ResidualContactHead if task.head == "proteinlm" else ProductHead
    return TapeResidueHead if task.kind in RESIDUE_KINDS else TapeProteinHead
