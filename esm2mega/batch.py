"""Defines the micro-batches that the data pipeline hands to the model and the losses: packs with labels.

T   tokens of a pack, padding included: at most `train.micro_batch_tokens`
n   segments: proteins, or pieces of them
M   tokens to predict
R   residues of the proteins
k   outputs of a head
m   target columns
P   pairs of residues of the same protein, see `esm2mega.pairs`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esm2mega import vocabulary
from esm2mega.parcel import Parcel


@dataclass(frozen=True)
class PackedBatch:
    """Holds one micro-batch: a pack of proteins, one behind the other, with its labels.

    Attributes:
        input_ids: token ids after masking, `<pad>` behind the last protein, int64 [T].
        cu_seqlens: where each segment begins, and T at the end, int32 [n + 1].
        seqlens: tokens of each segment on the host, n numbers that add up to T.
        max_seqlen: the largest of `seqlens`.
        label_positions: positions of the tokens to predict, ascending, int64 [M].
        labels: the original tokens there, int64 [M].
        label_counts: tokens to predict in each segment on the host, n numbers that add up to M.
        num_tokens: tokens of proteins, `<cls>` and `<eos>` included, padding not.
        num_residues: tokens of proteins without `<cls>` and `<eos>`.
        num_sequences: proteins, or pieces of them, in the pack.
        rows: for evaluation, the row of each segment's protein in the store, -1 for padding, n numbers on the
            host; None in training.
        samples: for each piece of a protein, the number of its sample and of its first token, on the host.
        starts: where each of these pieces begins in the pack, on the host.
        pack: number of the pack in the order of all packs; -1 for padding, and in evaluation.
        borders: on a GPU, borders of the segments and of their labels, see `host_borders`; else None.
        host_positions: on a GPU, `label_positions` on the host; else None.
        parcel: the tensors of this batch, ready to be sent to a GPU; None for not yet.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    seqlens: list[int]
    max_seqlen: int
    label_positions: Tensor
    labels: Tensor
    label_counts: list[int]
    num_tokens: int
    num_residues: int
    num_sequences: int
    rows: list[int] | None = None
    samples: Sequence[tuple[int, int]] = ()
    starts: Sequence[int] = ()
    pack: int = -1
    borders: Tensor | None = None
    host_positions: npt.NDArray[np.int64] | None = None
    parcel: Parcel | None = None

    def by_protein(self, logits: Tensor) -> Iterator[tuple[int, PackedBatch, Tensor]]:
        """Split a batch of an evaluation by its segments; those without labels are left out.

        Args:
            logits: Logits of the tokens to predict, ``[M, v]``.

        Yields:
            The row of the protein, this batch with the labels of the segment alone, and their logits.
        """
        assert self.rows is not None
        for number, (row, labels) in enumerate(zip(self.rows, _slices(self.label_counts), strict=True)):
            if not (count := self.label_counts[number]):
                continue
            label_counts = [0] * len(self.rows)
            label_counts[number] = count
            part = replace(
                self,
                label_positions=self.label_positions[labels],
                labels=self.labels[labels],
                label_counts=label_counts,
                host_positions=None if self.host_positions is None else self.host_positions[labels],
            )
            yield row, part, logits[labels]

    @property
    def head_inputs(self) -> Tensor:
        """Return what the head needs to know about the batch; for the LM head, the tokens that get logits.

        A LabelledBatch gives `Segments` here.
        """
        return self.label_positions

    @property
    def label_places(self) -> npt.NDArray[np.int64]:
        """Return `label_positions` on the host, without waiting for a device."""
        return self.label_positions.numpy() if self.host_positions is None else self.host_positions

    def without_labels(self) -> PackedBatch:
        """Return a batch of the same tokens in which no token is to be predicted."""
        return replace(
            self,
            label_positions=self.label_positions[:0],
            labels=self.labels[:0],
            label_counts=[0] * len(self.seqlens),
            borders=None,
            host_positions=None if self.host_positions is None else self.host_positions[:0],
            parcel=None,
        )

    def packed_up(self) -> PackedBatch:
        """Return this batch ready to be sent to a GPU, for which the thread that builds batches has time."""
        tensors = [self.input_ids, self.label_positions, self.labels]
        return replace(self, parcel=Parcel.of([*tensors, host_borders(self.seqlens, self.label_counts)]))

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return this batch with its tensors on `device`; the host numbers stay on the host."""
        if self.input_ids.device == torch.device(device):
            return self
        parcel = self.parcel or self.packed_up().parcel
        assert parcel is not None
        input_ids, label_positions, labels, borders = parcel.to(device)
        return replace(
            self,
            input_ids=input_ids,
            cu_seqlens=borders[0],
            label_positions=label_positions,
            labels=labels,
            borders=borders,
            host_positions=self.label_places,
            parcel=None,
        )


@dataclass(frozen=True)
class Segments:
    """Says where the proteins and their residues lie in a pack: what a head knows besides hidden states.

    Attributes:
        num_proteins: Number of proteins, n.
        first: Position of each protein's first token, `<cls>` unless that was cropped away, int64 ``[n]``.
        residues: Positions of the residues, ascending, int64 ``[R]``.
        owners: Which of the n proteins each residue belongs to, int64 ``[R]``.
        numbers: Number of each residue within its whole protein, from 0, int64 ``[R]``.
        keys: 64 random bits for each protein in this step, for dropout; int64 ``[n]``.
        tokens: Token ids of each protein as bytes, on the host; the hidden states depend on them.
        starts: The numbers of `first`, on the host.
    """

    num_proteins: int
    first: Tensor
    residues: Tensor
    owners: Tensor
    numbers: Tensor
    keys: Tensor
    tokens: tuple[bytes, ...]
    starts: tuple[int, ...]

    @property
    def spans(self) -> list[slice]:
        """Return, on the host, where in its own tokens the residues of each protein are."""
        return [
            slice(int(text[0] == vocabulary.CLS), len(text) - int(text[-1] == vocabulary.EOS))
            for text in self.tokens
        ]

    @property
    def residue_counts(self) -> list[int]:
        """Return the number of residues of each protein, on the host."""
        return [span.stop - span.start for span in self.spans]

    def protein(self, number: int, residues: slice) -> Segments:
        """Return the segments of one of the n proteins, as the only one of the pack.

        Args:
            number: Number of the protein.
            residues: Which of the R residues are its own.
        """
        alone = slice(number, number + 1)
        return Segments(
            num_proteins=1,
            first=self.first[alone],
            residues=self.residues[residues],
            owners=torch.zeros_like(self.owners[residues]),
            numbers=self.numbers[residues],
            keys=self.keys[alone],
            tokens=self.tokens[alone],
            starts=self.starts[alone],
        )

    @staticmethod
    def of_protein(tokens: Tensor) -> Segments:
        """Describe a pack of one whole protein with `<cls>` and `<eos>`, int64 ``[T]``; `keys` are 0."""
        residues = torch.arange(1, len(tokens) - 1)
        nothing = torch.zeros(1, dtype=torch.int64)
        content = tokens.numpy().astype("uint8").tobytes()
        owners = torch.zeros_like(residues)
        return Segments(1, nothing, residues, owners, residues - 1, nothing, (content,), (0,))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.first, self.residues, self.owners, self.numbers, self.keys]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Segments:
        """Return these segments with the tensors that `tensors` returned, as they are elsewhere."""
        first, residues, owners, numbers, keys = tensors
        return replace(self, first=first, residues=residues, owners=owners, numbers=numbers, keys=keys)

    def to(self, device: torch.device | str) -> Segments:
        """Return these segments with their tensors on `device`."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])


