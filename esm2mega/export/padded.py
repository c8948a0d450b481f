"""Defines ESM-2 on padded batches in plain PyTorch: the form in which a model is exported.

Training and inference here compute packs, by modules of Megatron-Core that need process groups. Other
programs take padded batches. The parameters have the names that they have in a checkpoint, so no table
translates them.

Legend: ``b`` proteins of a batch, ``s`` tokens of the longest, ``h`` hidden size, ``f`` feed-forward width,
``n`` heads, ``d`` head dimension, ``v`` vocabulary (33), ``k`` outputs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm2mega.config.presets import ModelShape
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.export.padded_heads import PaddedHead
from esm2mega.model.embedding import TRAINED_MASK_RATIO
from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.vocabulary import CLS, EOS, MASK

ENCODER, HEAD, CONTACTS = "encoder", "head", "contacts"

_NAMES = {ENCODER: "last_hidden_state", HEAD: "logits", CONTACTS: "contacts"}
"""Maps what can be computed to the names under which it is returned, in their order."""


class NormedLinear(nn.Module):
    """Applies a LayerNorm and a linear layer, which checkpoints hold under the name of one module."""

    def __init__(self, width: int, out: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.layer_norm_weight = nn.Parameter(torch.empty(width))
        self.layer_norm_bias = nn.Parameter(torch.empty(width))
        self.weight = nn.Parameter(torch.empty(out, width))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.epsilon)
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Computes self-attention with rotary positions over the tokens that are no padding."""

    def __init__(self, shape: ModelShape, epsilon: float) -> None:
        super().__init__()
        h = shape.hidden_size
        self.num_heads = shape.num_attention_heads
        self.linear_qkv = NormedLinear(h, 3 * h, epsilon)
        self.linear_proj = nn.Linear(h, h)

    def forward(self, x: Tensor, kept: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend within each protein.

        Args:
            x: ``[b, s, h]``.
            kept: Which tokens are no padding, bool ``[b, 1, 1, s]``.
            cos, sin: Tables of the rotation, ``[s, d / 2]``.

        Returns:
            The output ``[b, s, h]``; q and k after the rotation, ``[b, n, s, d]``.
        """
        # [b, s, 3h] -> [b, s, n, 3, d] -> three of [b, n, s, d]: rows of the weight are q, k, v of each head
        qkv = self.linear_qkv(x).unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2)
        q, k, v = qkv.unbind(dim=3)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        # [b, n, s, d] -> [b, s, h]
        return self.linear_proj(context.transpose(1, 2).flatten(2)), q, k


class MLP(nn.Module):
    """Applies the feed-forward part of a layer."""

    def __init__(self, shape: ModelShape, epsilon: float, tanh_gelu: bool) -> None:
        super().__init__()
        self.approximate = "tanh" if tanh_gelu else "none"
        self.linear_fc1 = NormedLinear(shape.hidden_size, shape.ffn_hidden_size, epsilon)
        self.linear_fc2 = nn.Linear(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class Layer(nn.Module):
    """Holds a transformer layer, pre-LN."""

    def __init__(self, shape: ModelShape, epsilon: float, tanh_gelu: bool) -> None:
        super().__init__()
        self.self_attention = Attention(shape, epsilon)
        self.mlp = MLP(shape, epsilon, tanh_gelu)


class PaddedESM2(nn.Module):
    """Computes ESM-2 on padded batches, without Megatron-Core and process groups.

    Attributes:
        outputs: Which of `ENCODER`, `HEAD` and `CONTACTS` are computed.
    """

    # Plain containers, which give the parameters the names of a checkpoint.
    embedding: Any
    rotary: Any
    encoder: Any
    lm_head: Any
    output_layer: Any
    contact_head: Any

    def __init__(
        self,
        shape: ModelShape,
        epsilon: float,
        tanh_gelu: bool,
        outputs: Sequence[str],
        task: HeadDescription | None = None,
    ) -> None:
        """Build the modules with unset weights; `load_state_dict` with the names of a checkpoint fills them.

        Args:
            shape: Dimensions of the model.
            epsilon: Epsilon of every LayerNorm.
            tanh_gelu: Whether the feed-forward layers have the tanh form of GELU.
            outputs: What to compute.
            task: Head of a task; None for that of masked language modelling.
        """
        super().__init__()
        layers, h, _, heads = shape
        self.outputs = tuple(outputs)
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(VOCAB_SIZE, h)})
        self.rotary = nn.Module()
        self.rotary.register_buffer("inv_freq", torch.empty(h // heads // 2))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(shape, epsilon, tanh_gelu) for _ in range(layers))
        self.encoder.final_layernorm = nn.LayerNorm(h, epsilon)
        self.head = PaddedHead(task) if HEAD in self.outputs and task is not None else None
        if HEAD in self.outputs and task is None:
            self.lm_head = nn.ModuleDict({"dense": nn.Linear(h, h), "layer_norm": nn.LayerNorm(h, epsilon)})
            self.output_layer = nn.Module()
            self.output_layer.bias = nn.Parameter(torch.empty(VOCAB_SIZE))
        if CONTACTS in self.outputs:
            self.contact_head = nn.ModuleDict({"regression": nn.Linear(layers * heads, 1)})

    @property
    def output_names(self) -> list[str]:
        """Return the names of what `forward` returns, in their order."""
        return [name for output, name in _NAMES.items() if output in self.outputs]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run the model.

        Args:
            input_ids: Token ids with ``<cls>`` and ``<eos>``, int64 ``[b, s]``, at least one residue each.
            attention_mask: 1 for tokens and 0 for padding, which is behind them, int64 ``[b, s]``.

        Returns:
            What `outputs` asks for, 0 at padding: ``last_hidden_state [b, s, h]``, after the final LayerNorm;
            ``logits``, ``[b, s, v]`` of masked language modelling, or what the head of the task returns; and
            ``contacts``, probabilities ``[b, s, s]``, which are 0 at ``<cls>`` and ``<eos>`` too.
        """
        kept = attention_mask.bool()
        residues = kept & (input_ids != CLS) & (input_ids != EOS)
        angles = torch.outer(torch.arange(input_ids.shape[1]).to(torch.float32), self.rotary.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        x, maps = self._embed(input_ids, kept), torch.zeros(())
        for number, layer in enumerate(self.encoder.layers):
            attended, q, k = layer.self_attention(x, kept[:, None, None], cos, sin)
            x = x + attended
            x = x + layer.mlp(x)
            if CONTACTS in self.outputs:
                weight = self.contact_head["regression"].weight[0].unflatten(0, (-1, q.shape[1]))[number]
                maps = maps + weighted_maps(q, k, weight, kept, residues)
        x = self.encoder.final_layernorm(x)
        results = {}
        if ENCODER in self.outputs:
            results[_NAMES[ENCODER]] = x.masked_fill(~kept[:, :, None], 0.0)
        if HEAD in self.outputs:
            results[_NAMES[HEAD]] = self._head(x, kept, residues)
        if CONTACTS in self.outputs:
            found = torch.sigmoid(maps + self.contact_head["regression"].bias)
            results[_NAMES[CONTACTS]] = found.masked_fill(~_pairs(residues), 0.0)
        return results

    def _embed(self, input_ids: Tensor, kept: Tensor) -> Tensor:
        """Embed with ESM-2's token dropout, ``[b, s, h]``; see `esm2mega.model.embedding`."""
        masked = (input_ids == MASK) & kept
        share = masked.sum(dim=1).float() / kept.sum(dim=1).float()
        scale = (1.0 - TRAINED_MASK_RATIO) / (1.0 - share)
        x = self.embedding["word_embeddings"](input_ids) * scale[:, None, None]
        return x.masked_fill(masked[:, :, None], 0.0)

    def _head(self, x: Tensor, kept: Tensor, residues: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x, residues)
        x = self.lm_head["layer_norm"](F.gelu(self.lm_head["dense"](x)))
        # The token table is the decoder, too.
        logits = F.linear(x, self.embedding["word_embeddings"].weight, self.output_layer.bias)
        return logits.masked_fill(~kept[:, :, None], 0.0)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(i, i + d / 2)`` of every position, ``[b, n, s, d]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def weighted_maps(q: Tensor, k: Tensor, weight: Tensor, kept: Tensor, residues: Tensor) -> Tensor:
    """Return the sum over heads of the weighted, corrected attention maps, see `contact_maps`.

    Args:
        q, k: ``[b, n, s, d]``, after the rotation.
        weight: Weight of the regression for each head, ``[n]``.
        kept: Which tokens are no padding, bool ``[b, s]``.
        residues: Which tokens are residues, bool ``[b, s]``.

    Returns:
        ``[b, s, s]``, which is 0 where not both tokens are residues.
    """
    products = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    maps = torch.softmax(products.masked_fill(~kept[:, None, None], -torch.inf), dim=-1)
    maps = maps.masked_fill(~_pairs(residues)[:, None], 0.0)
    maps = maps + maps.transpose(2, 3)
    rows = maps.sum(dim=-1)
    average_product = rows.unsqueeze(3) * rows.unsqueeze(2) / rows.sum(dim=-1)[..., None, None]
    return torch.einsum("n,bnij->bij", weight, maps - average_product)


def _pairs(residues: Tensor) -> Tensor:
    """Return which pairs of tokens are residues, bool ``[b, s, s]``."""
    return residues[:, :, None] & residues[:, None]
