"""The masks of the encoder's dropout by Python's integers, and models that use them in plain fp64.

Nothing here comes from the package: it is written from what the documentation says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
EMBEDDING, ATTENTION, MLP, HEADS = 0, 1, 2, 3


def splitmix(state: int) -> int:
    """The output function of splitmix64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)


def jump(state: int, count: int) -> int:
    """Number `count` - 1 of the stream that starts at `state`."""
    return splitmix((state + count * _GOLDEN) & _WORD)


def factors(piece: int, position: int, layer: int, place: int, count: int, p: float) -> list[float]:
    """What dropout multiplies the elements of a row by: 0, or the inverse of the share that is kept."""
    row = jump(jump(piece & _WORD, position + 1), layer * 2**20 + place + 1)
    level = max(1, round(p * 65536))
    found = []
    for element in range(count):
        bits = (jump(row, element // 4 + 1) >> (16 * (element % 4))) & 0xFFFF
        signed = bits - 65536 if bits >= 32768 else bits
        found.append(0.0 if signed + 32768 < level else 65536 / (65536 - level))
    return found


@dataclass
class PlainModel:
    """The whole model on one piece of a protein, written out.

    Attributes:
        weights: Parameters and buffers by their names in the model.
        family: As `model.family`.
        layers: Number of layers.
        heads: Number of heads.
        hidden: Dropout of hidden states.
        attention: Dropout of the probabilities of attention.
    """

    weights: dict[str, Tensor]
    family: str
    layers: int
    heads: int
    hidden: float
    attention: float

    def logits(self, ids: Tensor, piece: int) -> Tensor:
        """Logits of every token, ``[s, 33]``, in training, where the key of the piece is `piece`."""
        post, length = self.family == "proteinbert_postln", len(ids)
        width = self.weights["embedding.word_embeddings.weight"].shape[1]

        def dropped(x: Tensor, layer: int, place: int) -> Tensor:
            rows = [factors(piece, i, layer, place, width, self.hidden) for i in range(length)]
            return x * torch.tensor(rows, dtype=torch.float64) if self.hidden else x

        x = self.weights["embedding.word_embeddings.weight"][ids]
        if self.family == "esm2":
            masked = ids == 32
            x = x * ((1 - 0.15 * 0.8) / (1 - masked.double().mean())) * ~masked[:, None]
        else:
            x = x + self.weights["embedding.position_embeddings.weight"][:length]
        if self.family == "proteinbert_preln":
            x = dropped(x, 0, EMBEDDING)
        for layer in range(1, self.layers + 1):
            name = f"encoder.layers.{layer - 1}."
            y = self._norm(x, f"{name}input_layernorm")
            if post and layer == 1:
                y = dropped(y, 0, EMBEDDING)
            x = (y if post else x) + dropped(self._attention(y, layer, piece), layer, ATTENTION)
            y = self._norm(x, f"{name}pre_mlp_layernorm")
            inner = gelu(self._linear(y, f"{name}mlp.linear_fc1"))
            x = (y if post else x) + dropped(self._linear(inner, f"{name}mlp.linear_fc2"), layer, MLP)
        x = self._norm(x, "encoder.final_layernorm")
        x = self._norm(gelu(self._linear(x, "lm_head.dense")), "lm_head.layer_norm")
        table = self.weights["embedding.word_embeddings.weight"]
        return (x @ table.T + self.weights["output_layer.bias"])[:, :33]

    def _attention(self, y: Tensor, layer: int, piece: int) -> Tensor:
        name, length = f"encoder.layers.{layer - 1}.self_attention.", len(y)
        qkv = self._linear(y, f"{name}linear_qkv").view(length, self.heads, 3, -1)
        results = []
        for head in range(self.heads):
            q, k, v = qkv[:, head].unbind(1)
            if self.family == "esm2":
                q, k = self._rotated(q), self._rotated(k)
            weights = (q @ k.T / math.sqrt(q.shape[1])).softmax(1)
            if self.attention:
                rows = [factors(piece, i, layer, HEADS + head, length, self.attention) for i in range(length)]
                weights = weights * torch.tensor(rows, dtype=torch.float64)
            results.append(weights @ v)
        return self._linear(torch.cat(results, dim=1), f"{name}linear_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * self.weights["rotary.inv_freq"]
        first, second = x.chunk(2, dim=1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)
