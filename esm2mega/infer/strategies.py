"""Turns log-probabilities into scores of variants; a higher score means a more likely protein."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from esm2mega.data.variants.variant import Variant, apply, ends_early
from esm2mega.errors import UserError
from esm2mega.files import shortened
from esm2mega.infer.marginals import Marginals, Place
from esm2mega.train.losses import perplexity
from esm2mega.vocabulary import STANDARD_RESIDUES, VOCAB

STRATEGIES = ("wt-marginals", "masked-marginals", "pseudo-ppl")
"""Names the ways to score variants, in the terms of the field:

wt-marginals: log p(mutant) - log p(wild type) at the residue, the wild type being visible; one pass.
masked-marginals: log p(mutant) - log p(wild type) with that residue masked; a pass for each residue.
pseudo-ppl: sum of log p(residue) over all residues of the mutant, each masked in turn; a pass for each
    residue of each variant.

The first two sum over the substitutions of a variant, each seen in the wild type, so they have no score for a
variant that ends early.
"""

DEFAULT_STRATEGY = "masked-marginals"
WHOLE_STRATEGY = "pseudo-ppl"
"""This one alone compares sequences that need not be aligned."""

_RESIDUES_AT_ONCE = 1 << 18
_STANDARD = frozenset(VOCAB[token] for token in STANDARD_RESIDUES)


def check_variant(variant: Variant, sequence: str, strategy: str, normalization: str) -> None:
    """Refuse a variant that has no score.

    Args:
        variant: Changes of residues.
        sequence: The wild type.
        strategy: One of `STRATEGIES`.
        normalization: One of `marginals.NORMALIZATIONS`.

    Raises:
        UserError: The variant ends early, which only ``pseudo-ppl`` can score, or a residue has no
            probability under this normalization.
    """
    if strategy == WHOLE_STRATEGY:
        check_letters(apply(variant, sequence), normalization)
        return
    if ends_early(variant):
        raise UserError(
            f"a stop is no residue, so {strategy} has no score for it; the strategy {WHOLE_STRATEGY} scores "
            "what is left of the protein"
        )
    check_letters({letter for s in variant for letter in (s.wild, s.mutant)}, normalization)


def check_letters(letters: Iterable[str], normalization: str) -> None:
    """Raise `UserError` for letters that have no probability under a normalization."""
    if normalization == "residues" and (others := sorted(set(letters) - _STANDARD)):
        raise UserError(
            f"{', '.join(others)} has no probability among the 20 residues; normalize over the vocabulary"
        )


def score_variants(
    marginals: Marginals, sequence: str, variants: Sequence[Variant], strategy: str, name: str | None = None
) -> list[float]:
    """Score variants in nats, in their order; all ranks call this together.

    Args:
        marginals: Computes log-probabilities.
        sequence: The wild type.
        variants: Changes of its residues, for which `check_variant` found no fault.
        strategy: One of `STRATEGIES`.
        name: Name of the wild type, for errors; None for its sequence.
    """

    def named(shown: str) -> str:
        own = shortened(sequence) if name is None else name
        return own if shown == sequence else f"{own}, variant {shortened(shown)}"

    if strategy == WHOLE_STRATEGY:
        whole = [apply(variant, sequence) for variant in variants]
        return pseudo_log_likelihoods(marginals, whole, named)
    positions = sorted({s.position for variant in variants for s in variant})
    table = marginals(
        [sequence], [Place(0, position) for position in positions], strategy == "masked-marginals", named
    )
    row = {position: number for number, position in enumerate(positions)}
    return [
        sum(
            (
                float(_at(table, row[s.position], s.mutant) - _at(table, row[s.position], s.wild))
                for s in variant
            ),
            0.0,  # the score of the wild type
        )
        for variant in variants
    ]


def pseudo_log_likelihoods(
    marginals: Marginals, sequences: Sequence[str], named: Callable[[str], str] = shortened
) -> list[float]:
    """Sum log p(residue | the others) over all residues of each sequence; all ranks call this together.

    Args:
        marginals: Computes log-probabilities.
        sequences: Sequences of residue letters, of any lengths; one that repeats is computed once.
        named: Returns the name of a sequence, for errors.

    Returns:
        A sum for each sequence, in nats.
    """
    unique = list(dict.fromkeys(sequences))
    ends = np.cumsum([len(sequence) for sequence in unique])
    found: dict[str, float] = {}
    while (first := len(found)) < len(unique):
        limit = ends[first] - len(unique[first]) + _RESIDUES_AT_ONCE
        some = unique[first : max(first + 1, int(np.searchsorted(ends, limit, side="right")))]
        places = [
            Place(number, position)
            for number, sequence in enumerate(some)
            for position in range(len(sequence))
        ]
        table = marginals(some, places, True, named)
        own = torch.tensor([_token(letter) for sequence in some for letter in sequence])
        values = table.gather(1, own[:, None])[:, 0].split([len(sequence) for sequence in some])
        found |= {sequence: float(part.sum()) for sequence, part in zip(some, values, strict=True)}
    return [found[sequence] for sequence in sequences]


def pseudo_perplexity(log_likelihood: float, num_residues: int) -> float:
    """Return exp of the mean over residues of -log p(residue | the others)."""
    return perplexity(-log_likelihood / num_residues)


def _at(table: Tensor, row: int, letter: str) -> Tensor:
    return table[row, _token(letter)]


def _token(letter: str) -> int:
    return VOCAB.index(letter if letter in VOCAB else "<unk>")
