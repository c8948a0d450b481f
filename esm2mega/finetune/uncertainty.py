"""Summarises several predictions of the same proteins: their mean, their spread, and intervals of numbers.

Legend: ``m`` draws (members of an ensemble, or samples of dropout), ``r`` proteins or residues, ``k``
outputs, ``g`` groups of outputs: the classes of one target, or one class of several that a protein may have.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from esm2mega.config.task import NUMERIC_KINDS
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError

Array = npt.NDArray[Any]

MEAN = "predictions"
"""Names the mean over draws: what is predicted."""

_PERCENT = 95


def extra_widths(info: TargetInfo) -> dict[str, int]:
    """Return the arrays that stand beside the predictions, and the width of each."""
    if info.kind in NUMERIC_KINDS:
        return dict.fromkeys(("sd", "low", "high"), info.num_outputs)
    return dict.fromkeys(("entropy", "mutual_information"), len(_groups(info)))


class Summary:
    """Takes the predictions of one draw after the other, and keeps none of them."""

    def __init__(self, info: TargetInfo) -> None:
        """Begin without draws.

        Args:
            info: Meaning of the predictions.
        """
        self._info, self._count = info, 0
        self._mean: Array = np.zeros(())
        self._spread: Array = np.zeros(())

    def add(self, values: Array) -> None:
        """Add the predictions of a draw, ``[r, k]`` fp64."""
        self._count += 1
        before = values - self._mean
        self._mean = self._mean + before / self._count
        if self._info.kind in NUMERIC_KINDS:
            # Welford's sum of squares, which is exact where numbers are large and alike.
            self._spread = self._spread + before * (values - self._mean)
        else:
            self._spread = self._spread + _entropies(values, self._info)

    @property
    def mean(self) -> Array:
        """Return the mean over draws, ``[r, k]``."""
        return self._mean

    @property
    def sd(self) -> Array:
        """Return the standard deviation of numbers over draws, with m - 1 in the denominator, ``[r, k]``."""
        return np.sqrt(self._spread / (self._count - 1))

    def arrays(self, factor: Array) -> dict[str, Array]:
        """Return the predictions under `MEAN`, and the arrays of `extra_widths`.

        Args:
            factor: For numbers, half of an interval's width in standard deviations, ``[k]``.
        """
        if self._info.kind in NUMERIC_KINDS:
            half = factor * self.sd
            return {MEAN: self.mean, "sd": self.sd, "low": self.mean - half, "high": self.mean + half}
        entropy = _entropies(self.mean, self._info)
        # It is never negative but for rounding.
        mutual = np.maximum(entropy - self._spread / self._count, 0.0)
        return {MEAN: self.mean, "entropy": entropy, "mutual_information": mutual}


def spread_factor(num_draws: int) -> float:
    """Return the half width, in standard deviations, of the interval for one more draw of the same kind.

    It is ``t sqrt(1 + 1/m)``, with the 97.5 % quantile t of Student's distribution with m - 1 degrees of
    freedom: of normal draws the next one lies inside with 95 %.
    """
    from scipy.stats import t

    return float(t.ppf((1 + _PERCENT / 100) / 2, num_draws - 1) * math.sqrt(1 + 1 / num_draws))


def conformal_factor(mean: Array, sd: Array, labels: Array, table: str, names: list[str]) -> list[float]:
    """Return the half width of each target's interval, in standard deviations, that held-out labels ask for.

    It is the split-conformal quantile of ``|label - mean| / sd``: the value of rank ceil(0.95 (n + 1)) among
    n labels. A label that is exchangeable with these lies within with at least 95 %.

    Args:
        mean: Means over draws, ``[r, k]``.
        sd: Standard deviations over draws, ``[r, k]``.
        labels: The labels, ``[r, k]``; NaN for none.
        table: Where the labels are from, for messages.
        names: Names of the targets.

    Raises:
        UserError: There are too few labels, or the draws agree entirely on too many of them.
    """
    factors = []
    for target, name in enumerate(names):
        known = ~np.isnan(labels[:, target])
        residuals = np.abs(labels - mean)[known, target]
        spread = sd[known, target]
        rank = -(-_PERCENT * (len(residuals) + 1) // 100)
        if rank > len(residuals):
            raise UserError(
                f"--calibrate {table}: has {len(residuals)} labels of {name}; an interval of {_PERCENT} % "
                f"needs {_PERCENT // (100 - _PERCENT)} at least: give a larger table"
            )
        scores = np.full(len(residuals), np.inf)
        np.divide(residuals, spread, out=scores, where=spread > 0)
        scores[residuals == 0] = 0.0
        factor = float(np.sort(scores)[rank - 1])
        if not math.isfinite(factor):
            raise UserError(
                f"--calibrate {table}: of {name}, the predictions for {int((spread == 0).sum())} of "
                f"{len(spread)} labels have no spread, so no interval follows from it; "
                "give checkpoints that differ"
            )
        factors.append(factor)
    return factors


def _groups(info: TargetInfo) -> list[slice]:
    if info.kind == "multilabel":
        return [slice(number, number + 1) for number in range(info.num_outputs)]
    return [target.outputs for target in info.targets]


def _entropies(values: Array, info: TargetInfo) -> Array:
    """Return the entropy of the probabilities of each group in nats, ``[r, g]``."""
    from scipy.special import entr

    terms = entr(values)
    if info.kind == "multilabel":
        return terms + entr(1.0 - values)
    return np.stack([terms[:, group].sum(axis=1) for group in _groups(info)], axis=1)
