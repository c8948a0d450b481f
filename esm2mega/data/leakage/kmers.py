"""Screens two sets of proteins for relatives by the k-mers that they share, where MMseqs2 is not installed.

Two proteins that share at least two words of four residues on neighbouring diagonals, which cover enough of
both, are aligned: first without gaps, and where that does not suffice in a band around the diagonal.
Identities that unrelated proteins of the same length reach do not count. Close relatives are found; of remote
ones, below 40 % identity, many share no such words and are missed.

Legend: ``n`` places of words, ``h`` pairs, ``L`` residues of the longest, ``w`` diagonals of the band.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from esm2mega.vocabulary import encode_residues

_WORD = 4
_FIRST, _NUM_LETTERS = 4, 20
"""The standard residues are the tokens from 4 on."""

_BAND = 16
"""Words count together on so many neighbouring diagonals, and alignments leave theirs by as many at most."""

_FEWEST_WORDS = 2
_FEWEST_PLACES = 64
"""Of a frequent word only the first places are looked at: four times the mean, but at least these."""

MOST_RELATIVES = 16
"""Each protein keeps so many relatives in another split; the screen aligns no others."""

_TOGETHER = 2048
"""Sets how many pairs are aligned together: some megabytes."""

_MOST_TOGETHER = 1 << 20
"""Bounds the residues of pairs that are aligned together, each as long as the longest: some megabytes too."""

_CLEAR = 0.9
"""From this identity on an alignment without gaps is taken as it is."""

# Scores, residues in common and columns of an alignment in one number: all three follow from one maximum.
_SCORE, _EQUAL = 1 << 40, 1 << 20
_SAME, _OTHER, _GAP = 5 * _SCORE + _EQUAL + 1, -_SCORE + 1, -6 * _SCORE + 1
_COUNT = _EQUAL - 1
_NEVER = -(1 << 61)

Rows = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


def kmer_hits(
    first: Sequence[str], second: Sequence[str], threshold: float, coverage: float
) -> tuple[Rows, Array, bool]:
    """Return the related pairs that are found.

    Args:
        first: Sequences that are searched.
        second: Sequences that are looked for.
        threshold: Least identity, of the columns of an alignment.
        coverage: Least share of the longer protein that the columns of an alignment are.

    Returns:
        Rows of `first` and `second`, ``[h, 2]``; identities, ``[h]``; and whether a protein of `second` may
        have more relatives, as the last one that was aligned is related too.
    """
    index, queries = _Index(_Proteins(first)), _Proteins(second)
    rows: list[Rows] = [np.zeros((0, 2), dtype=np.int64)]
    identities: list[Array] = [np.zeros(0)]
    is_capped = False
    each = (index.candidates(queries, row, coverage) for row in range(len(second)))
    for candidates in _in_batches(each, queries.lengths):
        found, columns = _aligned(index.proteins, queries, candidates)
        longer = np.maximum(index.proteins.lengths[candidates[:, 0]], queries.lengths[candidates[:, 1]])
        kept = (found >= np.maximum(threshold, _chance(columns))) & (columns >= coverage * longer)
        _, firsts, counts = np.unique(candidates[:, 1], return_index=True, return_counts=True)
        is_capped |= bool(kept[firsts[counts == MOST_RELATIVES] + MOST_RELATIVES - 1].any())
        rows.append(candidates[kept, :2])
        identities.append(found[kept])
    return np.concatenate(rows), np.concatenate(identities), is_capped


class _Proteins:
    """Holds proteins as tokens back to back.

    Attributes:
        tokens: Residues of all of them, uint8.
        starts: Where each begins.
        lengths: Number of residues of each.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        encoded = [encode_residues(sequence) for sequence in sequences]
        self.lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.concatenate([*encoded, np.zeros(1, dtype=np.uint8)])

    def words(self, begin: int, end: int) -> tuple[Rows, Rows]:
        """Return places of words of standard residues between two places, ``[n]``, and their numbers."""
        letters = self.tokens[begin:end].astype(np.int64) - _FIRST
        if len(letters) < _WORD:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(letters, _WORD)
        places = np.flatnonzero(((windows >= 0) & (windows < _NUM_LETTERS)).all(axis=1))
        return places, windows[places] @ (_NUM_LETTERS ** np.arange(_WORD))


