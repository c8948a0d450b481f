"""Scores all assays of ProteinGym without training, and resamples their proteins for an interval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from esm2mega.autoeval.baselines.substitutions import substitution_scores
from esm2mega.autoeval.together import alone
from esm2mega.autoeval.units import Commands, Outcome, Unit, recorded
from esm2mega.data.counter_rng import Purpose, derive_seed
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.infer.correlation import spearman
from esm2mega.infer.plan import ScoreOptions, measured
from esm2mega.infer.proteingym import MEASURED, SUMMARY, mean_of_means, plan_assay, read_reference
from esm2mega.report.results.predictions import read_rows
from esm2mega.train.loop import defined

_REFERENCES = ("DMS_substitutions.csv", "DMS_indels.csv")
_RESAMPLES = 1000

_Assays = list[tuple[str, str, float]]


def find_assays(source: Path) -> tuple[Path, Path]:
    """Return the reference file of ProteinGym, and the folder of the assays.

    Raises:
        UserError: They are not there.
    """
    for place in (source / "proteingym", source):
        reference = next((place / name for name in _REFERENCES if (place / name).is_file()), None)
        if reference is not None:
            folders = [path for path in sorted(place.iterdir()) if path.is_dir() and any(path.glob("*.csv"))]
            if len(folders) == 1:
                return reference, folders[0]
            raise UserError(
                f"{place}: has {first_of([path.name for path in folders])} with CSV files; leave one folder, "
                "that of the assays"
            )
    raise UserError(
        f"--source {source}: has no proteingym/{_REFERENCES[0]}; put ProteinGym's reference file there, and "
        "beside it the folder of its assays"
    )


def run_assays(unit: Unit, reference: Path, folder: Path, commands: Commands) -> Outcome:
    """Score the assays of a reference file, unless that is done; all ranks call this together."""

    def score() -> tuple[dict[str, float | None], None]:
        summary = summary_of(unit)
        words = ["score", unit.model.path, "--proteingym", reference, "--assays", folder]
        commands.run(summary, *words, "--out", summary.parent, "--resume", *unit.layout)
        assays = alone(lambda: read_summary(summary))
        return {"spearman": defined(mean_of_means(assays))}, None

    return recorded(unit, commands, score)


def summary_of(unit: Unit) -> Path:
    """Return the file with the correlation of each assay."""
    return unit.folder / "scores" / SUMMARY


def blosum62_assays(reference: Path, folder: Path) -> _Assays | None:
    """Correlate BLOSUM62 with the measurements of each assay, as `read_summary` returns it.

    Returns:
        None if an assay has whole sequences, whose insertions and deletions the matrix does not score.
    """
    found, options = [], ScoreOptions(measured_column=MEASURED)
    for assay in read_reference(str(reference), str(folder)):
        plan = plan_assay(assay, options)
        if plan.whole or plan.table is None:
            return None
        values = measured(plan.table, MEASURED)
        rows = [(values[row], variant) for _, chosen in plan.variants for row, variant in chosen]
        known = [(value, variant) for value, variant in rows if value is not None]
        scores = substitution_scores([variant for _, variant in known])
        found.append((assay.function, assay.protein, spearman([value for value, _ in known], scores)))
    return found


def read_summary(path: Path) -> _Assays:
    """Return function, protein and Spearman's correlation of each assay."""
    return [
        (row["coarse_selection_type"], row["UniProt_ID"], float(row["spearman"])) for row in read_rows(path)
    ]


def resampled(assays: _Assays, seed: int) -> np.ndarray:
    """Return the mean of means over proteins that are drawn with replacement, ``[resamples]``.

    The assays of a protein are drawn together. A draw without any protein of a class has no value.
    """
    rng = np.random.default_rng(derive_seed(seed, Purpose.BOOTSTRAP))
    proteins = sorted({protein for _, protein, _ in assays})
    functions = {function for function, _, _ in assays}
    values = []
    for _ in range(_RESAMPLES):
        chosen = [proteins[number] for number in rng.integers(0, len(proteins), len(proteins))]
        # Each copy of a protein counts as a protein of its own.
        drawn = [
            (function, f"{copy} {protein}", value)
            for copy, name in enumerate(chosen)
            for function, protein, value in assays
            if protein == name
        ]
        complete = {function for function, _, _ in drawn} == functions
        values.append(mean_of_means(drawn) if complete else math.nan)
    return np.array(values)
