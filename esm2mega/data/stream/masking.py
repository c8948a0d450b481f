"""Chooses the residues to predict and corrupts them, as BERT does (by default 80/10/10).

Every residue is chosen on its own with probability `mlm_probability`; of the chosen ones `mask_fraction`
become `<mask>`, `random_fraction` become a random residue (which may be the same one) and the rest stay. A
protein may end up without any chosen residue. Special tokens and `<unk>` are never chosen: they hide no
letter to predict.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esm2mega import vocabulary
from esm2mega.config.schema import DataConfig
from esm2mega.data import counter_rng
from esm2mega.data.counter_rng import Purpose

_ELIGIBLE = np.ones(len(vocabulary.VOCAB), dtype=bool)
_ELIGIBLE[list(vocabulary.SPECIAL_TOKENS)] = False

# `all` reproduces collators that draw from the whole vocabulary, special tokens included.
_RANDOM_POOL = {"amino_acids": vocabulary.STANDARD_RESIDUES, "all": range(len(vocabulary.VOCAB))}


class MaskedTokens(NamedTuple):
    """Holds corrupted tokens, and the original ones where tokens were chosen.

    Attributes:
        input_ids: tokens that the model sees, int64 [T].
        label_positions: positions of the chosen tokens, ascending, int64 [M].
        labels: the original tokens at these positions, int64 [M].
    """

    input_ids: npt.NDArray[np.int64]
    label_positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def mask_tokens(
    tokens: npt.NDArray[np.uint8],
    streams: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    seed: int,
    config: DataConfig,
    starts: npt.NDArray[np.int64] | None = None,
) -> MaskedTokens:
    """Mask any number of samples at once; the masks of each depend on its stream number alone.

    Args:
        tokens: token ids of the samples, one behind the other, [T].
        streams: number of each sample (or sequence), [n].
        lengths: tokens of each sample, adding up to T, [n].
        seed: seed of the run.
        config: probabilities and the pool of random residues.
        starts: position within its stream of the first token of each sample, [n]; None for 0. Pieces that
            share a stream start at different positions.
    """
    first = np.cumsum(lengths) - lengths
    if starts is not None:
        first = first - starts
    sample = np.repeat(np.arange(len(streams)), lengths)  # [T], row of streams
    position = np.arange(len(tokens)) - first[sample]  # [T], place within the stream

    def bits(purpose: Purpose, at: npt.NDArray[np.int64]) -> counter_rng.Bits:
        return counter_rng.bits_at(
            counter_rng.stream_starts(seed, purpose, streams)[sample[at]], position[at]
        )

    # One number decides whether a token is chosen and what becomes of it; another one names a random residue.
    eligible = np.flatnonzero(_ELIGIBLE[tokens])
    uniform = counter_rng.uniforms(bits(Purpose.MASK, eligible))
    chosen = uniform < config.mlm_probability
    label_positions, fate = eligible[chosen], uniform[chosen] / config.mlm_probability
    labels = tokens[label_positions].astype(np.int64)

    input_ids = tokens.astype(np.int64)
    input_ids[label_positions[fate < config.mask_fraction]] = vocabulary.MASK
    to_replace = (fate >= config.mask_fraction) & (fate < config.mask_fraction + config.random_fraction)
    replaced = label_positions[to_replace]
    pool = _RANDOM_POOL[config.random_residues]
    input_ids[replaced] = pool.start + counter_rng.integers_below(bits(Purpose.RESIDUE, replaced), len(pool))
    return MaskedTokens(input_ids, label_positions, labels)
