"""Lists the programs of a benchmark: esm2mega in every precision, and those of others where installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from esm2mega.benchmark import peers
from esm2mega.benchmark.batches import Batches, by_tokens, mask_protein, random_order, sorted_order
from esm2mega.benchmark.ours import configured, embedding_pass, state_of, training_pass
from esm2mega.benchmark.proteins import Protein
from esm2mega.benchmark.turns import Pass, Prepare
from esm2mega.config.schema import Run
from esm2mega.model.kernels.int8 import int8_defect
from esm2mega.parallel.initialize import Ranks

OURS = "esm2mega"

Makers = dict["Contender", Callable[[], Prepare]]
"""Makes each contender's model when its section begins."""


@dataclass(frozen=True)
class Contender:
    """Names a program and the precision that it computes in."""

    program: str
    precision: str

    def __str__(self) -> str:
        return f"{self.program} {self.precision}"


@dataclass(frozen=True)
class Settings:
    """Holds what a benchmark measures.

    Attributes:
        model: Tag of a preset.
        precisions: Those of our model, and of peers that have them.
        steps: Steps of a pass over the proteins, about; packs for the data side; batches to embed.
        rounds: Counted passes of each contender.
        tokens: Most real tokens of a batch, T.
        seed: Of proteins, masks and orders.
        threads: Of the processor.
        has_peers: Whether other programs take part.
    """

    model: str
    precisions: Sequence[str]
    steps: int
    rounds: int
    tokens: int
    seed: int
    threads: int
    has_peers: bool

    @property
    def max_seq_length(self) -> int:
        """Return the most tokens of a protein."""
        return min(1024, self.tokens)

    def run(self, precision: str) -> Run:
        """Return the configuration of our model in training."""
        return configured(
            self.model,
            [
                f"optim.lr={peers.LEARNING_RATE}",
                "schedule.warmup_steps=0",
                f"model.precision={precision}",
                f"data.max_seq_length={self.max_seq_length}",
                f"train.micro_batch_tokens={self.tokens}",
                f"train.global_batch_tokens={self.tokens}",
            ],
        )


def absent_peers(settings: Settings, device: torch.device) -> dict[str, str]:
    """Return the peers that do not take part, each with the reason."""
    if not settings.has_peers:
        return {}
    absent = {name: reason for name in peers.MODULES if (reason := peers.why_absent(name)) is not None}
    if device.type != "cpu":
        absent["esm-cpp"] = "computes on processors only"
    return absent


def trainers(settings: Settings, proteins: Sequence[Protein], present: Sequence[str], ranks: Ranks) -> Makers:
    """Return who trains: in each round all on the same proteins with the same masks."""
    masked = [mask_protein(residues, number, settings.seed) for number, residues in enumerate(proteins)]
    batching = by_tokens(settings.tokens)

    def batches(number: int, order: Callable[..., Batches]) -> Batches:
        return order(masked, batching, np.random.default_rng([settings.seed, number]))

    def ours(precision: str) -> Prepare:
        state = state_of(settings.run(precision), ranks)
        return lambda number: training_pass(state, batches(number, random_order))

    def hugging_face(precision: str, order: Callable[..., Batches]) -> Prepare:
        trainer = peers.HuggingFaceTrainer(settings.model, precision, ranks.device)
        return lambda number: trainer.pass_over(batches(number, order))

    makers: Makers = {Contender(OURS, p): partial(ours, p) for p in settings.precisions}
    if "transformers" in present:
        for p in settings.precisions:
            makers[Contender("hf-random", p)] = partial(hugging_face, p, random_order)
            makers[Contender("hf-sorted", p)] = partial(hugging_face, p, sorted_order)
    return makers


def embedders(
    settings: Settings, batches: Sequence[Sequence[Protein]], present: Sequence[str], ranks: Ranks
) -> Makers:
    """Return who embeds: all of them the same proteins, those who pad in batches sorted by length."""
    size, device = settings.model, ranks.device
    proteins = [protein for batch in batches for protein in batch]

    def always(make: Callable[[], Pass]) -> Callable[[], Prepare]:
        def maker() -> Prepare:
            work = make()
            return lambda number: work

        return maker

    in_int8 = ["int8"] if device.type == "cpu" and int8_defect() is None else []
    makers: Makers = {
        Contender(OURS, p): always(partial(embedding_pass, size, p, proteins, ranks))
        for p in [*settings.precisions, *in_int8]
    }
    for package, name, peer in (
        ("transformers", "hf-sorted", peers.hf_embedding),
        ("fair-esm", "fair-esm", peers.fair_esm_embedding),
    ):
        if package in present:
            for p in settings.precisions:
                makers[Contender(name, p)] = always(partial(peer, batches, size, p, device))
    if "esm-cpp" in present:
        for p in ("fp32", "int8"):
            makers[Contender("esm-cpp", p)] = always(
                partial(peers.esm_cpp_embedding, batches, size, p, settings.threads)
            )
    return makers
