"""A small configuration and its parts, for tests that train or save in one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esm2mega.batch import PackedBatch
from esm2mega.config.load import load_run
from esm2mega.config.schema import Run
from esm2mega.data.store.token_store import StoreWriter
from esm2mega.model.build import build_model
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from esm2mega.train.step import TrainState

CPU = torch.device("cpu")

SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=24",
    "model.num_attention_heads=3",
    "model.ffn_hidden_size=56",
    "model.layer_spec=local",
    "model.precision=fp64",
    "data.max_seq_length=64",
    "train.micro_batch_tokens=128",
    "train.global_batch_tokens=256",
    "train.max_steps=4",
    "train.log_every=1",
    "optim.lr=2e-3",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
)


def tiny_run(*overrides: str, run_dir: Path | None = None) -> Run:
    """The configuration of `SETTINGS`, with changes."""
    directory = () if run_dir is None else (f"run_dir={run_dir}",)
    return load_run(None, [*SETTINGS, *directory, *overrides])


def proteins_run(*overrides: str, run_dir: Path) -> Run:
    """The configuration of `SETTINGS` without its token counts, with changes that count proteins."""
    settings = [text for text in SETTINGS if "batch_tokens" not in text]
    return load_run(None, [*settings, f"run_dir={run_dir}", *overrides])


def train_state(run: Run) -> TrainState:
    """Model, optimizer and schedule of a run, within process groups."""
    model: list[Any] = wrap_data_parallel(
        build_model(run.model, run.parallel, CPU, run.seed), run.model, run.parallel
    )
    optimizer = build_optimizer(run.optim, run.schedule, run.model.precision, model)
    return TrainState(
        model, optimizer, build_schedule(run.schedule, run.optim, optimizer), MLMLossReduction(), CPU
    )


def unmasked_store(path: Path) -> Path:
    """A token store of one protein, of which the masks of evaluation select no residue."""
    with StoreWriter(path) as writer:
        writer.append(["short"], [b"ML"])
    return path


def packed_batch(sequences: Sequence[Sequence[int]], labels: dict[int, int]) -> PackedBatch:
    """A micro-batch of token ids; `labels` maps positions in the pack to the tokens to predict there."""
    ids = [token for sequence in sequences for token in sequence]
    seqlens = [len(sequence) for sequence in sequences]
    ends = list(itertools.accumulate(seqlens))
    return PackedBatch(
        input_ids=torch.tensor(ids),
        cu_seqlens=torch.tensor([0, *seqlens]).cumsum(0).to(torch.int32),
        seqlens=seqlens,
        max_seqlen=max(seqlens),
        label_positions=torch.tensor(list(labels), dtype=torch.int64),
        labels=torch.tensor(list(labels.values()), dtype=torch.int64),
        label_counts=[
            sum(i in labels for i in range(end - n, end)) for end, n in zip(ends, seqlens, strict=True)
        ],
        num_tokens=len(ids),
        num_residues=len(ids) - 2 * len(seqlens),
        num_sequences=len(seqlens),
    )
