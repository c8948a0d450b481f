"""Measures what each rank of a small training really holds, for comparisons with its plan.

``python -m tests.unit.plan.real_rank OUT OVERRIDE…`` writes ``OUT/bytes_RANK.json`` on each rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron.core import parallel_state
from torch import Tensor

from esm2mega.config.load import load_run
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups
from esm2mega.plan.counting import StepCounter
from esm2mega.plan.stage import example_batch
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import TrainState, run_schedule, train_step

LENGTH = 64
MICRO_BATCHES = 4


def main(out: str, *overrides: str) -> None:
    run = load_run(None, overrides)
    with process_groups(run.parallel, seed=1) as ranks:
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        state = train_state(run, chunks, MLMLossReduction(), ranks, None)
        batches = [example_batch(run.train.micro_batch_tokens, LENGTH) for _ in range(MICRO_BATCHES)]
        buffers = [b for chunk in state.model for b in chunk.buffers]
        held = [b.grad_data for b in buffers] + [b.param_data for b in buffers if b.param_data is not None]
        inputs = [x for b in batches for x in (b.input_ids, b.cu_seqlens, b.label_positions, b.labels)]
        present = [*held, *inputs, *(x for c in chunks for x in (*c.parameters(), *c.buffers()))]
        finalize = chunks[0].config.finalize_model_grads_func
        chunks[0].config.finalize_model_grads_func = None
        counter = StepCounter(present)
        with counter:
            run_schedule(state.model, state.loss, batches, ranks.device, forward_only=False)
        chunks[0].config.finalize_model_grads_func = finalize
        train_step(state, batches)
        content = {
            "stage": ranks.pp_rank,
            "data": parallel_state.get_data_parallel_rank(with_context_parallel=True),
            "parameters": _storages([p for c in chunks for p in c.parameters()]),
            "gradients": _storages([b.grad_data for b in buffers]),
            "optimizer": _optimizer_bytes(state, chunks),
            "activations": counter.peak,
        }
    Path(out, f"bytes_{ranks.rank}.json").write_text(json.dumps(content))


def _storages(tensors: list[Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def _optimizer_bytes(state: TrainState, chunks: list) -> int:
    """Bytes of everything the optimizer keeps besides the model's own storages."""
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    inner = [part.optimizer for part in parts if part.optimizer is not None]
    trained = [p for one in inner for group in one.param_groups for p in group["params"]]
    moments = [x for one in inner for entry in one.state.values() for x in entry.values()]
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    masters = [p for p in trained if p.untyped_storage().data_ptr() not in own]
    return sum(x.nbytes for x in (*masters, *moments))


if __name__ == "__main__":
    main(*sys.argv[1:])
