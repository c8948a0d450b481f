"""Computes the heads of TAPE and ProteinLM in plain PyTorch from their stored tensors.

It shares no code with `esm2mega.model.heads.tape_heads` and does not use the name tables, so that a mistake
in either shows.

Legend: ``s`` tokens of one protein, ``h`` hidden size, ``k`` outputs, ``c`` channels, ``P`` pairs of
residues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, linear, relu

from esm2mega.convert.verify.source import Prepare

_VALUE, _CLASSIFY, _PAIRS = "predict.value_prediction.main", "classify.classify.main", "predict.predict"


def head_of(state: Mapping[str, Tensor], prepare: Prepare) -> Callable[[Tensor], Tensor] | None:
    """Return the head of a task in evaluation; None if the tensors are of no task.

    It takes the hidden states of all tokens, ``[s, h]``, and returns ``[1, k]`` for the protein, ``[s, k]``
    for its tokens, or ``[P, 1]`` for its pairs of residues: the logit of a contact minus that of none.
    """

    def get(name: str) -> Tensor:
        return prepare(state[name])

    def normed(at: str) -> tuple[Tensor, Tensor]:
        direction = get(f"{at}.weight_v")
        return get(f"{at}.weight_g") * direction / direction.square().sum().sqrt(), get(f"{at}.bias")

    def scale(at: str) -> tuple[Tensor, Tensor]:
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (state[f"{at}.{name}"].double() for name in names)
        factor = weight / (variance + 1e-5).sqrt()
        # Rounded as converted weights are, which hold the two in place of the four.
        return prepare(factor), prepare(bias - mean * factor)

    def protein(x: Tensor, at: str) -> Tensor:
        pooled = x[:1]
        if "bert.pooler.dense.weight" in state:
            pooled = linear(pooled, get("bert.pooler.dense.weight"), get("bert.pooler.dense.bias")).tanh()
        return linear(relu(linear(pooled, *normed(f"{at}.0"))), *normed(f"{at}.3"))

    def residues(x: Tensor) -> Tensor:
        factor, shift = scale(f"{_CLASSIFY}.0")
        hidden = relu(conv1d((x * factor + shift).T[None], *normed(f"{_CLASSIFY}.1"), padding=2))
        return conv1d(hidden, *normed(f"{_CLASSIFY}.4"), padding=1)[0].T

    def of_pairs(x: Tensor, weight: Tensor) -> Tensor:
        """Apply a linear layer to products and differences of all pairs of tokens: ``[s, s, outputs]``."""
        # Row by row, since the products of a long protein are large.
        bias = get(f"{_PAIRS}.1.bias")
        return torch.stack([linear(torch.cat([row * x, row - x], dim=-1), weight, bias) for row in x])

    def pairs(both: Tensor) -> Tensor:
        """Turn ``[s, s, 2]`` into ``[P, 1]``."""
        logits = ((both + both.transpose(0, 1)) / 2)[1:-1, 1:-1]
        first, second = torch.triu_indices(len(logits), len(logits), 1)
        return (logits[..., 1] - logits[..., 0])[first, second][:, None]

    def product(x: Tensor) -> Tensor:
        return pairs(of_pairs(x, get(f"{_PAIRS}.1.weight")))

    def residual(x: Tensor) -> Tensor:
        def half(maps: Tensor, block: str, n: int) -> Tensor:
            factor, shift = scale(f"{block}.bn{n}")
            maps = conv2d(maps, get(f"{block}.conv{n}.weight"), padding=1)
            return maps * factor[:, None, None] + shift[:, None, None]

        maps = of_pairs(x, get(f"{_PAIRS}.1.weight")[:, :, 0, 0]).permute(2, 0, 1)[None]
        for number in range(30):
            block = f"{_PAIRS}.ResidualBlock{number}"
            maps = relu(half(relu(half(maps, block, 1)), block, 2) + maps)
        last = linear(maps[0].permute(1, 2, 0), get("predict.linear.0.weight"), get("predict.linear.0.bias"))
        return pairs(last)

    if f"{_VALUE}.0.weight_v" in state:
        return lambda x: protein(x, _VALUE)
    if f"{_CLASSIFY}.0.weight_v" in state:
        return lambda x: protein(x, _CLASSIFY)
    if f"{_CLASSIFY}.0.running_mean" in state:
        return residues
    if "predict.linear.0.weight" in state:
        return residual
    return product if f"{_PAIRS}.1.weight" in state else None
