"""Holds the proteins of a fine-tuning by classes: sequences with values, and the data sets of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from esm2mega.data.labels.in_memory import Proteins
from esm2mega.errors import UserError


class InMemorySingleValueDataset(Dataset[tuple[str, Any]]):
    """Holds sequences with a value each; a subclass may compute other pairs in `__getitem__`."""

    def __init__(self, data: Sequence[tuple[str, Any]]) -> None:
        """Take `data`: (sequence, value) of each protein."""
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        """Return sequence and value of a protein: a number, the name of a class, or what the task has."""
        sequence, value = self.data[index]
        return sequence, value


@dataclass(frozen=True)
class FineTuneDataModule:
    """Holds the data sets of a training and of predictions.

    Each is a `InMemorySingleValueDataset`, another data set of such pairs, or what
    `esm2mega.finetune.train_model` takes; all processes are given the same.

    Attributes:
        train_dataset: Proteins to train on.
        valid_dataset: Proteins to validate on; None for no validation.
        predict_dataset: Proteins to predict, with or without values.
    """

    train_dataset: Proteins | None = None
    valid_dataset: Proteins | None = None
    predict_dataset: Proteins | None = None

    def sequences(self) -> Proteins:
        """Return the sequences of `predict_dataset`; of pairs without the values.

        Raises:
            UserError: There is no such data set.
        """
        given = self.predict_dataset
        if given is None:
            raise UserError(
                "predict_dataset is not set; give FineTuneDataModule(predict_dataset=…), for instance an "
                "InMemorySingleValueDataset"
            )
        if not isinstance(given, (Dataset, list, tuple)):
            return given
        # A data set of torch need not end by itself, so it is asked for its length.
        count = len(given)  # type: ignore[arg-type]
        entries = [given[number] for number in range(count)]
        return [entry[0] if isinstance(entry, (list, tuple)) else entry for entry in entries]
