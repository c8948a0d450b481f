"""`score` scores the variants of a table, whole sequences, or all single substitutions of a protein."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.checkpoint.finite import not_finite, too_large
from esm2mega.config.infer import inference_run, refuse_int8, validate_inference
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import values_of
from esm2mega.convert.start_point import asks_to_verify
from esm2mega.data.variants.variant import AMINO_ACIDS, Variant, ends_early, write_variant
from esm2mega.data.variants.wild_types import WildType
from esm2mega.errors import UserError
from esm2mega.files import check_writable
from esm2mega.infer.correlation import spearman
from esm2mega.infer.engine import Engine, OutputRequest, load_model
from esm2mega.infer.marginals import Marginals
from esm2mega.infer.plan import Plan, ScoreOptions, measured, plan_file, plan_scan
from esm2mega.infer.proteins import Lengths, micro_batch_tokens
from esm2mega.infer.source import ModelSource, open_model
from esm2mega.infer.strategies import pseudo_log_likelihoods, pseudo_perplexity, score_variants
from esm2mega.infer.variant_tables import read_table, write_table
from esm2mega.model.arithmetic import describe_computing
from esm2mega.parallel.initialize import Ranks, process_groups

_MOST_SHOWN = 20


@dataclass(frozen=True)
class Scored:
    """Holds the values of each row of a table.

    Attributes:
        columns: Names of the values; the last one is what measurements are compared with.
        values: Values of each row; None for a row without a score.
    """

    columns: list[str]
    values: list[list[float] | None]


class Scorer:
    """Scores variants with a loaded model; all ranks use it together."""

    def __init__(
        self,
        marginals: Marginals,
        options: ScoreOptions,
        source: ModelSource,
        precision: str,
        width: int,
        computing: str,
    ) -> None:
        """Set the model and the options.

        Args:
            marginals: Computes log-probabilities with the model.
            options: How variants are scored.
            source: The checkpoint of the model.
            precision: Precision of the model.
            width: Most tokens of a protein at once.
            computing: How the model computes, for a reader.
        """
        self._marginals, self.options, self.computing = marginals, options, computing
        self._source, self._precision, self._width = source, precision, width

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on; this reads all weights."""
        return {
            "model_hash": self._source.checksum(),
            "precision": self._precision,
            "max_seq_length": self._width,
            "strategy": self.options.variant_strategy,
            "normalization": self.options.normalization,
            "sequence_column": self.options.sequence_column,
            "score_column": self.options.score_column,
        }

    def __call__(self, plan: Plan) -> Scored:
        """Score every row of a plan."""
        size = len(plan.table.rows) if plan.table is not None else 0
        values: list[list[float] | None] = [None] * size
        for protein, variants in plan.variants:
            scores = self.variants(protein, [variant for _, variant in variants])
            for (row, _), score in zip(variants, scores, strict=True):
                values[row] = [score]
        for wild_type, chosen in plan.whole:
            sequences = [sequence for _, sequence in chosen]
            own = [] if wild_type is None else [wild_type.sequence]
            rows = {sequence: row for row, sequence in reversed(chosen)}
            named = partial(_named, plan, wild_type, rows)
            sums = pseudo_log_likelihoods(self._marginals, [*own, *sequences], named)
            for (row, sequence), total in zip(chosen, sums[len(own) :], strict=True):
                difference = [total - sums[0]] if own else []
                perplexity = pseudo_perplexity(total, len(sequence))
                if not math.isfinite(perplexity):
                    loss = f"a loss of {-total / len(sequence):.3g} nats has no finite perplexity"
                    raise too_large(named(sequence), loss, self._source.path)
                values[row] = [perplexity, total, *difference]
        return Scored(plan.columns(self.options), values)

    def variants(self, protein: WildType, variants: Sequence[Variant]) -> list[float]:
        """Score the variants of a wild type, in their order."""
        strategy = self.options.variant_strategy
        return score_variants(self._marginals, protein.sequence, variants, strategy, protein.id)


def _named(plan: Plan, wild_type: WildType | None, rows: Mapping[str, int], sequence: str) -> str:
    """Return the name of a whole sequence, by the first row that has it or as the wild type."""
    if sequence in rows:
        assert plan.table is not None
        return f"{plan.table.location(rows[sequence])}"
    assert wild_type is not None
    return wild_type.id


@contextmanager
def scorer(checkpoint: str, options: ScoreOptions) -> Iterator[tuple[Scorer, Ranks]]:
    """Load a model for scoring, within process groups that last as long as the context."""
    too_long, base = values_of(["infer.too_long", "init_from"], None, options.overrides)
    if too_long is not None:
        raise UserError(
            f"infer.too_long={too_long} is a key of `embed` and `predict`; `score` sees each residue of a "
            "long protein in the window around it: leave it out"
        )
    source = open_model(checkpoint, base, asks_to_verify(options.overrides))
    source.check_lm_head()
    run = inference_run(source.run, options.overrides)
    validate_inference(run, world_size_from_environment())
    refuse_int8(run, "`score`")
    with process_groups(run.parallel, run.seed) as ranks:
        limits = Lengths.of(run.infer, run.data)
        size = micro_batch_tokens(run.infer, ranks.device)
        model = load_model(source, run, ranks)
        engine = Engine(model, ranks, OutputRequest(logits=True), size)
        refused = partial(not_finite, checkpoint=source.path)
        marginals = Marginals(engine, ranks, limits.width, refused, options.normalization)
        computing = describe_computing(model.config, ranks.device, source.run.model.precision)
        yield Scorer(marginals, options, source, run.model.precision, limits.width, computing), ranks