class _Index:
    """Finds the places of words in proteins."""

    def __init__(self, proteins: _Proteins) -> None:
        self.proteins = proteins
        owners = np.repeat(np.arange(len(proteins.lengths)), proteins.lengths)
        places, words = proteins.words(0, len(proteins.tokens) - 1)
        if len(places):
            inside = owners[places] == owners[places + _WORD - 1]
            places, words = places[inside], words[inside]
        order = np.argsort(words, kind="stable")
        self._places = places[order]
        self._owners = owners[self._places]
        self._begins = np.searchsorted(words[order], np.arange(_NUM_LETTERS**_WORD + 1))
        self._most = max(_FEWEST_PLACES, 4 * len(places) // _NUM_LETTERS**_WORD)

    def candidates(self, queries: _Proteins, row: int, coverage: float) -> Rows:
        """Return proteins that share words with a query: row, row of the query, diagonal ``[h, 3]``."""
        start, length = int(queries.starts[row]), int(queries.lengths[row])
        own, words = queries.words(start, start + length)
        begins = self._begins[words]
        counts = np.minimum(self._begins[words + 1] - begins, self._most)
        total = int(counts.sum())
        shift = np.repeat(begins - (np.cumsum(counts) - counts), counts)
        found = shift + np.arange(total)
        owners = self._owners[found]
        diagonals = self._places[found] - self.proteins.starts[owners] - np.repeat(own, counts)
        lengths = self.proteins.lengths[owners]
        covered = np.minimum(length, lengths - diagonals) - np.maximum(0, -diagonals)
        longer = np.maximum(lengths, length)
        # Gaps may move an alignment to a diagonal that covers more.
        kept = (covered + _BAND // 2 >= coverage * longer) & (
            np.minimum(lengths, length) >= coverage * longer
        )
        # A key for each diagonal of each protein, with room between those of two proteins.
        span = 2 * length + int(lengths.max(initial=0)) + 2 * _BAND
        keys, num_words = np.unique(owners[kept] * span + diagonals[kept] + length, return_counts=True)
        sums = np.concatenate([[0], np.cumsum(num_words)])
        near = sums[np.searchsorted(keys, keys + _BAND // 2, side="right")]
        near = near - sums[np.searchsorted(keys, keys - _BAND // 2)]
        keys, num_words, near = (column[near >= _FEWEST_WORDS] for column in (keys, num_words, near))
        order = np.lexsort((-num_words, -near, keys // span))
        _, firsts = np.unique((keys // span)[order], return_index=True)
        best = order[firsts]
        best = best[np.argsort(-near[best], kind="stable")[:MOST_RELATIVES]]
        best_owners = keys[best] // span
        return np.stack([best_owners, np.full(len(best), row), keys[best] % span - length], axis=1)


def _in_batches(found: Iterable[Rows], lengths: Rows) -> Iterator[Rows]:
    """Join what belongs to single proteins, of these lengths, to batches of bounded size."""
    waiting: list[Rows] = []
    count = longest = 0
    for row, rows in enumerate(found):
        if not len(rows):
            continue
        length = max(longest, int(lengths[row]))
        if waiting and (count >= _TOGETHER or (count + len(rows)) * length > _MOST_TOGETHER):
            yield np.concatenate(waiting)
            waiting, count, length = [], 0, int(lengths[row])
        waiting.append(rows)
        count, longest = count + len(rows), length
    if waiting:
        yield np.concatenate(waiting)


def _aligned(first: _Proteins, second: _Proteins, candidates: Rows) -> tuple[Array, Rows]:
    """Return identity and columns of each pair on its diagonal or in the band around it, ``[h]`` each."""
    found, columns = _ungapped(first, second, candidates)
    rest = np.flatnonzero(found < _CLEAR)
    if len(rest):
        others, other_columns = _banded(first, second, candidates[rest])
        better = others > found[rest]
        found[rest[better]], columns[rest[better]] = others[better], other_columns[better]
    return found, columns


def _chance(lengths: Rows) -> Array:
    """Return the identity up to which unrelated proteins align at these lengths: the curve of Rost (1999)."""
    return np.minimum(4.8 * lengths ** (-0.32 * (1 + np.exp(-lengths / 1000))), 1.0)


def _ungapped(first: _Proteins, second: _Proteins, candidates: Rows) -> tuple[Array, Rows]:
    """Return the share of equal residues on the diagonal, and how many stand side by side there, ``[h]``."""
    rows, others, diagonals = candidates.T
    begins = np.maximum(0, -diagonals)
    covered = np.minimum(second.lengths[others], first.lengths[rows] - diagonals) - begins
    steps = np.arange(covered.max())
    inside = steps < covered[:, None]
    places = (second.starts[others] + begins)[:, None] + np.where(inside, steps, 0)
    other_places = (first.starts[rows] + begins + diagonals)[:, None] + np.where(inside, steps, 0)
    equal = (second.tokens[places] == first.tokens[other_places]) & inside
    return equal.sum(axis=1) / covered, covered


def _banded(first: _Proteins, second: _Proteins, candidates: Rows) -> tuple[Array, Rows]:
    """Return identity and columns of the best alignment within the band, with free ends, ``[h]`` each."""
    rows, others, diagonals = candidates.T
    lengths, other_lengths = first.lengths[rows], second.lengths[others]
    starts, other_starts = first.starts[rows], second.starts[others]
    steps = np.arange(-_BAND, _BAND + 1)
    gaps = steps * _GAP
    pairs = np.arange(len(rows))
    last = np.zeros((len(rows), len(steps)), dtype=np.int64)
    best = np.full(len(rows), _NEVER)
    for i in range(1, int(other_lengths.max()) + 1):
        # Residue j of the first, counted from 1, stands beside residue i of the second.
        j = (i + diagonals)[:, None] + steps
        places = np.minimum(starts[:, None] + np.clip(j - 1, 0, None), len(first.tokens) - 1)
        own = second.tokens[np.minimum(other_starts + i - 1, len(second.tokens) - 1)]
        now = last + np.where(first.tokens[places] == own[:, None], _SAME, _OTHER)
        np.maximum(now[:, :-1], last[:, 1:] + _GAP, out=now[:, :-1])
        now[j <= 0] = 0
        now = np.maximum.accumulate(now - gaps, axis=1) + gaps
        # An alignment ends with the first protein, or with the second one.
        ends = lengths - i - diagonals + _BAND
        there = (ends >= 0) & (ends < len(steps)) & (i <= other_lengths)
        best[there] = np.maximum(best[there], now[pairs[there], ends[there]])
        done = other_lengths == i
        if done.any():
            at_end = np.where(j[done] <= lengths[done, None], now[done], _NEVER).max(axis=1)
            best[done] = np.maximum(best[done], at_end)
        last = now
    columns, equal = best & _COUNT, (best >> 20) & _COUNT
    is_there = best > _NEVER
    return np.where(is_there, equal / np.maximum(columns, 1), 0.0), np.where(is_there, columns, 0)
