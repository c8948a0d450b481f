"""Defines the dropout that stands in for PyTorch's in a user's head, the same at every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.errors import UserError
from esm2mega.model.dropout import KeyedDropout


class SampleDropout(torch.nn.Module):
    """Stands in for `torch.nn.Dropout` in a head, which knows nothing of keys; drops as `KeyedDropout` does.

    The number of rows tells whether they are of proteins or of residues, which a pack of proteins of one
    residue each leaves open. So the row of a protein drops as that of its first residue: in such a pack both
    are the same, and what is dropped never follows from the other proteins.

    Attributes:
        segments: Proteins and residues of the pack that the head predicts; set before each pack.
    """

    segments: Segments

    def __init__(self, p: float, layer: int) -> None:
        """Set the arguments of `KeyedDropout`."""
        super().__init__()
        self._dropout = KeyedDropout(p, layer)

    def forward(self, values: Tensor) -> Tensor:
        """Drop elements of ``[n, …]`` of proteins or ``[R, …]`` of residues."""
        if not self.training:
            return values
        segments, rows = self.segments, values.flatten(1)
        if len(values) == segments.num_proteins:
            # [n]
            first = torch.zeros_like(segments.keys)
            first.scatter_reduce_(0, segments.owners, segments.numbers, "amin", include_self=False)
            dropped = self._dropout(rows, segments.keys, first)
        elif len(values) == len(segments.owners):
            dropped = self._dropout(rows, segments.keys[segments.owners], segments.numbers)
        else:
            raise UserError(
                f"torch.nn.Dropout of a head got {list(values.shape)}; it needs a row for each of "
                f"{segments.num_proteins} proteins or of {len(segments.owners)} residues, to drop the same "
                "at every layout"
            )
        return dropped.view_as(values)
