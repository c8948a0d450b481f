"""Computes outputs and trains heads on a CUDA device that computes nothing, and prints where that waits.

python tests/gpu/fake_outputs.py STAND_IN
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from esm2mega.batch import LabelledBatch
from esm2mega.config.load import load_run
from esm2mega.config.schema import ParallelConfig, Run, TaskConfig
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.finetune.losses import loss_of_task
from esm2mega.infer.engine import Engine, OutputRequest, WindowPack
from esm2mega.infer.windows import whole
from esm2mega.model.build import build_model
from esm2mega.model.heads import head_of_task
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.train.optimizer import train_state
from esm2mega.train.signals import StopSignal
from esm2mega.train.step import launch_step
from tests.gpu.fake_cuda import fake_cuda
from tests.task_batches import one_pack, proteins_of

SEQUENCES = ["MKTAYIAK", "LAG", "WYVTS"]
RESIDUES = sum(map(len, SEQUENCES))


def engine(run: Run, ranks: Ranks, contacts: bool) -> Callable[[], object]:
    """Contacts and hidden states of packs, or logits of some of their tokens."""
    (model,) = build_model(run.model, run.parallel, ranks.device, run.seed)
    model.eval().requires_grad_(False)
    windows = [whole(len(sequence)) for sequence in SEQUENCES]
    tokens = np.full(sum(window.num_tokens for window in windows), 5, dtype=np.uint8)
    request, rows = OutputRequest(logits=True), np.array([2, 3, 11])
    if contacts:
        maps = torch.ones(model.config.num_layers * model.config.num_attention_heads)
        request, rows = OutputRequest(layers=(0, 2), contact_head=(maps, 0.1)), None
    made = Engine(model, ranks, request, 64)
    return lambda: list(made.run([WindowPack(windows, tokens, rows)] * 2))


def head(
    run: Run, ranks: Ranks, task: TaskConfig, info: TargetInfo, batch: LabelledBatch
) -> Callable[[], object]:
    """A step of training the head of a task."""
    make_head = head_of_task(task, info.num_outputs)
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed, make_head)
    state = train_state(run, chunks, loss_of_task(task, info), ranks, None)
    return lambda: launch_step(state, [batch, batch])


def subjects(run: Run, ranks: Ranks) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "contacts", engine(run, ranks, contacts=True)
    yield "logits", engine(run, ranks, contacts=False)
    numbers = proteins_of(SEQUENCES, np.zeros((len(SEQUENCES), 1)))
    scaled = TargetInfo("regression", ["y"], [3], [0.5], [2.0])
    yield "regression", head(run, ranks, TaskConfig(kind="regression"), scaled, one_pack(numbers))
    classes = proteins_of(SEQUENCES, np.zeros((RESIDUES, 1), dtype=np.int64), per_residue=True)
    known = TargetInfo("token_classification", ["a", "b"], [7, 9], columns=["s"], widths=[2])
    balanced = TaskConfig(kind="token_classification", head="tape", dropout=0.1, class_weights="balanced")
    yield "signal", StopSignal(ranks.device).received
    yield "tape", head(run, ranks, balanced, known, one_pack(classes))


def main(stand_in: str) -> None:
    run = load_run("pretrain_esm2_tiny", ["model.precision=bf16"])
    found = {}
    with fake_cuda(Path(stand_in)) as watch, process_groups(ParallelConfig(), seed=1) as ranks:
        for name, act in subjects(run, ranks):
            act()  # sends what stays on the device
            watch.waits.clear()
            watch.transfers.clear()
            act()
            found[name] = {"waits": dict(watch.waits), "transfers": dict(watch.transfers)}
    print(json.dumps(found))


main(*sys.argv[1:])
