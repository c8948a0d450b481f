"""Reads what `score` computes, and checks every row of it before a model is loaded.

A table has a variant in each row, or a whole sequence, which may have another length than the wild type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from esm2mega.config.load import values_of
from esm2mega.data.labels.numbers import PLAIN, cure, is_written_otherwise, read_number
from esm2mega.data.readers.base import MISSING_VALUES
from esm2mega.data.readers.fasta import FastaReader
from esm2mega.data.readers.sources import format_of
from esm2mega.data.variants.notation import parse_variant
from esm2mega.data.variants.variant import Variant, single_substitutions
from esm2mega.data.variants.wild_types import WildType, clean
from esm2mega.errors import UserError
from esm2mega.files import first_of
from esm2mega.infer.strategies import DEFAULT_STRATEGY, WHOLE_STRATEGY, check_letters, check_variant
from esm2mega.infer.variant_tables import Table, read_table

PERPLEXITY, LOG_LIKELIHOOD = "pseudo_perplexity", "pseudo_log_likelihood"
"""These columns are added to whole sequences."""

WHOLE_COLUMN = "mutated_sequence"
"""ProteinGym's tables have this column of whole sequences; those of indels have no column of variants."""

_FASTA_COLUMN = "sequence"
_LONGEST_WORD = 20
"""What has more letters and nothing else is no word such as ``synonymous``, but a sequence."""

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreOptions:
    """Says how variants are scored and where they are found.

    Attributes:
        strategy: One of `strategies.STRATEGIES`; None for ``pseudo-ppl`` of whole sequences, and
            ``masked-marginals`` of substitutions.
        normalization: One of `marginals.NORMALIZATIONS`.
        offset: Number of the first residue of every wild type.
        offset_name: Option that sets it, for messages; empty where it is fixed.
        mutation_column: Column of variants.
        sequence_column: Column of whole sequences; None for `WHOLE_COLUMN`, where there are no variants.
        id_column: Column that names the wild type, where there are several.
        score_column: Column to add.
        measured_column: Column to correlate the scores with; None for none.
        skip_invalid: Whether rows without a score are listed, instead of refused.
        overrides: `key=value` over the checkpoint's configuration.
    """

    strategy: str | None = None
    normalization: str = "vocabulary"
    offset: int = 1
    offset_name: str = "--offset"
    mutation_column: str = "mutant"
    sequence_column: str | None = None
    id_column: str = "id"
    score_column: str = "score"
    measured_column: str | None = None
    skip_invalid: bool = False
    overrides: Sequence[str] = ()

    @property
    def variant_strategy(self) -> str:
        """Return the strategy of variants that are substitutions."""
        return self.strategy or DEFAULT_STRATEGY

    @property
    def numbers(self) -> str:
        """Return how measured numbers are written: `data.numbers` of the overrides."""
        (written,) = values_of(["data.numbers"], None, self.overrides)
        return PLAIN if written is None else str(written)


@dataclass(frozen=True)
class Plan:
    """Holds what is to be scored: rows of a table, or all single substitutions.

    Attributes:
        variants: Wild types with their variants, each with its row.
        whole: Wild types with whole sequences, each with its row. Without a wild type it is None.
        skipped: Row -> why it has no score.
        table: The table; None for all single substitutions.
    """

    variants: list[tuple[WildType, list[tuple[int, Variant]]]] = field(default_factory=list)
    whole: list[tuple[WildType | None, list[tuple[int, str]]]] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    table: Table | None = None

    def columns(self, options: ScoreOptions) -> list[str]:
        """Return the columns to add; the last one is what measurements are compared with."""
        if not self.whole:
            return [options.score_column]
        has_wild_type = self.whole[0][0] is not None
        return [PERPLEXITY, LOG_LIKELIHOOD, *([options.score_column] if has_wild_type else [])]


def plan_scan(proteins: Sequence[WildType], options: ScoreOptions) -> Plan:
    """Plan all single substitutions of some proteins.

    Raises:
        UserError: There is nothing to substitute, or a residue has no probability.
    """
    plan = Plan([(protein, list(enumerate(single_substitutions(protein.sequence)))) for protein in proteins])
    if not any(chosen for _, chosen in plan.variants):
        raise UserError(
            "none of the 20 standard residues is in the wild type, so there is nothing to substitute; "
            "give a protein, or --variants"
        )
    for protein, chosen in plan.variants:
        for _, variant in chosen[:1]:
            try:
                check_variant(variant, protein.sequence, options.variant_strategy, options.normalization)
            except UserError as error:
                raise UserError(f"{protein.id}: {error}") from None
    return plan


def plan_file(path: str, proteins: Sequence[WildType], options: ScoreOptions) -> Plan:
    """Read a table or a FASTA of whole sequences, and check every row; see `plan_table`."""
    if not _is_fasta(path):
        return plan_table(read_table(path), proteins, options)
    column = options.sequence_column or _FASTA_COLUMN
    return plan_table(_read_fasta(path), proteins, replace(options, sequence_column=column))


