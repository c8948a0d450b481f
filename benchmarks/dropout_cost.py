"""Time of a training step, and memory of its activations, with dropout of hidden states and of attention.

    python benchmarks/dropout_cost.py --size 8M --lengths 128 512 1024 --json result.json

A step takes one pack of proteins of equal length: forward, backward and update, in fp32. The kinds of dropout
take turns within each round, so that a machine that gets slower or faster strikes all of them; a ratio is one
of medians over the rounds. Memory is that of the tensors which autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esm2mega.batch import PackedBatch
from esm2mega.benchmark.batches import pack, random_proteins
from esm2mega.benchmark.ours import training
from esm2mega.config.presets import PRESETS
from esm2mega.train.step import TrainState, train_step

KINDS = {"none": (0.0, 0.0), "hidden 0.1": (0.1, 0.0), "attention 0.1": (0.0, 0.1), "both 0.1": (0.1, 0.1)}
"""Gives dropout of hidden states and of attention of each kind."""


class Kept:
    """Counts the bytes that autograd keeps, each storage once, without those of the weights."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        """Leave the storages of `weights` out."""
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._storages.values())


def batch_of(length: int, tokens: int) -> PackedBatch:
    """Return a full pack of proteins of `length` tokens, numbered as samples."""
    count = tokens // length
    batch = pack(random_proteins([length] * count, seed=1))
    return replace(batch, samples=[(n, 0) for n in range(count)], starts=[n * length for n in range(count)])


def measure(state: TrainState, batch: PackedBatch, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds of a step and kept bytes of each kind."""
    model = state.model[0].module
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory = {}
    for number in range(rounds + 1):
        for kind, (hidden, attention) in KINDS.items():
            model.config.keyed_hidden_dropout = hidden
            model.config.keyed_attention_dropout = attention
            state.dropout_seed = 1 if hidden or attention else None
            if number == 0:  # the first round warms up
                kept = Kept(list(model.parameters()))
                with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                    train_step(state, [batch])
                memory[kind] = kept.total
                continue
            begun = time.perf_counter()
            train_step(state, [batch])
            seconds[kind].append(time.perf_counter() - begun)
    return {kind: {"seconds": statistics.median(seconds[kind]), "kept_bytes": memory[kind]} for kind in KINDS}


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Return the results as Markdown."""
    lines = ["| tokens of a protein | dropout | step (s) | of none | kept (MB) |", "|---|---|---|---|---|"]
    for length, kinds in results.items():
        for kind, found in kinds.items():
            ratio = found["seconds"] / kinds["none"]["seconds"]
            numbers = f"{found['seconds']:.2f} | {ratio:.2f} x | {found['kept_bytes'] / 1e6:.0f}"
            lines.append(f"| {length} | {kind} | {numbers} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description="Cost of dropout in the encoder.")
    parser.add_argument("--size", default="8M", choices=list(PRESETS))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 1024], help="tokens of a protein"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    if options.tokens < max(options.lengths):
        parser.error("--tokens must hold the longest protein")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    results: dict[int, Any] = {}
    with training(options.size, ["model.precision=fp32"]) as state:
        for length in options.lengths:
            results[length] = measure(state, batch_of(length, options.tokens), options.rounds)
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps({"size": options.size, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
