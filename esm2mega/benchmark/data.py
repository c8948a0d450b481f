"""Makes passes of the data side: preparing a store from a FASTA, building batches, and the loader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esm2mega import vocabulary
from esm2mega.benchmark.proteins import Protein
from esm2mega.benchmark.turns import Pass
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import BatchSpec, build_arrays, train_plan
from esm2mega.data.stream.loader import TrainStream
from esm2mega.data.stream.packing import Pack, PackCursor
from esm2mega.data.stream.samples import TrainSamples


def write_fasta(path: Path, proteins: Sequence[Protein]) -> Path:
    """Write proteins as FASTA, and return the path."""
    texts = map(vocabulary.decode, proteins)
    path.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(texts)))
    return path


def preparing(fasta: Path, folder: Path, residues: int) -> Pass:
    """Return `esm2mega prepare fasta` in one process, whose units are residues.

    The folder is made, and removed again.
    """

    def prepare() -> None:
        prepare_fasta([fasta], folder)
        shutil.rmtree(folder)

    return Pass(prepare, residues)


def building(store: TokenStore, spec: BatchSpec, packs: int) -> Pass:
    """Return building batches from planned packs, whose units are tokens with `<cls>` and `<eos>`."""
    planned = _planned(store, spec, packs)
    return Pass(lambda: [build_arrays([store], spec, pack) for pack in planned], _tokens(planned))


@contextmanager
def loading(store: TokenStore, spec: BatchSpec, packs: int) -> Iterator[Pass]:
    """Yield taking training batches from their stream, once; it has started already. Units are tokens.

    The batches are taken in steps of one for each worker, and so may be some more than `packs`.
    """
    size = max(1, spec.data.workers)
    steps = -(-packs // size)
    tokens = _tokens(_planned(store, spec, size + steps * size)[size:])

    def take() -> None:
        for _ in range(steps):
            list(stream.next_step(size))

    with TrainStream([store], spec) as stream:
        list(stream.next_step(size))
        yield Pass(take, tokens)


def _planned(store: TokenStore, spec: BatchSpec, packs: int) -> list[Pack]:
    planned, _ = train_plan(TrainSamples([store], spec.data, spec.seed), spec).take(PackCursor(), packs)
    return planned


def _tokens(planned: Sequence[Pack]) -> int:
    return sum(int(pack.pieces.lengths.sum()) for pack in planned)
