"""Makes passes of our own model: optimizer steps of pretraining, and embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from esm2mega.benchmark.batches import Batches, pack, real_tokens
from esm2mega.benchmark.proteins import Protein
from esm2mega.benchmark.turns import Pass
from esm2mega.config.load import load_run
from esm2mega.config.schema import Run
from esm2mega.infer.engine import Engine, OutputRequest
from esm2mega.infer.proteins import Embedder, Lengths, micro_batch_tokens
from esm2mega.model.build import build_model
from esm2mega.model.kernels.int8 import quantize
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.train.losses import MLMLossReduction
from esm2mega.train.optimizer import train_state
from esm2mega.train.step import TrainState, train_step


def configured(size: str, changes: Sequence[str]) -> Run:
    """Return the shipped configuration of the pretraining of a size, changed as on the command line."""
    return load_run(f"pretrain_esm2_{size}", list(changes))


def state_of(run: Run, ranks: Ranks) -> TrainState:
    """Return what a step of a pretraining touches."""
    chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
    return train_state(run, chunks, MLMLossReduction(), ranks, None)


@contextmanager
def training(size: str, changes: Sequence[str]) -> Iterator[TrainState]:
    """Yield what a step of pretraining touches, in process groups that end with the block.

    Args:
        size: Tag of a preset; its configuration is the shipped one.
        changes: What differs from that configuration, as on the command line.
    """
    run = configured(size, changes)
    with process_groups(run.parallel, run.seed) as ranks:
        yield state_of(run, ranks)


def training_pass(state: TrainState, batches: Batches) -> Pass:
    """Return whole optimizer steps, one for each batch, as a pack without padding; units are tokens."""
    packs = [pack(batch) for batch in batches]

    def steps() -> None:
        for one in packs:
            train_step(state, [one])

    return Pass(steps, real_tokens(batches))


def embedding_pass(size: str, precision: str, proteins: Sequence[Protein], ranks: Ranks) -> Pass:
    """Return the work of `esm2mega embed` without files; units are tokens with `<cls>` and `<eos>`.

    Proteins come in a random order, in packs; the vectors of the last layer reach the host in fp32. int8
    means the products of the layers, as for ``embed --precision int8``.
    """
    in_int8 = precision == "int8"
    run = configured(size, [f"model.precision={'fp32' if in_int8 else precision}", "infer.outputs=[residue]"])
    shuffled = [proteins[i] for i in np.random.default_rng(0).permutation(len(proteins))]
    limits = Lengths.of(run.infer, run.data)
    assert max(map(len, proteins)) <= limits.most_residues
    (model,) = build_model(run.model, run.parallel, ranks.device, run.seed)
    model.eval().requires_grad_(False)
    if in_int8:
        quantize(model)
    layers = run.model.num_layers
    assert layers is not None
    tokens = micro_batch_tokens(run.infer, ranks.device)
    engine = Engine(model, ranks, OutputRequest((layers,)), tokens)
    embedder = Embedder(engine, run.infer, limits, Path())
    name = f"residue/layer_{layers}"

    def embed() -> None:
        vectors = sum(len(values[name].float().cpu().clone()) for _, values in embedder.run(shuffled, str))
        assert vectors == sum(map(len, proteins))

    return Pass(embed, sum(len(protein) + 2 for protein in proteins))