def plan_table(table: Table, proteins: Sequence[WildType], options: ScoreOptions) -> Plan:
    """Give every row of a table to its wild type, and check it.

    Args:
        table: Variants or whole sequences.
        proteins: The wild types; none where sequences are scored for themselves.
        options: How rows are scored.

    Raises:
        UserError: A column is missing or there already, no row can be scored, or, unless they are skipped, a
            row cannot be.
    """
    named = {protein.id: protein for protein in proteins}
    owners = [next(iter(named), "")] * len(table.rows)
    if len(proteins) > 1:
        owners = table.column(options.id_column, "--id-column")
    plan = Plan(table=table)
    column = _whole_column(table, options)
    if column is not None:
        _check_whole(table, proteins, options)
        sequences = _rows(plan, owners, named, column, options, lambda _, text: _sequence(text, options))
        plan.whole.extend((named.get(owner), rows) for owner, rows in sequences.items())
    elif not proteins:
        raise UserError(f"{table.path}: its variants need a wild type; give it by --sequence or --fasta")
    else:
        column = table.column(options.mutation_column, "--mutation-column")
        variants = _rows(
            plan, owners, named, column, options, lambda owner, text: _variant(text, named[owner], options)
        )
        plan.variants.extend((named[owner], rows) for owner, rows in variants.items())
    if len(plan.skipped) == len(table.rows):
        raise UserError(f"{table.location(0)}: {plan.skipped[0]}; no other row has a score either")
    _check_columns(plan, table, options)
    return plan


def _rows(
    plan: Plan,
    owners: Sequence[str],
    named: Mapping[str, WildType],
    texts: Sequence[str],
    options: ScoreOptions,
    read: Callable[[str, str], T],
) -> dict[str, list[tuple[int, T]]]:
    """Read the cell of each row by `read(owner, cell)`; return row numbers and values by wild type."""
    assert plan.table is not None
    found: dict[str, list[tuple[int, T]]] = {}
    for row, (owner, text) in enumerate(zip(owners, texts, strict=True)):
        try:
            if named and owner not in named:
                raise UserError(f"there is no protein {owner!r} among the wild types; add it")
            found.setdefault(owner, []).append((row, read(owner, text)))
        except UserError as error:
            if not options.skip_invalid:
                raise UserError(
                    f"{plan.table.location(row)}: {error}; or leave such rows without a score with "
                    "--skip-invalid"
                ) from None
            plan.skipped[row] = str(error)
    return found


def _whole_column(table: Table, options: ScoreOptions) -> list[str] | None:
    """Return the cells of whole sequences; None for a table of variants."""
    if options.sequence_column is not None:
        return table.column(options.sequence_column, "--sequence-column")
    if options.mutation_column in table.columns:
        return None
    if WHOLE_COLUMN not in table.columns:
        raise UserError(
            f"{table.path}: has neither a column {options.mutation_column!r} of variants nor a column "
            f"{WHOLE_COLUMN!r} of whole sequences among {first_of(table.columns)}; name one with "
            "--mutation-column or --sequence-column"
        )
    return table.column(WHOLE_COLUMN, "--sequence-column")


def _check_whole(table: Table, proteins: Sequence[WildType], options: ScoreOptions) -> None:
    if options.strategy not in (None, WHOLE_STRATEGY):
        raise UserError(
            f"{table.path}: has whole sequences, which --strategy {WHOLE_STRATEGY} alone can score; leave "
            f"--strategy {options.strategy} out"
        )
    if options.offset != 1:
        raise UserError(
            f"{table.path}: has whole sequences, whose residues need no numbers; leave --offset out"
        )
    for protein in proteins:
        check_letters(protein.sequence, options.normalization)


def _variant(text: str, protein: WildType, options: ScoreOptions) -> Variant:
    if len(text) > _LONGEST_WORD and text.isalpha():
        raise UserError(f"{text[:20]}… is a whole sequence; name the column of such with --sequence-column")
    variant = parse_variant(text, protein.sequence, options.offset, options.offset_name)
    try:
        check_variant(variant, protein.sequence, options.variant_strategy, options.normalization)
    except UserError as error:
        raise UserError(f"{text!r}: {error}") from None
    return variant


def _sequence(text: str, options: ScoreOptions) -> str:
    if text.strip() in MISSING_VALUES:
        raise UserError(f"{text!r} in the place of a sequence is a missing value; complete or remove the row")
    sequence = clean(text)
    check_letters(sequence, options.normalization)
    return sequence


def _check_columns(plan: Plan, table: Table, options: ScoreOptions) -> None:
    """Refuse a table that has a new column already, or no measured number."""
    for name in plan.columns(options):
        if name in table.columns:
            cure = "name the new one with --score-column" if name == options.score_column else "rename it"
            raise UserError(f"{table.path}: has a column {name!r} already; {cure}")
    if options.measured_column is not None and not any(
        number is not None for number in measured(table, options.measured_column, options.numbers)
    ):
        raise UserError(
            f"{table.path}: no row has a number in {options.measured_column!r}, to be compared with the "
            "scores; complete the column"
        )


def measured(table: Table, column: str, numbers: str = PLAIN) -> list[float | None]:
    """Return the measured number of each row; None where there is none.

    Args:
        table: The table.
        column: Its column.
        numbers: How numbers are written, see `esm2mega.data.labels.numbers`.

    Raises:
        UserError: A number is written in another way, so that it would be left out.
    """
    found = []
    for row, text in enumerate(table.column(column, "--measured")):
        try:
            value = read_number(text, numbers)
        except ValueError:
            if is_written_otherwise(text, numbers):
                raise UserError(
                    f"{table.location(row)}: {text!r} in column {column!r}: {cure(text, numbers)}"
                ) from None
            value = math.nan
        found.append(value if math.isfinite(value) else None)
    return found


def _is_fasta(path: str) -> bool:
    """Return whether a file is FASTA: a table may have a name with any ending."""
    if format_of(Path(path)) != "fasta":
        return False
    try:
        FastaReader(path)
    except UserError:
        return False
    return True


def _read_fasta(path: str) -> Table:
    """Read a FASTA as a table with the columns ``id`` and `_FASTA_COLUMN`."""
    records = list(FastaReader(path))
    rows = [[record.id, record.residues.decode("ascii")] for record in records]
    return Table(Path(path), ["id", _FASTA_COLUMN], rows, [record.line for record in records])
