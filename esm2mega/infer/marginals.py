"""Computes log-probabilities of residues at their places, with the residue in sight or masked.

Legend: ``L`` residues, ``v`` vocabulary (33), ``p`` places, which are residues of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from esm2mega.infer.engine import Engine, WindowPack, group_windows
from esm2mega.infer.windows import Window, optimal
from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.progress import Progress
from esm2mega.vocabulary import MASK, STANDARD_RESIDUES, encode_residues

NORMALIZATIONS = ("vocabulary", "residues")
"""Over which tokens probabilities add up to 1: all 33, or the 20 standard residues."""

_COPIES_AT_ONCE = 4096


class Place(NamedTuple):
    """Residue `position` (from 0) of sequence number `sequence`."""

    sequence: int
    position: int


class _Copy(NamedTuple):
    """A window of a sequence, and the places that are read from it; masked ones are masked there."""

    sequence: int
    window: Window
    places: list[int]


class Marginals:
    """Computes log-probabilities with packs shared out among the data-parallel ranks."""

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        width: int,
        normalization: str = "vocabulary",
        shows_progress: bool = True,
    ) -> None:
        """Set up.

        Args:
            engine: Made to give logits.
            ranks: Where this process stands.
            width: Most tokens at once; longer proteins are seen through the window around the residue.
            normalization: One of `NORMALIZATIONS`.
            shows_progress: Whether rank 0 shows how far it is.
        """
        self._engine, self._ranks = engine, ranks
        self._width = width
        self._normalization = normalization
        self._shows_progress = shows_progress and ranks.is_main

    def __call__(
        self, sequences: Sequence[str], places: Sequence[Place], masked: bool, description: str = "score"
    ) -> Tensor:
        """Log-probabilities at `places`; all ranks call this together, and all get the whole result.

        Args:
            sequences: Residue letters.
            places: Where.
            masked: Replace the residue by ``<mask>``, each in a copy of its own. Else one copy serves all
                places with the same window.
            description: For the progress bar.

        Returns:
            fp64 ``[p, v]``, in nats; ``-inf`` for tokens that the normalization leaves out.
        """
        encoded = [encode_residues(sequence) for sequence in sequences]
        copies = self._copies(encoded, places, masked)
        own = copies[self._ranks.dp_rank :: self._ranks.dp_size]
        logits = torch.zeros(len(places), VOCAB_SIZE, dtype=torch.float64, device=self._ranks.device)
        with Progress(len(own), description, "pass", enabled=self._shows_progress) as progress:
            for first in range(0, len(own), _COPIES_AT_ONCE):
                self._run(own[first : first + _COPIES_AT_ONCE], encoded, places, masked, logits, progress)
        # One rank has each row, the others hold zeros: all-reduce over the world.
        dist.all_reduce(logits)
        if self._normalization == "residues":
            outside = [token for token in range(VOCAB_SIZE) if token not in STANDARD_RESIDUES]
            logits[:, outside] = -torch.inf
        return logits.log_softmax(dim=-1).cpu()

    def _copies(
        self, encoded: Sequence[npt.NDArray[np.uint8]], places: Sequence[Place], masked: bool
    ) -> list[_Copy]:
        copies: list[_Copy] = []
        shared: dict[tuple[int, Window], _Copy] = {}
        for number, place in enumerate(places):
            window = optimal(place.position, len(encoded[place.sequence]), self._width)
            copy = None if masked else shared.get((place.sequence, window))
            if copy is None:
                copy = shared[place.sequence, window] = _Copy(place.sequence, window, [])
                copies.append(copy)
            copy.places.append(number)
        return copies

    def _run(
        self,
        copies: Sequence[_Copy],
        encoded: Sequence[npt.NDArray[np.uint8]],
        places: Sequence[Place],
        masked: bool,
        logits: Tensor,
        progress: Progress,
    ) -> None:
        """Fill the rows of `logits` that these copies give."""
        plan = group_windows([copy.window.num_tokens for copy in copies], self._engine.micro_batch_tokens)
        packs, rows = [], []
        for chosen in plan:
            tokens, positions, first = [], [], 0
            for copy in (copies[i] for i in chosen):
                ids = copy.window.tokens(encoded[copy.sequence])
                at = [places[number].position + 1 - copy.window.start for number in copy.places]
                if masked:
                    ids[at] = MASK
                tokens.append(ids)
                positions += [first + i for i in at]
                first += len(ids)
            windows = [copies[i].window for i in chosen]
            packs.append(WindowPack(windows, np.concatenate(tokens), np.array(positions, dtype=np.int64)))
            rows.append([number for i in chosen for number in copies[i].places])
        for numbers, pack, outputs in zip(rows, packs, self._engine.run(packs), strict=True):
            if outputs.logits is not None and self._ranks.tp_rank == 0:
                logits[numbers] = outputs.logits.double()
            progress.update(len(pack.windows))
