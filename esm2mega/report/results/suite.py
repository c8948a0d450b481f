"""Reads the results of a suite of benchmarks, and takes out of them what belongs to some of its models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esm2mega.errors import UserError
from esm2mega.files import parse_json

RESULTS_JSON = "results.json"

MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""Is raised where files are missing from a folder of results, or do not hold what a suite writes."""


@dataclass(frozen=True)
class Suite:
    """Holds the results of a suite.

    Attributes:
        named: The folder, as the user named it.
        folder: The folder, to which the paths in the results are relative.
        results: Content of ``results.json``.
    """

    named: str
    folder: Path
    results: Mapping[str, Any]

    def of_models(self, names: Collection[str]) -> Suite:
        """Return the suite as if it had measured these models alone; baselines and published rows stay."""
        models = [model for model in self.results["models"] if model["name"] in names]
        tasks = [
            {
                **task,
                "rows": [row for row in task["rows"] if row["row"] != "model" or row["model"] in names],
                "differences": [
                    each
                    for each in task["differences"]
                    if each["a"]["model"] in names and each["b"]["model"] in names
                ],
            }
            for task in self.results["tasks"]
        ]
        return replace(self, results={**self.results, "models": models, "tasks": tasks})


def read_suite(named: str | Path) -> Suite:
    """Read the results of a suite.

    Args:
        named: Folder that `esm2mega autoeval` wrote, or the ``results.json`` in it.

    Raises:
        UserError: There are no results.
    """
    path = Path(named)
    path = path / RESULTS_JSON if path.is_dir() else path
    try:
        results = parse_json(path.read_bytes())
        for model in results["models"]:
            _ = model["name"], model["weights_sha256"]
    except MALFORMED as error:
        raise no_results(named, error) from None
    return Suite(str(named), path.parent, results)


def no_results(named: str | Path, error: Exception) -> UserError:
    """Return the error of a folder that does not hold what a suite writes."""
    reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else error
    return UserError(
        f"--results {named}: holds no results of `esm2mega autoeval` ({reason}); give the folder that it "
        "wrote, or leave it out"
    )
