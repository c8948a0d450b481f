"""Runs a training step on a CUDA device that computes nothing, and prints what it asked of the device.

python tests/gpu/fake_step.py STAND_IN PLANT OVERRIDE ...
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from esm2mega.config.load import load_run
from esm2mega.model.build import build_model
from esm2mega.model.layer import ESM2Layer
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import launch_step
from tests.gpu.cases import packed_batch
from tests.gpu.fake_cuda import fake_cuda
from tests.te_stub import transformer_engine

MICRO_BATCHES = 2


def main(stand_in: str, plant: str, *overrides: str) -> None:
    original = ESM2Layer.forward
    of_layers: list[dict[str, int]] = []
    backward: list[Counter[str]] = []

    def counted(self: Any, hidden_states: Any, **others: Any) -> Any:
        if plant == "item":
            hidden_states.sum().item()
        before = watch.operations.copy()
        outputs = original(self, hidden_states, **others)
        of_layers.append(dict(watch.operations - before))
        # Called when the gradient of the input is complete: layer by layer, from the last one.
        hidden_states.register_hook(lambda gradient: backward.append(watch.operations.copy()))
        return outputs

    batches = [packed_batch() for _ in range(MICRO_BATCHES)]
    run = load_run("pretrain_esm2_tiny", list(overrides))
    te = transformer_engine() if run.model.layer_spec == "te" else nullcontext()
    world = fake_cuda(Path(stand_in), run.parallel.tensor_model_parallel_size)
    with te, world as watch, process_groups(run.parallel, seed=1) as ranks:
        (model,) = build_model(run.model, run.parallel, ranks.device, run.seed)
        state = train_state(run, [model], MLMLossReduction(), ranks, None)
        launch_step(state, batches)  # makes the optimizer's state
        watch.operations.clear()
        watch.transfers.clear()
        watch.waits.clear()
        with patch.object(ESM2Layer, "forward", counted):
            launched = launch_step(state, batches)
        waits, transfers = dict(watch.waits), dict(watch.transfers)
        launched.result()
        found = {"waits": waits, "transfers": transfers, "layer": of_layers[0]}
        # The layer before the last one of the first micro-batch.
        found["backward"] = dict(backward[1] - backward[0])
        found["result"] = dict(watch.waits - type(watch.waits)(waits))
        print(json.dumps({**found, "attention": model.config.packed_attention}))


main(*sys.argv[1:])
