"""Small data in the layout in which FLIP publishes its tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LETTERS = "LAGVSERTIDPKQNFYMHWC"
_DOMAIN = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTELEVL"
"""Is protein G's B1 domain with the first residues of the tag that FLIP's sequences have."""


def write_gb1(folder: Path, split: str = "two_vs_rest", number: int = 48) -> None:
    """Variants at the positions 39, 40, 41 and 54; the value depends on two of them, and on chance."""
    rng = np.random.default_rng(5)
    lines = []
    for row in range(number):
        letters = list(_DOMAIN)
        for position in (39, 40, 41, 54):
            if row:  # the first one is the wild type
                letters[position - 1] = str(rng.choice(list(LETTERS)))
        value = LETTERS.index(letters[38]) - 0.5 * LETTERS.index(letters[53]) + rng.normal()
        split_of_row = ("train", "train", "test")[row % 3]
        header = f">Sequence{row} TARGET={value:.6f} SET={split_of_row} VALIDATION={row % 6 == 1}"
        lines.append(f"{header}\n{''.join(letters)}\n")
    folder.mkdir(parents=True)
    (folder / f"{split}.fasta").write_text("".join(lines))


def write_secondary_structure(folder: Path, number: int = 24) -> None:
    """Three states of which residues know most, of proteins with unequal lengths and masks."""
    rng = np.random.default_rng(6)
    files: dict[str, list[str]] = {"sequences": [], "sampled": [], "mask": []}
    for row in range(number):
        codes = rng.integers(0, 20, rng.integers(20, 60))
        states = ["CEH"[(code + (rng.random() < 0.2)) % 3] for code in codes.tolist()]
        mask = "".join(map(str, (rng.random(len(codes)) < 0.9).astype(int)))
        split = ("train", "train", "test")[row % 3]
        files["sequences"].append(f">s{row}\n{''.join(LETTERS[code] for code in codes)}\n")
        files["sampled"].append(f">s{row} SET={split} VALIDATION={row % 6 == 1}\n{''.join(states)}\n")
        files["mask"].append(f">s{row}\n{mask}\n")
    folder.mkdir(parents=True)
    for name, lines in files.items():
        (folder / f"{name}.fasta").write_text("".join(lines))
