"""Turns log-probabilities into scores of variants; a higher score means a more likely protein."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esm2mega.errors import UserError
from esm2mega.infer.marginals import Marginals, Place
from esm2mega.infer.variants import Variant, apply
from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

STRATEGIES = ("wt-marginals", "masked-marginals", "pseudo-ppl")
"""Names the ways to score variants, in the terms of the field:

wt-marginals: log p(mutant) - log p(wild type) at the residue, the wild type being visible; one pass.
masked-marginals: log p(mutant) - log p(wild type) with that residue masked; a pass for each residue.
pseudo-ppl: sum of log p(residue) over all residues of the mutant, each masked in turn; a pass for each
    residue of each variant.

The first two sum over the substitutions of a variant, each seen in the wild type.
"""

_RESIDUES_AT_ONCE = 1 << 18


def score_variants(
    marginals: Marginals, sequence: str, variants: Sequence[Variant], strategy: str, normalization: str
) -> list[float]:
    """Score variants in nats, in their order; all ranks call this together.

    Args:
        marginals: Computes log-probabilities.
        sequence: The wild type.
        variants: Substitutions in it.
        strategy: One of `STRATEGIES`.
        normalization: Normalization that `marginals` was made with.

    Raises:
        UserError: A residue has no probability under this normalization.
    """
    letters = {letter for v in variants for s in v for letter in (s.wild, s.mutant)}
    if strategy == "pseudo-ppl":
        letters |= set(sequence)
    if normalization == "residues":
        standard = {VOCAB[token] for token in STANDARD_RESIDUES}
        if others := sorted(letters - standard):
            raise UserError(
                f"{', '.join(others)} has no probability among the 20 residues; set --normalize vocabulary"
            )
    if strategy == "pseudo-ppl":
        return _pseudo_log_likelihoods(marginals, [apply(variant, sequence) for variant in variants])
    positions = sorted({s.position for variant in variants for s in variant})
    table = marginals(
        [sequence], [Place(0, position) for position in positions], strategy == "masked-marginals"
    )
    row = {position: number for number, position in enumerate(positions)}
    return [
        sum(
            float(_at(table, row[s.position], s.mutant) - _at(table, row[s.position], s.wild))
            for s in variant
        )
        for variant in variants
    ]


def _pseudo_log_likelihoods(marginals: Marginals, sequences: Sequence[str]) -> list[float]:
    """Sum log p(residue | the others) over all residues, for each sequence."""
    scores: list[float] = []
    step = max(1, _RESIDUES_AT_ONCE // max(map(len, sequences)))
    for first in range(0, len(sequences), step):
        some = sequences[first : first + step]
        places = [
            Place(number, position) for number, mutant in enumerate(some) for position in range(len(mutant))
        ]
        table = marginals(some, places, masked=True)
        own = torch.tensor([_token(some[place.sequence][place.position]) for place in places])
        values = table.gather(1, own[:, None])[:, 0]
        scores += [float(part.sum()) for part in values.split([len(mutant) for mutant in some])]
    return scores


def _at(table: Tensor, row: int, letter: str) -> Tensor:
    return table[row, _token(letter)]


def _token(letter: str) -> int:
    return VOCAB.index(letter if letter in VOCAB else "<unk>")
