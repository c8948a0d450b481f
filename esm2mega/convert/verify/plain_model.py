"""Computes ESM-2 and its relatives in plain PyTorch, for verifications without the package of a format.

This module shares no code with `esm2mega.model`, and its weights are read without the name tables, so that a
mistake in either shows.

Legend: ``s`` tokens of one sequence, ``h`` hidden size, ``n`` heads, ``d`` head dimension, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

_MASK_TOKEN = 32


@dataclass(frozen=True)
class Affine:
    """Holds the weight and bias of a linear layer or a LayerNorm."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PlainBlock:
    """Holds the weights of one layer, with separate q, k and v whose rows are ordered by head."""

    attention_norm: Affine
    q: Affine
    k: Affine
    v: Affine
    attention_out: Affine
    ffn_norm: Affine
    ffn_in: Affine
    ffn_out: Affine


@dataclass(frozen=True)
class PlainModel:
    """Holds everything that the forward pass needs.

    Attributes:
        block: Returns layer ``0 … num_layers - 1``; called once for each layer in a forward pass.
        table: Token table ``[v, h]``, used for input and output.
        inv_freq: Rotary frequencies ``[d/2]``, or None for learned positions.
        tanh_gelu: Whether the feed-forward layers have the tanh form; the head has the erf form.
        interleaved: Whether rotary pairs are the channels ``(2i, 2i + 1)`` instead of ``(i, i + d/2)``.
        positions: Learned positions ``[p, h]``, or None for ESM-2, which has rotary ones and token dropout.
        post_norm: Whether the outputs of the LayerNorms are the residuals.
        tokens: Id in ESM-2 of the token of each row of the table, int64 ``[v]``; None if the two are equal.
        classifier: Takes the place of the masked-language-model head, whose tensors are then None, as they
            are in a bare encoder.
    """

    num_layers: int
    num_heads: int
    epsilon: float
    block: Callable[[int], PlainBlock]
    table: Tensor
    final_norm: Affine | None
    head_dense: Affine | None
    head_norm: Affine | None
    head_bias: Tensor | None
    inv_freq: Tensor | None = None
    tanh_gelu: bool = False
    interleaved: bool = False
    positions: Tensor | None = None
    post_norm: bool = False
    tokens: Tensor | None = None
    classifier: Callable[[Tensor], Tensor] | None = None


@torch.no_grad()
def forward(model: PlainModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run the model on one sequence.

    Args:
        model: The weights, in the dtype to compute in.
        ids: Token ids of ESM-2 with ``<cls>`` and ``<eos>``, int64 ``[s]``.

    Returns:
        Hidden states after the embedding and each block, the last after the final LayerNorm, ``[s, h]`` each;
        and logits ``[s, v]`` in the order of ESM-2's tokens as far as the model has them, or those of the
        classifier. A model without a head returns the last hidden states instead of logits.
    """
    x = _embed(model, ids)
    hidden = [x]
    for n in range(model.num_layers):
        block = model.block(n)
        y = _norm(x, block.attention_norm, model.epsilon)
        if model.post_norm:
            # This LayerNorm ends the layer before in post-LN, so its result is the output of that layer.
            hidden[-1] = y
        x = (y if model.post_norm else x) + _attention(model, block, y)
        y = _norm(x, block.ffn_norm, model.epsilon)
        inner = gelu(_affine(y, block.ffn_in), approximate="tanh" if model.tanh_gelu else "none")
        x = (y if model.post_norm else x) + _affine(inner, block.ffn_out)
        hidden.append(x)
    if model.final_norm is not None:
        hidden[-1] = _norm(x, model.final_norm, model.epsilon)
    if model.classifier is not None:
        return hidden, model.classifier(hidden[-1])
    if model.head_dense is None or model.head_norm is None:
        return hidden, hidden[-1]
    y = _norm(gelu(_affine(hidden[-1], model.head_dense)), model.head_norm, model.epsilon)
    logits = linear(y, model.table, model.head_bias)
    return hidden, logits if model.tokens is None else logits[:, model.tokens.argsort()]


def classifier(get: Callable[[str], Tensor], kind: str) -> Callable[[Tensor], Tensor]:
    """Return the head of a classification model of transformers in evaluation, where dropout has no effect.

    Args:
        get: Returns a tensor by its name in transformers.
        kind: ``token`` for a linear layer on every token, ``[s, h] -> [s, c]``; ``sequence`` for dense, tanh
            and linear on ``<cls>``, ``[s, h] -> [1, c]``.
    """

    def affine(name: str) -> Affine:
        return Affine(get(f"{name}.weight"), get(f"{name}.bias"))

    if kind == "token":
        head = affine("classifier")
        return lambda x: _affine(x, head)
    dense, out = affine("classifier.dense"), affine("classifier.out_proj")
    return lambda x: _affine(_affine(x[:1], dense).tanh(), out)


def gelu_classifier(dense: Affine, out: Affine) -> Callable[[Tensor], Tensor]:
    """Return Model Zoo's classifier: dense, GELU and linear on ``<cls>``, ``[s, h] -> [1, c]``."""
    return lambda x: _affine(gelu(_affine(x[:1], dense)), out)


def _embed(model: PlainModel, ids: Tensor) -> Tensor:
    if model.positions is not None:
        assert model.tokens is not None
        row_of_token = {int(token): row for row, token in enumerate(model.tokens)}
        rows = torch.tensor([row_of_token[int(token)] for token in ids])
        return model.table[rows] + model.positions[: len(ids)]
    masked = ids == _MASK_TOKEN
    x = model.table[ids].masked_fill(masked[:, None], 0.0)
    return x * ((1 - 0.15 * 0.8) / (1 - masked.double().mean())).to(x.dtype)


def _attention(model: PlainModel, block: PlainBlock, x: Tensor) -> Tensor:
    # [s, h] -> [n, s, d]
    q, k, v = (
        _affine(x, part).unflatten(-1, (model.num_heads, -1)).transpose(0, 1)
        for part in (block.q, block.k, block.v)
    )
    q = _rotate(q * q.shape[-1] ** -0.5, model)
    weights = torch.softmax(q @ _rotate(k, model).transpose(1, 2), dim=-1)
    # [n, s, d] -> [s, h]
    return _affine((weights @ v).transpose(0, 1).flatten(1), block.attention_out)


def _rotate(x: Tensor, model: PlainModel) -> Tensor:
    """Rotate pair i of position p by ``p * inv_freq[i]`` in ``[n, s, d]``."""
    if model.inv_freq is None:
        return x
    positions = torch.arange(x.shape[1], dtype=model.inv_freq.dtype)
    angles = torch.outer(positions, model.inv_freq)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    first = slice(0, None, 2) if model.interleaved else slice(0, half)
    second = slice(1, None, 2) if model.interleaved else slice(half, None)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def _norm(x: Tensor, norm: Affine, epsilon: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, epsilon)


def _affine(x: Tensor, layer: Affine) -> Tensor:
    return linear(x, layer.weight, layer.bias)
