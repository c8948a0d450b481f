"""Windows over the tokens of long proteins."""

import numpy as np
import pytest

from esm2mega.infer.proteins import Lengths
from esm2mega.infer.windows import optimal, overlapping, whole
from esm2mega.vocabulary import CLS, EOS, encode_residues

RESIDUES = encode_residues("LAGVSERTID")
TOKENS = np.array([CLS, *RESIDUES, EOS])


@pytest.mark.parametrize(("width", "overlap"), [(3, 0), (5, 2), (5, 4), (7, 3), (11, 1), (12, 6), (40, 20)])
def test_overlapping_windows_cover_every_token_and_overlap_enough(width: int, overlap: int) -> None:
    windows = overlapping(len(RESIDUES), width, overlap)
    assert [w.start for w in windows] == sorted({w.start for w in windows})
    assert windows[0].start == 0 and windows[-1].stop == len(TOKENS)
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.stop - after.start >= overlap
    for window in windows:
        assert window.num_tokens == min(width, len(TOKENS))
        tokens = window.tokens(RESIDUES)
        assert tokens.tolist() == TOKENS[window.start : window.stop].tolist()
        assert tokens[window.residue_tokens].tolist() == RESIDUES[window.residues].tolist()
    limits = Lengths(width, "chunk", overlap)
    assert limits.counts(np.array([len(RESIDUES)], dtype=np.int32)).tolist() == [len(windows)]


def test_the_optimal_window_is_that_of_proteingym() -> None:
    """Positions and windows of ProteinGym's `get_optimal_window`, which counts tokens: position is residue
    + 1.
    """
    total, width = 2002, 1024
    for residue, start in [
        (0, 0),
        (510, 0),
        (511, 0),
        (512, 1),
        (1000, 489),
        (1488, 977),
        (1489, 978),
        (1999, 978),
    ]:
        window = optimal(residue, total - 2, width)
        assert (window.start, window.stop) == (start, start + width)
        assert window.start <= residue + 1 < window.stop
    assert optimal(5, 1022, 1024) == whole(1022)