def score_file(
    checkpoint: str, proteins: Sequence[WildType], variants: str | None, out: str, options: ScoreOptions
) -> list[str]:
    """Score the rows of a file, or all single substitutions; all ranks call this together.

    Everything is checked before the model is loaded.

    Args:
        checkpoint: A checkpoint or run directory.
        proteins: The wild types; none where whole sequences are scored for themselves.
        variants: CSV of variants or of whole sequences, or FASTA of these; None for all single substitutions.
        out: CSV to write: the rows of `variants` with further columns, or a row per substitution.
        options: How variants are scored.

    Returns:
        A report for the reader.
    """
    check_writable(Path(out))
    plan = plan_scan(proteins, options) if variants is None else plan_file(variants, proteins, options)
    with scorer(checkpoint, options) as (score, ranks):
        if plan.table is not None:
            scored = score(plan)
            lines = write_scored(Path(out), plan, scored, options) if ranks.is_main else []
        else:
            scores = [score.variants(p, [v for _, v in chosen]) for p, chosen in plan.variants]
            lines = _write_scan(Path(out), plan, scores, options) if ranks.is_main else []
        return [*lines, score.computing]


def write_scored(out: Path, plan: Plan, scored: Scored, options: ScoreOptions) -> list[str]:
    """Write the rows of a table with their values, and return the report.

    The cells of rows without a score are empty.
    """
    table = plan.table
    assert table is not None
    empty = [""] * len(scored.columns)
    write_table(
        out,
        [*table.columns, *scored.columns],
        (
            [*row, *(empty if values is None else map(repr, values))]
            for row, values in zip(table.rows, scored.values, strict=True)
        ),
    )
    what = "sequences" if plan.whole else "variants"
    lines = [f"{out}: {len(table.rows) - len(plan.skipped):,} {what}", *described(plan)]
    if options.measured_column is not None:
        known = measured(table, options.measured_column, options.numbers)
        number, value = measured_spearman(scored, known)
        name = f" of {scored.columns[-1]}" if plan.whole else ""
        lines.append(f"Spearman{name} with {options.measured_column}: {value:.4f} over {number:,} {what}")
        if missing := known.count(None):
            lines.append(f"{missing:,} {what} have no number in {options.measured_column}")
    return lines


def described(plan: Plan) -> list[str]:
    """Say which rows are the wild type, end early, or have no score."""
    assert plan.table is not None
    variants = [variant for _, chosen in plan.variants for _, variant in chosen]
    lines = []
    if wild := sum(not variant for variant in variants):
        lines.append(f"{wild:,} rows are the wild type or synonymous")
    if short := sum(map(ends_early, variants)):
        lines.append(f"{short:,} rows end early at a stop: sums over fewer residues, which do not compare")
    if plan.skipped:
        lines.append(
            f"{len(plan.skipped):,} of {len(plan.table.rows):,} rows have no score, and empty cells:"
        )
        shown = list(plan.skipped.items())[:_MOST_SHOWN]
        lines += [f"  {plan.table.location(row)}: {reason}" for row, reason in shown]
        if rest := len(plan.skipped) - len(shown):
            lines.append(f"  and {rest:,} more")
    return lines


def measured_spearman(scored: Scored, known: Sequence[float | None]) -> tuple[int, float]:
    """Return how many rows have a score and a measured number, and the rank correlation over them.

    Args:
        scored: The scores.
        known: The measured numbers, from `esm2mega.infer.plan.measured`.
    """
    pairs = [
        (number, values[-1])
        for number, values in zip(known, scored.values, strict=True)
        if number is not None and values is not None
    ]
    return len(pairs), spearman([number for number, _ in pairs], [score for _, score in pairs])


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
        for (protein, chosen), part in zip(plan.variants, scores, strict=True)
        for (_, variant), s in zip(chosen, part, strict=True)
        for v in variant
    ]
    write_table(out, ["id", "mutant", "position", "wild_type", "residue", options.score_column], rows)
    lines = [f"{out}: {len(rows):,} single substitutions of {len(plan.variants):,} proteins"]
    proteins = [protein for protein, _ in plan.variants]
    skipped = sum(sum(letter not in AMINO_ACIDS for letter in protein.sequence) for protein in proteins)
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
    title = f"{protein.id}, {options.variant_strategy}"
    heat_map(Path(out), title, values, protein.sequence, AMINO_ACIDS, options.offset)
