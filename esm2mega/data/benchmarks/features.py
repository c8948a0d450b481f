"""Writes labelled proteins as data directories of Cerebras Model Zoo, which its loader for BERT reads.

A directory holds a CSV of token ids, padded to one length, with a mask and a label; and ``meta.dat``, which
lists the file and its number of rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from esm2mega import vocabulary
from esm2mega.config.task import DATA_DIR_LIST
from esm2mega.data.benchmarks.tables import LabelledRow
from esm2mega.data.labels.data_dir import LABEL_COLUMNS
from esm2mega.data.labels.tokenised import ATTENTION_MASK, INPUT_IDS
from esm2mega.data.store.staging import staged

TOKENS = 1026
"""A protein has this many tokens there, with `<cls>`, `<eos>` and padding; longer ones lose their end."""


@contextmanager
def written_features(out: Path | None, rows: Mapping[str, Sequence[LabelledRow]]) -> Iterator[list[str]]:
    """Write ``SPLIT/SPLIT.csv`` and ``SPLIT/meta.dat`` for every split that has proteins.

    Args:
        out: Directory to make, which appears when the block ends well; None for none.
        rows: Proteins by split, each with one label, a whole number.

    Yields:
        A line for each split, and one for the proteins that were cut.
    """
    lines: list[str] = []
    if out is None:
        yield lines
        return
    with staged(out) as folder:
        for split, proteins in rows.items():
            if not proteins:
                continue
            (folder / split).mkdir()
            name = f"{split}.csv"
            with (folder / split / name).open("w", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                # The loader reads the first of the columns of labels, its documentation names the second.
                table.writerow([INPUT_IDS, ATTENTION_MASK, *LABEL_COLUMNS])
                table.writerows([*_cells(row.sequence), *row.labels * len(LABEL_COLUMNS)] for row in proteins)
            (folder / split / DATA_DIR_LIST).write_text(f"{name} {len(proteins)}\n")
            lines.append(f"{out / split}: {len(proteins):,} proteins of {TOKENS} tokens, and {DATA_DIR_LIST}")
        cut = sum(len(row.sequence) > TOKENS - 2 for proteins in rows.values() for row in proteins)
        if cut:
            lines.append(f"{out}: {cut} proteins of more than {TOKENS - 2:,} residues are cut to these")
        yield lines


def _cells(sequence: str) -> tuple[str, str]:
    """Return token ids and mask of a protein as lists in text, ``[TOKENS]`` each."""
    residues = vocabulary.encode_residues(sequence)[: TOKENS - 2].tolist()
    ids = [vocabulary.CLS, *residues, vocabulary.EOS]
    padding = TOKENS - len(ids)
    return str(ids + [vocabulary.PAD] * padding), str([1] * len(ids) + [0] * padding)
