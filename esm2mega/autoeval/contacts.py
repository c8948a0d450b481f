"""Judges predicted contacts: the map of each test protein becomes counts, of which metrics are made.

Legend: ``n`` proteins, ``m`` metrics of `NAMES`, ``L`` residues of a protein.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from esm2mega.data.labels.contacts import pair_labels
from esm2mega.data.labels.dataset import LabelledProteins
from esm2mega.data.labels.schema import IGNORED
from esm2mega.errors import UserError
from esm2mega.finetune.contact_metrics import Array, contact_counts
from esm2mega.finetune.metrics import objects
from esm2mega.infer import hdf5_checksums
from esm2mega.pairs import pairs_of


def counts_of_maps(path: Path, proteins: LabelledProteins) -> Array:
    """Count the contacts among the likeliest pairs of each protein, ``[n, m, 2]``, as `contact_counts` does.

    One map is held at a time.

    Args:
        path: HDF5 file as `esm2mega embed --include contacts` and `esm2mega predict` write it.
        proteins: The proteins with coordinates, in the order of the file.

    Raises:
        UserError: The file is damaged, or holds other proteins.
    """
    assert proteins.labels is not None
    hdf5_checksums.verify(path)
    counts = []
    with h5py.File(path) as file:
        borders = file["contact_offsets"][:]
        if file["ids"].asstr()[:].tolist() != list(proteins.ids) or not np.array_equal(
            np.diff(borders), proteins.lengths**2
        ):
            raise UserError(f"{path}: holds other proteins than {proteins.path}; make it again")
        for number, length in enumerate(proteins.lengths.tolist()):
            found = file["contacts"][borders[number] : borders[number + 1]].reshape(length, length)
            atoms = proteins.labels[proteins.offsets[number] : proteins.offsets[number + 1]]
            pairs = objects([found[pairs_of(length)]]), objects([pair_labels(atoms, IGNORED)])
            counts.append(contact_counts(*pairs))
    return np.concatenate(counts)
