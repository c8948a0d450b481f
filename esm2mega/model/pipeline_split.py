"""Decides how many layers each pipeline stage gets when two also hold embedding and head.

Legend: ``h`` hidden size, ``f`` width of the feed-forward layers, ``V`` rows of the token table.
"""

from __future__ import annotations

from collections.abc import Sequence

from esm2mega.config.presets import ModelShape
from esm2mega.config.schema import ModelConfig, ParallelConfig

# Share of the tokens that get logits: ESM-2 selects 15 % of the residues (Lin et al. 2023).
LABELLED_SHARE = 0.15


def last_layer_is_whole(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Return whether the last layer computes all tokens, and not only those that get logits.

    It does under sequence parallelism, which scatters the tokens over ranks evenly, and in post-LN.
    """
    return parallel.sequence_parallel or model.family == "proteinbert_postln"


def split_layers(
    shape: ModelShape, stages: int, padded_vocab_size: int, last_layer_whole: bool = False
) -> list[int]:
    """Divide the layers such that the slowest stage is as fast as it can be.

    Costs are multiply-adds per token, in units of one layer, ``4 h^2 + 2 h f``: the head costs ``h^2 + h V``
    at the labelled tokens, the embedding one product per channel. The last layer computes keys and values,
    ``2 h^2``, for all tokens, and the rest for the labelled ones only (see `esm2mega.model.layer`). Attention
    scores depend on the proteins' lengths and are left out, as if they cost the same in every layer. Each
    layer goes to the stage that costs least so far; among equal ones to the last, which keeps the activations
    of the fewest micro-batches.

    Args:
        shape: Dimensions of the model; at least as many layers as stages.
        stages: Pipeline stages, first to last.
        padded_vocab_size: ``V``.
        last_layer_whole: Whether the last layer computes everything for all tokens, from
            `last_layer_is_whole`.

    Returns:
        One number per stage, each at least 1; all equal if `stages` divides the number of layers.
    """
    h, f = shape.hidden_size, shape.ffn_hidden_size
    layer = 4 * h * h + 2 * h * f
    costs = [1.0] * stages
    costs[0] += h / layer
    costs[-1] += LABELLED_SHARE * (h * h + h * padded_vocab_size) / layer
    if not last_layer_whole:
        costs[-1] -= (1 - LABELLED_SHARE) * (layer - 2 * h * h) / layer
    counts = [1] * stages
    for _ in range(shape.num_layers - stages):
        stage = min(range(stages), key=lambda number: (costs[number], -number))
        counts[stage] += 1
        costs[stage] += 1.0
    return counts


def pipeline_layout(counts: Sequence[int]) -> list[list[str]]:
    """Return `counts` as Megatron-Core's ``pipeline_model_parallel_layout``, a list of parts per stage."""
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
