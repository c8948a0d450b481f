"""The command line with one residue that no model can read, for tests of what follows.

``python -m tests.broken_protein MODE COMMAND …``: with ``infinite`` the embedding of pyrrolysine (O) is
infinite, so that the pack of a protein that has one has no finite loss; with ``gradient`` the loss stays and
only its gradient is not finite; with ``absent`` such a pack is padding, as if it had never been there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from esm2mega.cli.app import main
from esm2mega.data.stream import build
from esm2mega.data.stream.packing import Pack
from esm2mega.model.embedding import ESM2Embedding
from esm2mega.vocabulary import VOCAB

BROKEN = VOCAB.index("O")


def write_proteins(path: Path) -> None:
    """Write a FASTA of 60 random proteins, of which p30 alone has pyrrolysines."""
    rng = np.random.default_rng(11)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
    with path.open("wb") as file:
        for number, length in enumerate(rng.integers(25, 60, 60)):
            residues = rng.choice(letters, size=length).tobytes()
            residues = residues[:5] + b"O" * 15 + residues[20:] if number == 30 else residues
            file.write(b">p%d\n%s\n" % (number, residues))


class _InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient of infinity."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(gradient, torch.inf)


def infinite(embed: Any, self: ESM2Embedding, input_ids: Tensor, packed: Any) -> Tensor:
    rows = embed(self, input_ids, packed)
    return torch.where((input_ids == BROKEN)[: len(rows), None, None], torch.inf, rows)


def gradient(embed: Any, self: ESM2Embedding, input_ids: Tensor, packed: Any) -> Tensor:
    rows = embed(self, input_ids, packed)
    return _InfiniteGradient.apply(rows) if (input_ids == BROKEN).any() else rows


def without(build_arrays: Any, stores: Any, spec: Any, pack: Pack, streams: Any = None) -> Any:
    if len(pack.pieces) and (build.piece_tokens(stores, pack.pieces) == BROKEN).any():
        pack = build.PADDING
    return build_arrays(stores, spec, pack, streams)


@contextmanager
def broken(mode: str) -> Iterator[None]:
    """Make the model so in this block."""
    if mode == "absent":
        built = build.build_arrays
        changed = patch.object(build, "build_arrays", lambda *given: without(built, *given))
    else:
        embed, change = ESM2Embedding.forward, {"infinite": infinite, "gradient": gradient}[mode]
        changed = patch.object(ESM2Embedding, "forward", lambda *given: change(embed, *given))
    with changed:
        yield


if __name__ == "__main__":
    with broken(sys.argv[1]):
        sys.exit(main(sys.argv[2:]))
