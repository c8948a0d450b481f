"""Embeds proteins with the model that is being trained, at its layout, and gathers them on the first process.

Windows, packing and pooling are those of `esm2mega embed`; the forward pass is that of the evaluation.

Legend: ``T`` tokens of a pack, ``h`` hidden size, ``t`` tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.batch import PackedBatch
from esm2mega.config.schema import InferConfig
from esm2mega.errors import UserError
from esm2mega.infer.engine import PackOutputs, WindowPack
from esm2mega.infer.proteins import Embedder, Lengths
from esm2mega.model.hidden_states import hidden_states
from esm2mega.parallel.initialize import Ranks
from esm2mega.train.evaluate import gathered, run_groups
from esm2mega.train.losses import LossReduction, LossTerms
from esm2mega.vocabulary import PAD

Vectors = npt.NDArray[np.float32]
Place = Callable[[int, Vectors], None]
"""Takes the number of a protein and its vector ``[h]``, or those of its residues ``[L, h]``."""

_ROUND_TOKENS = 1 << 16
"""Bounds the tokens that a replica of the model embeds before all of them give what they have."""


def embed_proteins(
    model: list[Any],
    proteins: Sequence[npt.NDArray[np.uint8]],
    per_residue: bool,
    max_seq_length: int,
    micro_batch_tokens: int,
    ranks: Ranks,
    place: Place,
    abandon: Callable[[], bool],
) -> str | None:
    """Embed proteins, dealt out over the replicas of the model; all ranks call this together.

    The model is put back into training mode, and no random number is drawn. In every round each replica
    embeds a bounded number of tokens and gives them to the first process, in a gather over the world.

    Args:
        model: This rank's chunks.
        proteins: Residues of each protein.
        per_residue: Whether vectors of residues are wanted, in place of their mean.
        max_seq_length: Tokens of the longest protein that passes whole; longer ones do so in windows.
        micro_batch_tokens: T.
        ranks: Where this process stands.
        place: Called on the main rank with each protein.
        abandon: Called after every round; True, on every rank alike, ends the work.

    Returns:
        On the main rank the reason why there are vectors missing; None on the others, or if there is none.
    """
    name = "residue" if per_residue else "pooled"
    layer = f"{name}/layer_{unwrap_model(model)[0].config.num_layers}"
    packs = _TrainedModel(model, ranks, micro_batch_tokens)
    limits = Lengths(max_seq_length, "chunk", max_seq_length // 2)
    embedder = Embedder(packs, InferConfig(outputs=[name]), limits, Path())
    reason = None
    for numbers in _rounds([len(each) for each in proteins], ranks):
        found: list[tuple[int, Vectors]] = []
        failure = None
        try:
            for place_in_round, values in embedder.run(
                [proteins[n] for n in numbers], lambda n: f"protein {n + 1}"
            ):
                if layer in values:
                    vectors = values[layer].to(torch.float32).cpu().numpy()
                    found.append((numbers[place_in_round], vectors))
        except UserError:
            failure = "an embedding is not finite"
        except MemoryError:
            failure = f"rank {ranks.rank} has no memory left for embeddings"
        for part, failed in gathered((found, failure), ranks) or []:
            reason = reason or failed
            for number, vectors in part:
                place(number, vectors)
        if abandon():
            return "the run was stopped"
    return reason


def _rounds(lengths: Sequence[int], ranks: Ranks) -> list[list[int]]:
    """Return the proteins of this rank's replica in each round; all ranks have equally many rounds."""
    shares = [_shares(lengths, range(first, len(lengths), ranks.dp_size)) for first in range(ranks.dp_size)]
    mine = shares[ranks.dp_rank]
    return mine + [[]] * (max(map(len, shares)) - len(mine))


def _shares(lengths: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
    rounds: list[list[int]] = []
    tokens = _ROUND_TOKENS
    for number in numbers:
        if tokens + lengths[number] > _ROUND_TOKENS:
            rounds.append([])
            tokens = 0
        rounds[-1].append(number)
        tokens += lengths[number]
    return rounds


class _TrainedModel:
    """Runs packs through a model that is being trained, in evaluation mode.

    All packs are run before the first output is given: an error over one then leaves no other process waiting
    in the schedule.
    """

    def __init__(self, model: list[Any], ranks: Ranks, micro_batch_tokens: int) -> None:
        """Set the model; its packs all have `micro_batch_tokens` tokens, as a pipeline needs it."""
        self._model, self._ranks = model, ranks
        self.micro_batch_tokens = micro_batch_tokens

    def run(self, packs: Sequence[WindowPack]) -> Iterator[PackOutputs]:
        """Return the last hidden states of each pack, which the last stage has; the others have none."""
        batches = [self._batch(pack) for pack in packs]
        last = unwrap_model(self._model)[-1]
        number = last.config.num_layers
        for chunk in self._model:
            chunk.eval()
        with hidden_states(last, (number,) if last.post_process else ()) as hidden:
            states = _LastStates(last, hidden, number)
            for _ in run_groups(self._model, states, batches, self._ranks):
                pass
        for chunk in self._model:
            chunk.train()
        found = states.found if last.post_process else [None] * len(packs)
        for each in found:
            yield PackOutputs({} if each is None else {number: each})

    def _batch(self, pack: WindowPack) -> PackedBatch:
        """Return a batch in which every token is one to predict, so that the last layer computes them all."""
        lengths = [window.num_tokens for window in pack.windows]
        tail = self.micro_batch_tokens - sum(lengths)
        ids = np.pad(pack.tokens, (0, tail), constant_values=PAD).astype(np.int64)
        num_tokens = sum(lengths)
        seqlens = lengths + [tail] * (tail > 0)
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            cu_seqlens=torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32),
            seqlens=seqlens,
            max_seqlen=max(seqlens),
            label_positions=torch.arange(len(ids)),
            labels=torch.from_numpy(ids),
            label_counts=list(seqlens),
            num_tokens=num_tokens,
            num_residues=num_tokens - 2 * len(lengths),
            num_sequences=len(lengths),
        )


class _LastStates(LossReduction):
    """Keeps the hidden states of each pack, in place of computing a loss from the logits."""

    def __init__(self, model: Any, hidden: dict[int, Tensor], layer: int) -> None:
        self._model, self._hidden, self._layer = model, hidden, layer
        self.found: list[Tensor] = []

    def forward(self, batch: Any, output: Tensor) -> LossTerms:
        if len(batch.labels):  # packs without labels fill up the last group of an interleaved pipeline
            # -> [T, h]; a gather over the tensor-parallel group under sequence parallelism, and over the
            # context-parallel one.
            states = self._model.gathered(self._hidden[self._layer].unsqueeze(1)).squeeze(1)
            self.found.append(states)
        return LossTerms(output.new_zeros(()), torch.tensor(0, device=output.device))
