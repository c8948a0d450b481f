"""`score` gives a score to each variant of a table, or to all single substitutions of a protein."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2mega.config.infer import inference_run, validate_inference
from esm2mega.config.load import value_of
from esm2mega.config.validate import world_size_from_environment
from esm2mega.data.readers.base import SourceOptions
from esm2mega.data.readers.sources import open_source
from esm2mega.errors import UserError
from esm2mega.files import check_writable
from esm2mega.infer.correlation import spearman
from esm2mega.infer.engine import Engine, OutputRequest, load_model
from esm2mega.infer.marginals import Marginals
from esm2mega.infer.proteins import Lengths, micro_batch_tokens
from esm2mega.infer.source import ModelSource, open_model
from esm2mega.infer.strategies import score_variants
from esm2mega.infer.variants import (
    AMINO_ACIDS,
    Table,
    Variant,
    parse_variant,
    read_table,
    single_substitutions,
    write_table,
    write_variant,
)
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.vocabulary import UNKNOWN_BYTES


class WildType(NamedTuple):
    """Holds a protein whose variants are scored."""

    id: str
    sequence: str


@dataclass(frozen=True)
class ScoreOptions:
    """Says how variants are scored and where they are found.

    Attributes:
        strategy: One of `strategies.STRATEGIES`.
        normalization: One of `marginals.NORMALIZATIONS`.
        offset: Number of the first residue of every wild type.
        mutation_column: Column of variants.
        id_column: Column that names the wild type, where there are several.
        score_column: Column to add.
        measured_column: Column to correlate the scores with; None for none.
        overrides: `key=value` over the checkpoint's configuration.
    """

    strategy: str = "masked-marginals"
    normalization: str = "vocabulary"
    offset: int = 1
    mutation_column: str = "mutant"
    id_column: str = "id"
    score_column: str = "score"
    measured_column: str | None = None
    overrides: Sequence[str] = ()


class Scorer:
    """Scores variants with a loaded model; all ranks use it together."""

    def __init__(
        self, marginals: Marginals, options: ScoreOptions, source: ModelSource, precision: str, width: int
    ) -> None:
        """Set the model and the options.

        Args:
            marginals: Computes log-probabilities with the model.
            options: How variants are scored.
            source: The checkpoint of the model.
            precision: Precision of the model.
            width: Most tokens of a protein at once.
        """
        self._marginals, self.options = marginals, options
        self._source, self._precision, self._width = source, precision, width

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on; this reads all weights."""
        return {
            "model_hash": self._source.checksum(),
            "precision": self._precision,
            "max_seq_length": self._width,
            "strategy": self.options.strategy,
            "normalization": self.options.normalization,
            "score_column": self.options.score_column,
        }

    def __call__(self, sequence: str, variants: Sequence[Variant]) -> list[float]:
        """Score the variants of a wild type, in their order."""
        options = self.options
        return score_variants(self._marginals, sequence, variants, options.strategy, options.normalization)


@contextmanager
def scorer(checkpoint: str, options: ScoreOptions) -> Iterator[tuple[Scorer, Ranks]]:
    """Load a model for scoring, within process groups that last as long as the context."""
    source = open_model(checkpoint, value_of("init_from", None, options.overrides))
    source.check_lm_head()
    run = inference_run(source.run, options.overrides)
    validate_inference(run, world_size_from_environment())
    with process_groups(run.parallel, run.seed) as ranks:
        limits = Lengths.of(run.infer, run.data)
        size = micro_batch_tokens(run.infer, limits, ranks.device)
        engine = Engine(load_model(source, run, ranks), ranks, OutputRequest(logits=True), size)
        marginals = Marginals(engine, ranks, limits.width, options.normalization)
        yield Scorer(marginals, options, source, run.model.precision, limits.width), ranks


def read_wild_types(path: str) -> list[WildType]:
    """Read the proteins of a file in any format of `esm2mega.data.readers.sources`; ids must differ."""
    proteins = [
        WildType(record.id, clean(record.residues.decode("ascii")))
        for record in open_source(path, SourceOptions(set_by="nothing"))
    ]
    if len({protein.id for protein in proteins}) < len(proteins):
        raise UserError(f"{path}: ids repeat, so variants cannot be told apart; give each protein its own id")
    return proteins


def clean(sequence: str) -> str:
    """Put a sequence as it was typed into upper case, without white space.

    Raises:
        UserError: The sequence is empty, or has a character that is no residue of ESM-2.
    """
    result = "".join(sequence.split()).upper()
    stray = sorted({letter for letter in result if not letter.isascii() or ord(letter) in UNKNOWN_BYTES})
    if stray or not result:
        problem = f"holds {', '.join(map(repr, stray))}, which ESM-2 does not know" if stray else "is empty"
        raise UserError(f"the sequence {problem}; give residues in one-letter code")
    return result


