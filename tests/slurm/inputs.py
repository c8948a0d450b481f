"""Makes small inputs of the examples: proteins, token stores, and files as FLIP publishes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.quickstart.simulate import FamilySpec, simulate_families

RESIDUES = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def write_inputs(folder: Path) -> None:
    """Write proteins.fasta, store/ and FLIP/ with the tasks gb1 and secondary_structure."""
    spec = FamilySpec(median_length=120, length_sigma=0.3, min_length=40, max_length=250)
    simulate_families(folder / "proteins.fasta", n_families=20, members=20, spec=spec)
    prepare_fasta([folder / "proteins.fasta"], folder / "store", valid_size=30)
    write_gb1(folder / "FLIP" / "gb1" / "two_vs_rest.fasta")
    write_secondary_structure(folder / "FLIP" / "secondary_structure")


def write_gb1(path: Path, count: int = 60) -> None:
    """Write variants with a number each: how many of their residues are charged."""
    rng = np.random.default_rng(3)
    lines = []
    for number in range(count):
        sequence = rng.choice(RESIDUES, size=56)
        target = np.isin(sequence, list("DEKR")).mean()
        lines += [f">Sequence{number} TARGET={target} {_set(number)}", "".join(sequence)]
    _write(path, lines)


def write_secondary_structure(folder: Path, count: int = 60) -> None:
    """Write proteins with a state for each residue, which the residue alone decides, and a mask."""
    rng = np.random.default_rng(4)
    files: dict[str, list[str]] = {"sequences": [], "sampled": [], "mask": []}
    for number in range(count):
        sequence = "".join(rng.choice(RESIDUES, size=int(rng.integers(30, 60))))
        states = "".join("H" if x in "AELMQKRH" else "E" if x in "VIYCWFT" else "C" for x in sequence)
        files["sequences"] += [f">p{number}", sequence]
        files["sampled"] += [f">p{number} {_set(number)}", states]
        files["mask"] += [f">p{number}", "0" + "1" * (len(sequence) - 1)]
    for name, lines in files.items():
        _write(folder / f"{name}.fasta", lines)


def _set(number: int) -> str:
    """Return the part of a header that says which split a protein belongs to."""
    return f"SET={'test' if number % 4 == 0 else 'train'} VALIDATION={number % 4 == 1}"


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
