"""The labelled tasks of TAPE by name; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TapeTask:
    """One task.

    Attributes:
        folder: Of its files, and the first part of their names.
        kind: What `task.kind` is in fine-tuning.
        field: Of the records.
        splits: As they are published; ``train`` and ``valid``, and those to test on.
    """

    folder: str
    kind: str
    field: str
    splits: tuple[str, ...] = ("train", "valid", "test")


TAPE_TASKS = {
    "fluorescence": TapeTask("fluorescence", "regression", "log_fluorescence"),
    "stability": TapeTask("stability", "regression", "stability_score"),
    "remote_homology": TapeTask(
        "remote_homology",
        "classification",
        "fold_label",
        ("train", "valid", "test_fold_holdout", "test_superfamily_holdout", "test_family_holdout"),
    ),
    "secondary_structure": TapeTask(
        "secondary_structure", "token_classification", "ss3", ("train", "valid", "casp12", "ts115", "cb513")
    ),
    "contact_prediction": TapeTask("proteinnet", "contact", "tertiary"),
}
"""By the names that TAPE gives them."""
