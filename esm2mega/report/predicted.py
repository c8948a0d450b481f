"""Draws what a fine-tuned model predicted of proteins with labels, from the file of `evaluate --out`."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError
from esm2mega.files import parse_json
from esm2mega.report.results.pictures import pictures_of_predictions
from esm2mega.report.results.predictions import targets_of

TEST_RESULT = "test.json"
"""Names, in the directory of a fine-tuning, what its test found."""

_DRAWN = ("regression", "classification", "token_classification", "token_regression")
"""Lists the kinds of which every prediction is in the file; of the others it has the likeliest ones."""

_SAME = 1e-3
"""Is the relative difference up to which two losses are those of the same proteins and weights."""


@dataclass(frozen=True)
class Tested:
    """Holds what `evaluate --out` has written.

    Attributes:
        step: Step of the checkpoint.
        loss: Its loss; None where nothing was to be predicted.
        data: The table that was evaluated.
        intervals: Metric -> its 95 % interval.
        rows: Identifier, prediction and label of each protein, as cells of a table; several targets have
            columns of their own. Empty for the kinds whose files do not have every prediction, and where
            names of classes hold blanks, so that the classes of residues cannot be told apart.
    """

    step: int
    loss: float | None
    data: str
    intervals: Mapping[str, tuple[float, float]]
    rows: Sequence[Mapping[str, str]]

    def is_of(self, step: int | None, loss: float | None) -> bool:
        """Return whether this is the test that a log has; another layout may round its loss otherwise."""
        if self.loss is None or loss is None:
            return self.step == step and self.loss == loss
        return self.step == step and math.isclose(self.loss, loss, rel_tol=_SAME)


def read_tested(path: Path, kind: str, cure: str) -> Tested | None:
    """Read a result; None where there is no such file.

    Args:
        path: The file.
        kind: The value of `task.kind`.
        cure: What to do with a damaged one.

    Raises:
        UserError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        intervals = {str(name): (float(low), float(high)) for name, (low, high) in found["intervals"].items()}
        rows = [_row(example) for example in found["predictions"]] if kind in _DRAWN else []
        loss = None if found["loss"] is None else float(found["loss"])
        try:
            targets_of(rows, kind)
        except ValueError:
            if kind != "token_classification":
                raise
            rows = []
        return Tested(int(found["step"]), loss, str(found["data"]), intervals, rows)
    except (OSError, LookupError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; {cure}") from None


def section_of(result: Tested, kind: str) -> str:
    """Return the section of a page with the pictures of a result, as HTML; empty where it has none.

    Args:
        result: The result.
        kind: The value of `task.kind`.
    """
    if not (pictures := pictures_of_results([result], kind)):
        return ""
    source = f"{len(result.rows):,} proteins of {result.data}, by the weights of step {result.step:,}"
    return (
        f"<h2>Predictions of the test</h2>\n<p>{html.escape(source)}; from <code>{TEST_RESULT}</code>.</p>\n"
        f"{pictures}"
    )


def pictures_of_results(results: Sequence[Tested], kind: str) -> str:
    """Return the pictures of all predictions of one or several results, side by side, as HTML.

    Args:
        results: The results, of one task.
        kind: The value of `task.kind`.
    """
    rows = [row for result in results for row in result.rows]
    pictures = "".join(pictures_of_predictions(rows, kind))
    return pictures and f'<div class="pictures">{pictures}</div>'


def _row(example: Mapping[str, Any]) -> dict[str, str]:
    """Return an example as a row of a table of predictions; several targets have columns of their own."""
    prediction, label = example["prediction"], example["label"]
    row = {"id": str(example["id"])}
    if not isinstance(prediction, dict):
        return {**row, "prediction": _cell(prediction), "label": _cell(label)}
    for name, value in prediction.items():
        row |= {f"label/{name}": _cell(label[name]), name: _cell(value)}
    return row


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list) else str(value)
