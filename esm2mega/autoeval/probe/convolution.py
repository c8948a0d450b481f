"""Fits a small convolution over the residues of proteins, as the head `cnn` of `esm2mega finetune` has it.

Legend: ``L`` residues of a protein, ``h`` hidden size, ``k`` outputs of all targets, ``m`` targets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esm2mega.data.labels.schema import IGNORED, TargetInfo

Array = npt.NDArray[Any]

CHANNELS, WIDTH, DROPOUT = 32, 7, 0.25
EPOCHS, PATIENCE, BATCH_PROTEINS, LEARNING_RATE = 50, 5, 8, 1e-3


@dataclass(frozen=True)
class ResidueExamples:
    """Serves the proteins of a split.

    Attributes:
        vectors: Reads the vectors of a protein by its number, fp32 ``[L, h]``.
        labels: The labels of each protein, ``[L, m]``; missing ones are `IGNORED` or NaN.
    """

    vectors: Callable[[int], Array]
    labels: Sequence[Array]


class Convolution:
    """Holds two 7 x 1 convolutions with a ReLU and dropout between them, for all targets together."""

    def __init__(self, hidden_size: int, info: TargetInfo, seed: int) -> None:
        self._info = info
        self._draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self._net = nn.Sequential(
                nn.Conv1d(hidden_size, CHANNELS, WIDTH, padding=WIDTH // 2),
                nn.ReLU(),
                nn.Dropout(DROPOUT),
                nn.Conv1d(CHANNELS, info.num_outputs, WIDTH, padding=WIDTH // 2),
            )

    def fit(self, train: ResidueExamples, valid: ResidueExamples) -> dict[str, float]:
        """Train until the loss of the validation split has not fallen for `PATIENCE` epochs; keep the best.

        Returns:
            The number of epochs and the smallest validation loss.
        """
        optimizer = torch.optim.Adam(self._net.parameters(), lr=LEARNING_RATE)
        best, smallest, chosen, since = copy.deepcopy(self._net.state_dict()), float("inf"), 0, 0
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=self._draw)))  # for dropout
            for epoch in range(1, EPOCHS + 1):
                self._net.train()
                order = torch.randperm(len(train.labels), generator=self._draw).tolist()
                for first in range(0, len(order), BATCH_PROTEINS):
                    total, count = self._loss(train, order[first : first + BATCH_PROTEINS])
                    if count:
                        optimizer.zero_grad()
                        (total / count).backward()
                        optimizer.step()
                loss = self._mean_loss(valid)
                since += 1
                if loss < smallest:
                    best, smallest, chosen, since = copy.deepcopy(self._net.state_dict()), loss, epoch, 0
                if since >= PATIENCE:
                    break
        self._net.load_state_dict(best)
        return {"epochs": chosen, "valid_loss": smallest}

    @torch.no_grad()
    def predict(self, vectors: Array) -> Array:
        """Return numbers or probabilities of a protein's residues, fp64 ``[L, k]``."""
        self._net.eval()
        output = self._net(torch.from_numpy(vectors).T[None])[0].T.double()
        if self._info.kind == "token_classification":
            parts = [output[:, target.outputs].softmax(dim=1) for target in self._info.targets]
            return torch.cat(parts, dim=1).numpy()
        mean, std = np.array(self._info.mean), np.array(self._info.std)
        return output.numpy() * std + mean

    @torch.no_grad()
    def _mean_loss(self, split: ResidueExamples) -> float:
        self._net.eval()
        numbers = range(len(split.labels))
        parts = [self._loss(split, numbers[i : i + BATCH_PROTEINS]) for i in numbers[::BATCH_PROTEINS]]
        return float(sum(total for total, _ in parts)) / max(1, sum(count for _, count in parts))

    def _loss(self, split: ResidueExamples, numbers: Sequence[int]) -> tuple[Tensor, int]:
        """Return the sum of the losses of some proteins over their labels, and the number of labels."""
        total, count = torch.zeros(()), 0
        # One after the other: in a padded batch the second convolution would see the biases of the first
        # behind a protein, which are zeros where the protein is alone.
        for number in numbers:
            each = self._net(torch.from_numpy(split.vectors(number)).T[None])[0].T
            for column, target in enumerate(self._info.targets):
                labels = torch.from_numpy(split.labels[number][:, column])
                if self._info.kind == "token_classification":
                    total = total + nn.functional.cross_entropy(
                        each[:, target.outputs], labels, ignore_index=IGNORED, reduction="sum"
                    )
                    count += int((labels != IGNORED).sum())
                    continue
                there = ~torch.isnan(labels)
                scaled = (labels - self._info.mean[column]) / self._info.std[column]
                total = total + ((each[there, column] - scaled[there].float()) ** 2).sum()
                count += int(there.sum())
        return total, count
