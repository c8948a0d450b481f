"""Reads and checks the keys that cut one table of labelled proteins into splits."""

from __future__ import annotations

import math

from esm2mega.config.schema import DataConfig
from esm2mega.errors import UserError

SPLITS = ("train", "valid", "test")

RANDOM, CLUSTER = "random", "cluster:"
"""These values of `data.split_by` name no column; behind the second one is the identity of relatives."""

FOLD = "fold:"
"""Begins a value of `data.split` that names one of several folds, as ``fold:2/5``, counted from 1."""

_FEWEST_FOLDS = 3
_TOLERANCE = 1e-6


def is_cut(data: DataConfig) -> bool:
    """Tell whether `data.train` is one table that is cut into splits."""
    return data.split is not None or data.split_by != RANDOM


def has_valid(data: DataConfig) -> bool:
    """Tell whether there are validation data; a column of splits is taken to name some."""
    return data.valid is not None or is_cut(data)


def split_shares(data: DataConfig) -> list[float] | None:
    """Return the shares of the parts that `part_names` names; None where a column names the splits."""
    if data.split is None:
        return None
    if data.split.startswith(FOLD):
        count = _fold(data.split)[1]
        return [1 / count] * count
    words = data.split.split("/")
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    if len(shares) not in (2, 3) or not all(0 < share < 1 for share in shares):
        raise UserError(
            f"data.split={data.split} must be shares above 0 of training, validation and test, such as "
            "0.8/0.1/0.1, or of the first two, such as 0.8/0.2"
        )
    if not math.isclose(sum(shares), 1, abs_tol=_TOLERANCE):
        raise UserError(f"data.split={data.split} adds up to {sum(shares):g}; the shares must add up to 1")
    return shares


def part_names(data: DataConfig) -> list[str]:
    """Return the split that each part of the table is; of folds one is the test, the next one validates."""
    assert data.split is not None
    if not data.split.startswith(FOLD):
        return list(SPLITS[: data.split.count("/") + 1])
    number, count = _fold(data.split)
    names = ["train"] * count
    names[number - 1], names[number % count] = "test", "valid"
    return names


def _fold(split: str) -> tuple[int, int]:
    """Return the number of a fold, from 1, and how many there are."""
    number, _, count = split.removeprefix(FOLD).partition("/")
    if number.isdecimal() and count.isdecimal() and len(count) < 6 and int(count) >= _FEWEST_FOLDS:
        found = int(number), int(count)
        if 1 <= found[0] <= found[1]:
            return found
    raise UserError(
        f"data.split={split} must be one of {_FEWEST_FOLDS} or more folds, such as fold:1/5 for the first of "
        "five"
    )


def split_column(data: DataConfig) -> str | None:
    """Return the column by which rows are split; None for chance and clusters."""
    is_column = data.split_by != RANDOM and not data.split_by.startswith(CLUSTER)
    return data.split_by if is_column else None


def check_split(data: DataConfig, is_labelled: bool) -> None:
    """Check the keys against each other.

    Raises:
        UserError: They say nothing that can be done.
    """
    if not is_cut(data):
        return
    shown = f"data.split={data.split}" if data.split is not None else f"data.split_by={data.split_by}"
    if not is_labelled:
        raise UserError(
            f"{shown} cuts tables of labelled proteins, and this is a pretraining; set data.split=null and "
            "data.split_by=random, and draw proteins with `esm2mega prepare fasta --val-size N --test-size N`"
        )
    for split in ("valid", "test"):
        if (path := getattr(data, split)) is not None:
            raise UserError(
                f"{shown} cuts data.train into all splits, and data.{split}={path} names one; set "
                f"data.{split}=null, or data.split=null and data.split_by=random"
            )
    split_shares(data)
    if data.split_by.startswith(CLUSTER):
        text = data.split_by.removeprefix(CLUSTER)
        try:
            identity = float(text)
        except ValueError:
            identity = 0.0
        if not 0 < identity <= 1:
            raise UserError(
                f"data.split_by={data.split_by}: the identity behind cluster: must be above 0 and at most 1, "
                "such as cluster:0.5"
            )
        if data.split is None:
            raise UserError(
                f"data.split_by={data.split_by} needs the shares of the splits; set data.split=0.8/0.1/0.1"
            )
