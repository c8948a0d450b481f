"""Compares splits that a user names, and says what they share: `esm2mega inspect --leakage`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from esm2mega.data.leakage.inputs import read_splits
from esm2mega.data.leakage.leaks import check_threshold, find_leaks
from esm2mega.files import check_out

_MOST_SHOWN = 20


def leakage_lines(paths: Sequence[str], threshold: float, threads: int, out: str | None) -> Iterator[str]:
    """Compare splits, write the pairs if asked to, and yield the lines of the report.

    Args:
        paths: Files of the splits, or one folder; see `read_splits`.
        threshold: Least identity of a related pair.
        threads: Number of threads of MMseqs2.
        out: CSV to write; None for none.

    Raises:
        UserError: A path cannot be read, the threshold is no share, or `out` cannot be written.
        MachineError: MMseqs2 failed.
    """
    check_threshold(threshold)
    if out is not None:
        check_out(Path(out))
    leaks = find_leaks(read_splits(paths), threshold, threads)
    yield from leaks.lines(_MOST_SHOWN, is_written=out is not None)
    if out is not None:
        leaks.write(Path(out))
        yield f"{out}: {leaks.num_pairs:,} pairs"
