"""Random tables: what is accepted decodes to what was encoded, and all else is refused with its line."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from esm2mega.config.schema import DataConfig
from esm2mega.data.labels.dataset import LabelledProteins, read_labelled
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from tests.label_tables import KINDS, Table, tables, write


def decoded(table: Table, found: LabelledProteins, info: TargetInfo) -> list[Any]:
    """The labels that were read, in the form of `Table.meanings`."""
    assert found.labels is not None
    rows = found.labels.tolist()
    if table.kind.startswith("token"):
        if table.kind == "token_classification":
            entries = [None if row[0] == -100 else info.names[row[0]] for row in rows]
        else:
            entries = [None if math.isnan(row[0]) else row[0] for row in rows]
        borders = found.offsets.tolist()
        return [entries[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    if table.kind == "classification":
        return [info.names[number] for number in rows]
    if table.kind == "multilabel":
        return [{name for name, flag in zip(info.names, row, strict=True) if flag} for row in rows]
    missing = [[None if math.isnan(value) else value for value in row] for row in rows]
    return missing if table.kind == "flags" else [value for (value,) in missing]


def check(table: Table, format: str, text_type: Any, ends: Counter[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, task, places = write(table, format, text_type, Path(folder))
        try:
            found, info = read_labelled(path, task, DataConfig(), None, "data.train")
        except UserError as error:
            assert not table.is_plain, error
            expected = places if table.damaged is None else [places[table.damaged]]
            assert str(error).startswith(tuple(expected)) and "\n" not in str(error), error
            ends["refused"] += 1
            return
    assert table.damaged is None
    meanings = [set(names) for names in table.meanings] if table.kind == "multilabel" else table.meanings
    assert decoded(table, found, info) == meanings
    ends["accepted"] += 1


COMBINATIONS = [(kind, encoding) for kind, encodings in KINDS.items() for encoding in encodings]


@pytest.mark.parametrize("number", [12, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "encoding"), COMBINATIONS)
def test_random_tables(kind: str, encoding: str, number: int) -> None:
    """The slow form makes more than 2,000 tables."""
    ends: Counter[str] = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None)
    @given(tables(kind, encoding))
    def run(drawn: tuple[Table, str, Any]) -> None:
        check(*drawn, ends)

    run()
    assert ends["accepted"] and ends["refused"], ends
    assert number < 80 or len(COMBINATIONS) * number > 2000
