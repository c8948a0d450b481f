"""A plan has the bytes of real ranks: states exact, activations within one per cent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esm2mega.config.load import load_run
from esm2mega.plan.estimate import estimate
from tests.ranks import run_ranks
from tests.unit.plan.real_rank import LENGTH, MICRO_BATCHES

MODEL = (
    *("model.num_layers=9", "model.hidden_size=48", "model.num_attention_heads=6"),
    *("model.ffn_hidden_size=104", "data.max_seq_length=64", "train.micro_batch_tokens=512"),
)
LAYOUTS = {
    "TP2 PP2": (
        *("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
        *("parallel.sequence_parallel=true", "model.precision=bf16", "model.recompute=full"),
    ),
    "PP2 DP2": (
        *("parallel.pipeline_model_parallel_size=2", "parallel.distributed_optimizer=true"),
        "model.precision=bf16",
    ),
    "CP2 DP2": (
        *("parallel.context_parallel_size=2", "parallel.distributed_optimizer=true"),
        *("data.max_seq_length=512", "model.recompute=selective"),
    ),
}


@pytest.mark.parametrize(
    "layout", ["PP2 DP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TP2 PP2", "CP2 DP2"))]
)
def test_real_ranks_have_the_bytes_of_the_plan(layout: str, tmp_path: Path) -> None:
    world_size = 4
    dp_size = 2 if "DP2" in layout else 1
    words = [*MODEL, f"train.global_batch_tokens={512 * MICRO_BATCHES * dp_size}", *LAYOUTS[layout]]
    run_ranks(["-m", "tests.unit.plan.real_rank", str(tmp_path), *words], world_size, tmp_path / "output")
    real = [json.loads((tmp_path / f"bytes_{rank}.json").read_text()) for rank in range(world_size)]

    plan = estimate(load_run(None, words), world_size, "cpu", None, LENGTH)
    assert plan.micro_batches == MICRO_BATCHES
    assert sorted(stage.layers for stage in plan.stages) in ([4, 5], [9])
    for rank in real:
        stage = plan.stages[rank["stage"]]
        states = stage.states
        found = states.parameters, states.gradients, states.optimizer[rank["data"]]
        assert found == (rank["parameters"], rank["gradients"], rank["optimizer"])
        assert stage.activations == pytest.approx(rank["activations"], rel=0.01)
