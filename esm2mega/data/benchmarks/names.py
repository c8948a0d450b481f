"""Lists the tasks of FLIP and TAPE by name: the kind of each, its splits, and FLIP's published sizes.

This module imports nothing heavy, so that the command line can list the tasks.

Sizes are those of the FLIP repository (J-SNACKKB/FLIP) and of its files. Where only the sum of training and
validation is published, the sum is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Holds the published numbers of proteins of a split; None where a number is not published.

    Attributes:
        train: Proteins to train on.
        valid: Proteins for validation.
        test: Proteins to test on.
        train_and_valid: Proteins of training and validation together.
        total: Proteins of all three together.
    """

    train: int | None = None
    valid: int | None = None
    test: int | None = None
    train_and_valid: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class FlipTask:
    """Describes one task of FLIP.

    Attributes:
        kind: The value of `task.kind` in fine-tuning.
        default: The split that is prepared unless another is named.
        splits: Published sizes by split.
        files: File names without ending by split, where they differ from the split's name.
        multilabel: Splits whose proteins have several classes each, separated by ``;``.
        masked: Whether there is a file of masks.
    """

    kind: str
    default: str
    splits: Mapping[str, Sizes]
    files: Mapping[str, str]
    multilabel: tuple[str, ...] = ()
    masked: bool = False

    @property
    def per_residue(self) -> bool:
        return self.kind == "token_classification"

    def kind_of(self, split: str) -> str:
        """Return `task.kind` for a split."""
        return "multilabel" if split in self.multilabel else self.kind


def _sums(train_and_valid: int, test: int) -> Sizes:
    return Sizes(train_and_valid=train_and_valid, test=test)


FLIP_TASKS: dict[str, FlipTask] = {
    "aav": FlipTask(
        "regression",
        "seven_vs_many",
        {
            "seven_vs_many": _sums(70_002, 12_581),
            "one_vs_many": _sums(1_170, 81_413),
            "two_vs_many": _sums(31_807, 50_776),
            "low_vs_high": _sums(47_546, 35_037),
            "sampled": _sums(66_066, 16_517),
            "des_mut": _sums(201_426, 82_583),
            "mut_des": _sums(82_583, 201_426),
        },
        {},
    ),
    "gb1": FlipTask(
        "regression",
        "two_vs_rest",
        {
            "two_vs_rest": Sizes(381, 43, 8309),
            "one_vs_rest": Sizes(25, 3, 8705),
            "three_vs_rest": Sizes(2691, 299, 5743),
            "low_vs_high": Sizes(4580, 509, 3644),
            "sampled": Sizes(6289, 699, 1745),
        },
        {},
    ),
    "meltome": FlipTask(
        "regression",
        "mixed",
        {
            "mixed": Sizes(22_335, 2482, 3134),
            "human": Sizes(test=1945, total=10_093),
            "human_cell": Sizes(test=1366, total=7158),
        },
        {"mixed": "mixed_split"},
    ),
    "scl": FlipTask(
        "classification",
        "mixed_soft",
        {
            "mixed_soft": Sizes(9503, 1678, 2768),
            "mixed_hard": Sizes(test=490),
            "human_soft": Sizes(test=577),
            "human_hard": Sizes(test=119),
            "balanced": Sizes(test=385),
            "mixed_vs_human_2": Sizes(),
        },
        {},
        multilabel=("mixed_vs_human_2",),
    ),
    "sav": FlipTask(
        "classification",
        "mixed",
        {"mixed": Sizes(total=109_449), "human": Sizes(total=15_076)},
        {},
    ),
    "bind": FlipTask(
        "token_classification",
        "from_publication",
        {
            "from_publication": Sizes(954, 106, 300),
            "one_vs_many": Sizes(996, 114, 250),
            "two_vs_many": Sizes(1201, 140, 19),
            "one_vs_sm": Sizes(999, 111, 134),
            "one_vs_mn": Sizes(254, 31, 32),
            "one_vs_sn": Sizes(254, 31, 53),
        },
        {},
    ),
    "conservation": FlipTask("token_classification", "sampled", {"sampled": Sizes(9392, 555, 519)}, {}),
    "secondary_structure": FlipTask(
        "token_classification",
        "sampled",
        {"sampled": Sizes(9712, 1080, 364)},
        {},
        masked=True,
    ),
}
"""This holds the eight tasks of FLIP by name."""


def differing(published: Sizes, found: Mapping[str, int]) -> list[str]:
    """Describe in words where numbers of proteins differ from the published ones.

    Args:
        published: Published sizes of a split.
        found: Numbers of proteins under ``train``, ``valid`` and ``test``.
    """
    compared = {
        "training": (published.train, found["train"]),
        "validation": (published.valid, found["valid"]),
        "test": (published.test, found["test"]),
        "training and validation": (published.train_and_valid, found["train"] + found["valid"]),
        "all": (published.total, sum(found.values())),
    }
    return [
        f"{number:,} {name} proteins, published are {expected:,}"
        for name, (expected, number) in compared.items()
        if expected is not None and expected != number
    ]


@dataclass(frozen=True)
class TapeTask:
    """Describes one task of TAPE.

    Attributes:
        folder: Name of the folder of its files, and first part of their names.
        kind: The value of `task.kind` in fine-tuning.
        field: Key of the labels in a record.
        splits: Published names of the splits: ``train`` and ``valid``, and those to test on.
        masked: Whether records have a `valid_mask`, which becomes the column of a mask.
    """

    folder: str
    kind: str
    field: str
    splits: tuple[str, ...] = ("train", "valid", "test")
    masked: bool = False


_STRUCTURE_SPLITS = ("train", "valid", "casp12", "ts115", "cb513")

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
        "secondary_structure", "token_classification", "ss3", _STRUCTURE_SPLITS, masked=True
    ),
    "secondary_structure_8": TapeTask(
        "secondary_structure", "token_classification", "ss8", _STRUCTURE_SPLITS, masked=True
    ),
    "contact_prediction": TapeTask("proteinnet", "contact", "tertiary", masked=True),
}
"""This holds the tasks of TAPE by the names that TAPE gives them, and the eight states of its structures."""
