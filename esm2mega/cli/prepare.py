"""Defines the commands `prepare fasta`, `uniref`, `flip`, `tape` and `deeploc2`.

Importing them needs no numpy.
"""

from __future__ import annotations

from typing import Any

import click

from esm2mega.cli.group import group, single_process
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS


@group()
def prepare() -> None:
    """Turn sequence files into token stores for training, and benchmarks into labelled tables."""


@prepare.command("fasta")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--out", required=True, metavar="DIR", help="Directory to make; gets train, valid and test.")
@click.option(
    "--val-size",
    "--valid-size",
    "valid_size",
    default=0,
    metavar="N",
    help="Sequences held out for validation.",
)
@click.option("--test-size", default=0, metavar="N", help="Sequences held out for testing.")
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the split.")
@click.option(
    "--format", metavar="NAME", help="fasta, csv, jsonl, parquet, megatron or tape [default: by file name]."
)
@click.option(
    "--sequence-column", default="sequence", show_default=True, metavar="NAME", help="Of tables: residues."
)
@click.option(
    "--id-column", metavar="NAME", help="Of tables: ids [default: id where it exists, else line numbers]."
)
@click.option(
    "--drop-empty", is_flag=True, help="Of tables: leave rows without a sequence out, and count them."
)
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Processes [default: the cores, at most 16]."
)
@click.option(
    "--shard-size",
    type=click.FloatRange(2**-10),
    default=16.0,
    show_default=True,
    metavar="GIB",
    help="Largest file of tokens; more residues go to further files.",
)
@single_process
def prepare_fasta_command(
    inputs: tuple[str, ...],
    out: str,
    valid_size: int,
    test_size: int,
    seed: int,
    workers: int | None,
    shard_size: float,
    **source: Any,
) -> None:
    """Write sequences into token stores: FASTA, CSV, JSON lines (.gz and .zst too), Parquet, Megatron, TAPE.

    After a kill, the same command goes on with what was finished.
    """
    from esm2mega.data.readers.base import SourceOptions
    from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
    from esm2mega.report.progress import show_bytes

    options = PrepareOptions(SourceOptions(**source), workers, int(shard_size * 2**10) << 20)
    report = prepare_fasta(inputs, out, valid_size, test_size, seed, options, show_bytes)
    click.echo("\n".join(report.lines()))


@prepare.command("uniref", short_help="UniRef50 clusters of UniRef90 sequences, for cluster sampling.")
@click.option("--uf50", metavar="FASTA", help="One representative per training cluster.")
@click.option("--uf90", metavar="FASTA", help="All members of the clusters.")
@click.option("--mapping", metavar="TSV", help="Cluster id, tab, member ids; the first line is a header.")
@click.option("--valid", metavar="FASTA", help="Held-out representatives for validation.")
@click.option("--test", metavar="FASTA", help="Held-out representatives for testing.")
@click.option("--val-size", "--valid-size", "valid_size", default=0, metavar="N", help="Or: number to draw.")
@click.option("--test-size", default=0, metavar="N", help="Or: number to draw.")
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the draw.")
@click.option("--drop-other-clusters", is_flag=True, help="Leave clusters out that are not in --uf50.")
@click.option("--train-cluster-path", metavar="PARQUET", help="BioNeMo 2: lists of member ids, ur90_id.")
@click.option("--train-database-path", metavar="DB", help="BioNeMo 2: SQLite table protein(id, sequence).")
@click.option("--valid-cluster-path", metavar="PARQUET", help="BioNeMo 2: representatives, ur50_id.")
@click.option("--valid-database-path", metavar="DB", help="BioNeMo 2: their sequences.")
@click.option("--table", metavar="PARQUET|DIR", help="Rows of ur50_id, ur90_id, sequence.")
@click.option("--valid-table", metavar="PARQUET|DIR", help="The same for representatives.")
@click.option("--out", required=True, metavar="DIR", help="Directory to make; gets train, valid and test.")
@single_process
def prepare_uniref_command(**options: Any) -> None:
    """Write UniRef90 sequences and the UniRef50 clusters over them into a token store for cluster sampling.

    Give --uf50, --uf90 and --mapping; or --train-cluster-path and --train-database-path; or --table.
    """
    from esm2mega.data.uniref.inputs import prepare_from_options

    click.echo("\n".join(prepare_from_options(options).lines()))


