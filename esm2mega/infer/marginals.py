"""Computes log-probabilities of residues at places in sequences, with the residue visible or masked.

Legend: ``L`` residues, ``v`` vocabulary (33), ``p`` places, each of which is a residue of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from esm2mega.errors import UserError
from esm2mega.files import shortened
from esm2mega.infer.engine import Engine, WindowPack, group_windows
from esm2mega.infer.windows import Window, optimal
from esm2mega.model.esm2 import VOCAB_SIZE
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.progress import Progress
from esm2mega.vocabulary import MASK, STANDARD_RESIDUES, encode_residues

NORMALIZATIONS = ("vocabulary", "residues")
"""Names the tokens over which probabilities add up to 1: all 33, or the 20 standard residues."""

_COPIES_AT_ONCE = 4096


class Place(NamedTuple):
    """Names residue `position` (from 0) of sequence number `sequence`."""

    sequence: int
    position: int


class _Copy(NamedTuple):
    """Holds a window of a sequence, and the numbers of the places that are read (and maybe masked) in it."""

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
        refused: Callable[[str, str], UserError],
        normalization: str = "vocabulary",
        shows_progress: bool = True,
    ) -> None:
        """Set the model, and how it is used.

        Args:
            engine: An engine that computes logits.
            ranks: Ranks of this process.
            width: Most tokens at once; of a longer protein the model sees the window around the residue.
            refused: Makes the error for logits that are not finite, from the names of protein and output.
            normalization: One of `NORMALIZATIONS`.
            shows_progress: Whether rank 0 shows the progress.
        """
        self._engine, self._ranks = engine, ranks
        self._width = width
        self._refused = refused
        self._normalization = normalization
        self._shows_progress = shows_progress and ranks.is_main

    def __call__(
        self,
        sequences: Sequence[str],
        places: Sequence[Place],
        masked: bool,
        named: Callable[[str], str] = shortened,
    ) -> Tensor:
        """Compute log-probabilities at `places`; all ranks call this together and get the whole result.

        Args:
            sequences: Sequences of residue letters.
            places: The p places.
            masked: Whether the residue is replaced by ``<mask>``, in a copy of the sequence for each place.
                Otherwise one copy serves all places with the same window.
            named: Returns the name of a sequence, for errors.

        Returns:
            Log-probabilities in nats, fp64 ``[p, v]``; ``-inf`` for tokens that the normalization leaves out.

        Raises:
            UserError: A logit is not finite.
        """
        encoded = [encode_residues(sequence) for sequence in sequences]
        copies = self._copies(encoded, places, masked)
        own = copies[self._ranks.dp_rank :: self._ranks.dp_size]
        logits = torch.zeros(len(places), VOCAB_SIZE, dtype=torch.float64, device=self._ranks.device)
        with Progress(len(own), "score", "pass", enabled=self._shows_progress) as progress:
            for first in range(0, len(own), _COPIES_AT_ONCE):
                self._run(own[first : first + _COPIES_AT_ONCE], encoded, places, masked, logits, progress)
        # One rank has each row, the others hold zeros: all-reduce over the world.
        dist.all_reduce(logits)
        if not bool(logits.isfinite().all()):
            place = places[int((~logits.isfinite().all(dim=1)).nonzero()[0])]
            name = named(sequences[place.sequence])
            raise self._refused(name, f"the distribution at its residue {place.position + 1}")
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
        """Run the copies through the model, and fill their rows of `logits`."""
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
            if outputs.logits is not None and self._ranks.is_output_rank:
                logits[numbers] = outputs.logits.double()
            progress.update(len(pack.windows))