def score_file(
    checkpoint: str, proteins: Sequence[WildType], variants: str | None, out: str, options: ScoreOptions
) -> list[str]:
    """Score the variants of a table, or all single substitutions; all ranks call this together.

    Args:
        checkpoint: A checkpoint or run directory.
        proteins: The wild types.
        variants: CSV of variants; None for all single substitutions.
        out: CSV to write: the rows of `variants` with one more column, or a row per substitution.
        options: How variants are scored.

    Returns:
        A report for the reader.
    """
    check_writable(Path(out))
    table = None if variants is None else read_table(variants)
    plan = _scan(proteins) if table is None else _assigned(table, proteins, options)
    with scorer(checkpoint, options) as (score, ranks):
        scores = [score(protein.sequence, [v for _, v in chosen]) for protein, chosen in plan]
        if not ranks.is_main:
            return []
        if table is None:
            return _write_scan(Path(out), plan, scores, options)
        by_row = {
            row: s
            for (_, chosen), part in zip(plan, scores, strict=True)
            for (row, _), s in zip(chosen, part, strict=True)
        }
        ordered = [by_row[row] for row in range(len(table.rows))]
        return write_scored(Path(out), table, ordered, options)


Plan = list[tuple[WildType, list[tuple[int, Variant]]]]
"""Lists wild types with their variants, each with its row in the table."""


def _scan(proteins: Sequence[WildType]) -> Plan:
    plan = [(protein, list(enumerate(single_substitutions(protein.sequence)))) for protein in proteins]
    if not any(chosen for _, chosen in plan):
        raise UserError(
            "none of the 20 standard residues is in the wild type, so there is nothing to substitute; "
            "give a protein, or --variants"
        )
    return plan


def _assigned(table: Table, proteins: Sequence[WildType], options: ScoreOptions) -> Plan:
    """Give every row of a table to its wild type, and check its variant."""
    check_columns(table, options)
    by_id = {protein.id: protein for protein in proteins}
    chosen: dict[str, list[tuple[int, Variant]]] = {protein.id: [] for protein in proteins}
    owners = [proteins[0].id] * len(table.rows)
    if len(proteins) > 1:
        owners = table.column(options.id_column, "--id-column")
    for row, (owner, text) in enumerate(
        zip(owners, table.column(options.mutation_column, "--mutation-column"), strict=True)
    ):
        if owner not in by_id:
            raise UserError(
                f"{table.location(row)}: there is no protein {owner!r} among the wild types; add it"
            )
        try:
            variant = parse_variant(text, by_id[owner].sequence, options.offset)
        except UserError as error:
            raise UserError(f"{table.location(row)}: {error}") from None
        chosen[owner].append((row, variant))
    return [(by_id[owner], variants) for owner, variants in chosen.items() if variants]


def check_columns(table: Table, options: ScoreOptions) -> None:
    """Raise `UserError` for a table that has the new column already, or lacks the measured one."""
    if options.score_column in table.columns:
        raise UserError(
            f"{table.path}: has a column {options.score_column!r} already; name the new one with "
            "--score-column"
        )
    if options.measured_column is not None:
        table.column(options.measured_column, "--measured")


def write_scored(out: Path, table: Table, scores: Sequence[float], options: ScoreOptions) -> list[str]:
    """Write the rows of a table with their scores, and return the report."""
    columns = [*table.columns, options.score_column]
    write_table(out, columns, ([*row, repr(s)] for row, s in zip(table.rows, scores, strict=True)))
    lines = [f"{out}: {len(scores):,} variants"]
    if options.measured_column is not None:
        number, value = measured_spearman(table, scores, options.measured_column)
        lines.append(f"Spearman with {options.measured_column}: {value:.4f} over {number:,} variants")
        if number < len(scores):
            lines.append(f"{len(scores) - number:,} variants have no number in {options.measured_column}")
    return lines


def measured_spearman(table: Table, scores: Sequence[float], column: str) -> tuple[int, float]:
    """Return how many rows have a measured number, and the rank correlation over them."""
    pairs = [(m, s) for m, s in zip(map(_number, table.column(column, "--measured")), scores, strict=True)]
    finite = [(m, s) for m, s in pairs if m is not None]
    return len(finite), spearman([m for m, _ in finite], [s for _, s in finite])


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _write_scan(out: Path, plan: Plan, scores: Sequence[Sequence[float]], options: ScoreOptions) -> list[str]:
    rows = [
        (
            protein.id,
            write_variant(variant, options.offset),
            v.position + options.offset,
            v.wild,
            v.mutant,
            repr(s),
        )
        for (protein, chosen), part in zip(plan, scores, strict=True)
        for (_, variant), s in zip(chosen, part, strict=True)
        for v in variant
    ]
    write_table(out, ["id", "mutant", "position", "wild_type", "residue", options.score_column], rows)
    lines = [f"{out}: {len(rows):,} single substitutions of {len(plan):,} proteins"]
    skipped = sum(sum(letter not in AMINO_ACIDS for letter in protein.sequence) for protein, _ in plan)
    if skipped:
        lines.append(f"{skipped:,} residues other than the 20 standard ones were not substituted")
    return lines


def draw_scan(out: str, protein: WildType, scan: str, options: ScoreOptions) -> None:
    """Draw the heat map of a protein from the table of a scan; one process calls this."""
    from esm2mega.infer.figures import heat_map

    table = read_table(scan)
    values = np.full((len(protein.sequence), len(AMINO_ACIDS)), np.nan)
    cells = zip(
        *(table.column(name, "") for name in ("id", "position", "residue", options.score_column)), strict=True
    )
    for owner, position, residue, value in cells:
        if owner == protein.id:
            values[int(position) - options.offset, AMINO_ACIDS.index(residue)] = float(value)
    title = f"{protein.id}, {options.strategy}"
    heat_map(Path(out), title, values, protein.sequence, AMINO_ACIDS, options.offset)