@prepare.command("flip", short_help="A task of FLIP, to tables of labelled proteins.")
@click.argument("task", type=click.Choice(FLIP_TASKS), metavar="TASK")
@click.option("--source", required=True, metavar="DIR", help="The task's files, as FLIP publishes them.")
@click.option(
    "--out", required=True, metavar="DIR", help="Directory to make: train.csv, valid.csv, test.csv."
)
@click.option("--split", metavar="NAME", help="One of the task's splits; a wrong name lists them.")
@click.option(
    "--allow-other-sizes", is_flag=True, help="Take other numbers of proteins than the published ones."
)
@single_process
def prepare_flip_command(
    task: str, source: str, out: str, split: str | None, allow_other_sizes: bool
) -> None:
    """Write a task of FLIP as tables for fine-tuning: aav, gb1, meltome, scl, sav, bind, conservation or
    secondary_structure.

    Example: esm2mega prepare flip gb1 --source flip/gb1 --split sampled --out gb1
    """
    from esm2mega.data.benchmarks.flip import prepare_flip

    click.echo("\n".join(prepare_flip(task, source, out, split, allow_other_sizes)))


@prepare.command("tape", short_help="A task of TAPE, to tables of labelled proteins.")
@click.argument("task", type=click.Choice(TAPE_TASKS), metavar="TASK")
@click.option("--source", required=True, metavar="DIR", help="The task's LMDB files, as TAPE publishes them.")
@click.option("--out", required=True, metavar="DIR", help="Directory to make: a CSV per split.")
@single_process
def prepare_tape_command(task: str, source: str, out: str) -> None:
    """Write a task of TAPE as tables for fine-tuning: fluorescence, stability, remote_homology,
    secondary_structure or contact_prediction.

    Example: esm2mega prepare tape stability --source tape/stability --out stability
    """
    from esm2mega.data.benchmarks.tape import prepare_tape

    click.echo("\n".join(prepare_tape(task, source, out)))


@prepare.command("deeploc2", short_help="DeepLoc 2's proteins, to tables of labelled proteins.")
@click.option("--source", required=True, metavar="CSV", help="Swissprot_Train_Validation_dataset.csv.")
@click.option("--out", required=True, metavar="DIR", help="Directory to make: a CSV per split.")
@click.option(
    "--labels",
    type=click.Choice(["membrane", "locations"]),
    default="membrane",
    show_default=True,
    help="Whether it is in a membrane, or flags of ten places.",
)
@click.option("--min-length", default=100, show_default=True, metavar="N", help="Residues.")
@click.option("--max-length", default=1026, show_default=True, metavar="N", help="Residues.")
@click.option(
    "--test-fraction",
    type=float,
    show_default="0.2",
    metavar="X",
    help="Drawn at random; not with partitions.",
)
@click.option("--valid-fraction", type=float, show_default="0", metavar="X", help="The same.")
@click.option("--test-partition", type=click.IntRange(0, 4), metavar="N", help="Or: split by homology.")
@click.option("--valid-partition", type=click.IntRange(0, 4), metavar="N", help="Another partition.")
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the draw.")
@single_process
def prepare_deeploc2_command(source: str, out: str, **options: Any) -> None:
    """Write DeepLoc 2's proteins as tables for fine-tuning.

    Example: esm2mega prepare deeploc2 --source Swissprot_Train_Validation_dataset.csv --out deeploc2
    """
    from esm2mega.data.benchmarks.deeploc2 import DeepLocOptions, prepare_deeploc2

    click.echo("\n".join(prepare_deeploc2(source, out, DeepLocOptions(**options))))
