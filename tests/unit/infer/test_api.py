"""`esm2mega.load`: values are those of Hugging Face, and the same bits in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import esm2mega
from esm2mega.errors import UserError
from tests.infer_models import Reference, random_proteins

PROTEINS = random_proteins([1, 2, 3, 17, 46, 120, 126, 77, 33, 5, 64, 62], seed=5)


def test_values_and_shapes(reference: Reference) -> None:
    with esm2mega.load(reference.checkpoint) as model:
        states = model.embed(PROTEINS, layers=[0, 1, -1])
        pooled = model.embed(PROTEINS, layers=1, pooling="mean")
        assert pooled.shape == (len(PROTEINS), 48) and pooled.dtype == np.float32
        for number, sequence in enumerate(PROTEINS):
            hidden = reference.run(sequence).hidden_states
            for layer in (0, 1, -1):
                expected = hidden[layer][0, 1:-1].numpy()
                assert np.abs(states[layer][number] - expected).max() <= 1e-5 * np.abs(expected).max()
            assert (
                np.abs(pooled[number] - hidden[1][0, 1:-1].mean(0).numpy()).max()
                < 1e-5 * np.abs(pooled).max()
            )
        # Two models at a time share the process groups.
        with esm2mega.load(reference.checkpoint, precision="bf16") as other:
            assert other.logits(["MKT"])[0].shape == (3, 33)
        assert model.contacts(["MKT"])[0].shape == (3, 3)
        assert model.embed([]) == []
        # Numbers of layers as they come out of numpy.
        assert np.array_equal(model.embed(["MKT"], layers=np.int64(1))[0], model.embed(["MKT"], layers=1)[0])
        assert list(model.embed(["MKT"], layers=np.arange(3))) == [0, 1, 2]
        with pytest.raises(UserError, match="sequences is the text .*; give a list of sequences"):
            model.embed("MKT")
        # A table: its column of sequences, not the names of its columns.
        table = {"id": ["a", "b"], "sequence": ["MKT", "LAGV"]}
        assert np.array_equal(
            model.embed(table, pooling="mean"), model.embed(["MKT", "LAGV"], pooling="mean")
        )
    with pytest.raises(UserError, match="was closed"):
        model.logits(["MKT"])


@pytest.mark.parametrize(
    ("threads", "every"), [(2, 3), *(pytest.param(threads, 1, marks=pytest.mark.slow) for threads in (1, 2))]
)
def test_same_bits_alone_in_any_pack_and_in_any_order(reference: Reference, threads: int, every: int) -> None:
    """Every hidden state, logit and contact, fp32 on the CPU with the same number of threads.

    Two threads that share a core wait for each other for long.
    """
    proteins = PROTEINS[::every]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with esm2mega.load(reference.checkpoint) as model:

            def values(some: list[str]) -> list[list[np.ndarray]]:
                states = model.embed(some, layers=[0, 1, 2, 3, 4])
                columns = [*states.values(), model.logits(some), model.contacts(some)]
                return [list(column) for column in zip(*columns, strict=True)]

            together = values(proteins)
            rng = np.random.default_rng(1)
            for _ in range(3):
                order = rng.permutation(len(proteins))[: rng.integers(2, len(proteins))].tolist()
                for number, found in zip(order, values([proteins[i] for i in order]), strict=True):
                    assert all(map(np.array_equal, found, together[number]))
            for number, sequence in enumerate(proteins):
                assert all(map(np.array_equal, values([sequence])[0], together[number]))
    finally:
        torch.set_num_threads(before)