@dataclass(frozen=True)
class LabelledBatch:
    """Holds one micro-batch of labelled proteins.

    Attributes:
        input_ids: Token ids, `<pad>` behind the last protein, int64 ``[T]``.
        seqlens: Tokens of each segment on the host, padding included; they add up to T.
        head_inputs: What the head needs to know about the batch; for the heads of tasks, where proteins and
            residues lie (a PackedBatch gives a tensor of positions here).
        labels: For labels of proteins float64 ``[n, k]`` (NaN: no label) or int64 ``[n]`` (-100: no label);
            for residues either type, ``[R, m]``; for pairs int8 ``[P]``. None for prediction.
        rows: Row of each protein in the table, int64 ``[n]``.
        num_tokens: Tokens of proteins, without padding.
        num_residues: Number of residues, R.
        num_sequences: Number of proteins, or pieces of them, n.
        samples: For each of the n, the number of its sample and of its first token, on the host.
        pack: Number of the pack in the order of all packs; -1 for padding, and in evaluation.
        borders: On a GPU, borders of the segments, see `host_borders`; else None.
        parcel: The tensors of this batch, ready to be sent to a GPU; None for not yet.
    """

    input_ids: Tensor
    seqlens: list[int]
    head_inputs: Segments
    labels: Tensor | None
    rows: Tensor
    num_tokens: int
    num_residues: int
    num_sequences: int
    samples: Sequence[tuple[int, int]] = ()
    pack: int = -1
    borders: Tensor | None = None
    parcel: Parcel | None = None

    label_counts = label_places = None
    """These are None because the head needs every hidden state, so the last layer computes all of them."""

    @property
    def starts(self) -> Sequence[int]:
        """Return where each of the n pieces begins in the pack, on the host."""
        return self.head_inputs.starts

    def by_protein(self, output: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, LabelledBatch, Tensor]]:
        """Split a batch with labels by its proteins.

        Args:
            output: What the head returned, with a row for each row of `labels`.
            sizes: How many of these rows belong to each of the n proteins.

        Yields:
            The row of the protein in the table, the batch of this protein alone, and its part of the output.
        """
        assert self.labels is not None
        residues, entries = (_slices(counts) for counts in (self.head_inputs.residue_counts, sizes))
        for number, row in enumerate(self.rows.tolist()):
            segments = self.head_inputs.protein(number, residues[number])
            part = replace(
                self,
                head_inputs=segments,
                labels=self.labels[entries[number]],
                rows=self.rows[number : number + 1],
                num_residues=len(segments.residues),
                num_sequences=1,
                samples=self.samples[number : number + 1],
            )
            yield row, part, output[entries[number]]

    def packed_up(self) -> LabelledBatch:
        """Return this batch ready to be sent to a GPU, for which the thread that builds batches has time."""
        labels = [] if self.labels is None else [self.labels]
        borders = host_borders(self.seqlens)
        return replace(self, parcel=Parcel.of([self.input_ids, borders, *self.head_inputs.tensors, *labels]))

    def to(self, device: torch.device | str) -> LabelledBatch:
        """Return this batch with its tensors on `device`, except `rows`."""
        if self.input_ids.device == torch.device(device):
            return self
        parcel = self.parcel or self.packed_up().parcel
        assert parcel is not None
        input_ids, borders, *others = parcel.to(device)
        labels = None if self.labels is None else others.pop()
        segments = self.head_inputs.with_tensors(others)
        return replace(
            self, input_ids=input_ids, head_inputs=segments, labels=labels, borders=borders, parcel=None
        )

    def without_labels(self) -> LabelledBatch:
        """Return a batch of the same tokens for which nothing is predicted."""
        nothing = self.rows[:0]
        segments = Segments(0, nothing, nothing, nothing, nothing, nothing, (), ())
        labels = None if self.labels is None else self.labels[:0]
        emptied = replace(self, head_inputs=segments, labels=labels, rows=nothing, samples=(), parcel=None)
        return replace(emptied, num_residues=0, num_sequences=0)


def host_borders(seqlens: Sequence[int], label_counts: Sequence[int] | None = None) -> Tensor:
    """Return where each segment begins, and T at the end: int32 ``[1, n + 1]``, on the host.

    Args:
        seqlens: Tokens of each of the n segments.
        label_counts: Labels of each; with them a second row says where the labels of each segment begin.
    """
    counts = [seqlens] if label_counts is None else [seqlens, label_counts]
    return torch.tensor([[0, *accumulate(row)] for row in counts], dtype=torch.int32)


def _slices(counts: Sequence[int]) -> list[slice]:
    """Return where each of several parts lies that follow each other, given their lengths."""
    return [slice(*borders) for borders in pairwise(accumulate(counts, initial=0))]
