"""Our model with its optimizer and loss, ready for the training steps that the benchmarks time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esm2mega.train.step import TrainState


@contextmanager
def training(size: str, changes: Sequence[str]) -> Iterator[TrainState]:
    """Yield what a step of pretraining touches, in process groups that end with the block.

    Args:
        size: Tag of a preset; its configuration is the shipped one.
        changes: What differs from that configuration, as on the command line.
    """
    from esm2mega.config.load import load_run
    from esm2mega.model.build import build_model
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import train_state

    run = load_run(f"pretrain_esm2_{size}", list(changes))
    with process_groups(run.parallel, run.seed) as ranks:
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        yield train_state(run, chunks, MLMLossReduction(), ranks, None)
