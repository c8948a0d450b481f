"""The automatic split is the best there is, and in the form that Megatron-Core takes."""

from __future__ import annotations

import itertools

import pytest

from esm2mega.config.presets import PRESETS, ModelShape
from esm2mega.model.pipeline_split import pipeline_layout, split_layers

SMALL = ModelShape(num_layers=1, hidden_size=48, ffn_hidden_size=88, num_attention_heads=12)


@pytest.mark.parametrize(
    ("size", "stages", "whole", "expected"),
    [
        # The head costs more than the embedding, so the longer half comes first.
        ("650M", 2, True, [17, 16]),
        # One layer too many for equal stages: a middle one has neither embedding nor head.
        ("650M", 4, True, [8, 8, 9, 8]),
        ("650M", 8, True, [4, 4, 4, 4, 4, 4, 5, 4]),
        # The last layer saves more than the head costs.
        ("650M", 2, False, [16, 17]),
        ("650M", 4, False, [8, 8, 8, 9]),
        ("650M", 8, False, [4, 4, 4, 4, 4, 4, 4, 5]),
        ("650M", 3, True, [11, 11, 11]),
        ("650M", 3, False, [11, 11, 11]),
        ("8M", 4, True, [1, 2, 2, 1]),
        ("8M", 4, False, [1, 1, 2, 2]),
        ("35M", 1, False, [12]),
    ],
)
def test_published_sizes(size: str, stages: int, whole: bool, expected: list[int]) -> None:
    assert split_layers(PRESETS[size], stages, padded_vocab_size=40, last_layer_whole=whole) == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layers", range(1, 11))
def test_no_other_split_has_a_faster_slowest_stage(layers: int, whole: bool) -> None:
    shape = SMALL._replace(num_layers=layers)
    h, f = shape.hidden_size, shape.ffn_hidden_size
    layer = 4 * h * h + 2 * h * f

    def slowest(counts: tuple[int, ...] | list[int]) -> float:
        costs = [float(count * layer) for count in counts]
        costs[0] += h
        costs[-1] += 0.15 * (h * h + 40 * h)
        if not whole:
            # Query, projection and feed-forward of 15 % of the tokens.
            costs[-1] += 0.15 * (2 * h * h + 2 * h * f) - (2 * h * h + 2 * h * f)
        return max(costs)

    for stages in range(1, layers + 1):
        counts = split_layers(shape, stages, padded_vocab_size=40, last_layer_whole=whole)
        assert sum(counts) == layers and min(counts) >= 1 and len(counts) == stages
        assert max(counts) - min(counts) <= 1
        others = itertools.product(range(1, layers + 1), repeat=stages) if stages <= 4 else ()
        assert all(slowest(counts) <= slowest(other) for other in others if sum(other) == layers)


def test_layout_of_megatron_core() -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    parts = pipeline_layout([2, 1, 3])
    assert parts == [
        ["embedding", "decoder", "decoder"],
        ["decoder"],
        ["decoder", "decoder", "decoder", "loss"],
    ]
    layout = PipelineParallelLayerLayout(parts, pipeline_model_parallel_size=3)
    layout.validate_layer_layout(num_layers=6, mtp_num_layers=None)
    assert [layout.get_layer_offset(vp_stage=0, pp_rank=rank) for rank in range(3)] == [0, 2, 3]
