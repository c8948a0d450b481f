"""Defines the commands `prepare fasta`, `uniref`, `flip`, `tape`, `deeploc2` and `contacts`.

Importing them needs no numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from esm2mega.cli.group import group, single_process
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.errors import UserError


def _source(metavar: str, what: str) -> Any:
    return click.option(
        "--source", metavar=metavar, help=f"{what} [default with --download: in the user's cache]."
    )


_DOWNLOAD = click.option(
    "--download", is_flag=True, help="Download what is not in --source from where it is published."
)


@group()
def prepare() -> None:
    """Prepare token stores and tables of labelled proteins."""


@prepare.command("fasta")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option(
    "--out", required=True, metavar="DIR", help="Directory to create, with train, valid and test in it."
)
@click.option(
    "--val-size",
    "--valid-size",
    "valid_size",
    default=0,
    metavar="N",
    help="Number of sequences to hold out for validation.",
)
@click.option("--test-size", default=0, metavar="N", help="Number of sequences to hold out for testing.")
@click.option(
    "--valid",
    metavar="FILE",
    help="Sequences for validation, instead of --val-size; they are excluded from training.",
)
@click.option(
    "--test",
    metavar="FILE",
    help="Sequences for testing, instead of --test-size; they are excluded from training.",
)
@click.option(
    "--split",
    metavar="N,N,N",
    help="Sizes of train, valid and test, in the order of the input; or shares, as in Megatron-LM.",
)
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the split.")
@click.option(
    "--format",
    metavar="NAME",
    help="One of fasta, csv, jsonl, parquet, excel, megatron, tape, esm2fa [default: by file name].",
)
@click.option(
    "--sequence-column",
    default="sequence",
    show_default=True,
    metavar="NAME",
    help="Column with the sequences, in tables.",
)
@click.option(
    "--id-column", metavar="NAME", help="Column with the ids, in tables [default: id, else line numbers]."
)
@click.option("--drop-empty", is_flag=True, help="Leave out table rows without a sequence, and count them.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Number of processes [default: number of cores, at most 16].",
)
@click.option(
    "--shard-size",
    type=click.FloatRange(2**-10),
    default=16.0,
    show_default=True,
    metavar="GIB",
    help="Largest size of a token file; larger stores are written as several files.",
)
@click.option(
    "--refined",
    metavar="FASTA",
    help="Also write the sequences as FASTA, long ones in pieces with their range in the id.",
)
@click.option(
    "--max-length", type=int, metavar="N", help="Longest piece of --refined, in residues [default: 1022]."
)
@single_process
def prepare_fasta_command(
    inputs: tuple[str, ...],
    out: str,
    valid_size: int,
    test_size: int,
    valid: str | None,
    test: str | None,
    split: str | None,
    seed: int,
    workers: int | None,
    shard_size: float,
    refined: str | None,
    max_length: int | None,
    **source: Any,
) -> None:
    """Convert sequence files to token stores for training.

    INPUT is FASTA, CSV, JSON lines (these also as .gz and .zst), Excel, Parquet, Megatron, TAPE or a
    directory of ESM2-FA; - reads standard input. If the command is killed, the same command continues where
    it was.
    """
    from esm2mega.data.readers.base import SourceOptions
    from esm2mega.data.store.prepare import PrepareOptions, prepare_fasta
    from esm2mega.data.store.refined import LONGEST_PIECE, RefinedFasta
    from esm2mega.report.progress import show_bytes

    pieces = None
    if refined is not None:
        pieces = RefinedFasta(Path(refined), LONGEST_PIECE if max_length is None else max_length)
    elif max_length is not None:
        raise UserError(f"--max-length {max_length} is for the pieces of --refined; give --refined too")
    shard_bytes = int(shard_size * 2**10) << 20
    options = PrepareOptions(SourceOptions(**source), workers, shard_bytes, refined=pieces)
    given = {name: path for name, path in (("valid", valid), ("test", test)) if path is not None}
    report = prepare_fasta(inputs, out, valid_size, test_size, seed, options, show_bytes, given, split)
    click.echo("\n".join(report.lines()))


@prepare.command("uniref", short_help="Make a token store of UniRef90 sequences in UniRef50 clusters.")
@click.option("--uf50", metavar="FASTA", help="One representative of each training cluster.")
@click.option("--uf90", metavar="FASTA", help="All members of the clusters.")
@click.option(
    "--mapping",
    metavar="TSV",
    help="Per line a cluster id, a tab and the member ids; the first line is a header.",
)
@click.option("--valid", metavar="FASTA", help="Representatives to hold out for validation.")
@click.option("--test", metavar="FASTA", help="Representatives to hold out for testing.")
@click.option(
    "--val-size",
    "--valid-size",
    "valid_size",
    default=0,
    metavar="N",
    help="Number of clusters to draw for validation, instead of --valid.",
)
@click.option(
    "--test-size",
    default=0,
    metavar="N",
    help="Number of clusters to draw for testing, instead of --test.",
)
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the random split.")
@click.option(
    "--drop-other-clusters", is_flag=True, help="Leave out clusters whose representative is not in --uf50."
)
@click.option(
    "--train-cluster-path", metavar="PARQUET", help="BioNeMo 2: lists of member ids in the column ur90_id."
)
@click.option(
    "--train-database-path",
    metavar="DB",
    help="BioNeMo 2: SQLite database with the table protein(id, sequence).",
)
@click.option(
    "--valid-cluster-path", metavar="PARQUET", help="BioNeMo 2: representatives in the column ur50_id."
)
@click.option("--valid-database-path", metavar="DB", help="BioNeMo 2: sequences of the representatives.")
@click.option("--table", metavar="PARQUET|DIR", help="Table with the columns ur50_id, ur90_id and sequence.")
@click.option(
    "--valid-table", metavar="PARQUET|DIR", help="The same table for the validation representatives."
)
@click.option(
    "--out", required=True, metavar="DIR", help="Directory to create, with train, valid and test in it."
)
@single_process
def prepare_uniref_command(**options: Any) -> None:
    """Make a token store of UniRef90 sequences and their UniRef50 clusters, for sampling by cluster.

    Give --uf50, --uf90 and --mapping; or --train-cluster-path and --train-database-path; or --table.
    """
    from esm2mega.data.uniref.inputs import prepare_from_options

    click.echo("\n".join(prepare_from_options(options).lines()))


@prepare.command("flip", short_help="Write a task of FLIP as tables of labelled proteins.")
@click.argument("task", type=click.Choice(FLIP_TASKS), metavar="TASK")
@_source("DIR", "Folder with the files of the task, as FLIP publishes them")
@_DOWNLOAD
@click.option(
    "--out", required=True, metavar="DIR", help="Directory to create, with train.csv, valid.csv and test.csv."
)
@click.option("--split", metavar="NAME", help="One of the task's splits; an unknown name lists them.")
@click.option(
    "--allow-other-sizes",
    is_flag=True,
    help="Accept files whose number of proteins differs from the published one.",
)
@single_process
def prepare_flip_command(
    task: str, source: str | None, download: bool, out: str, split: str | None, allow_other_sizes: bool
) -> None:
    """Write a task of FLIP as tables for fine-tuning.

    TASK is aav, gb1, meltome, scl, sav, bind, conservation or secondary_structure.

    Example: esm2mega prepare flip gb1 --source flip/gb1 --split sampled --out gb1
    """
    from esm2mega.data.benchmarks.flip import check_split, prepare_flip
    from esm2mega.data.benchmarks.published import download_flip, place_of
    from esm2mega.data.store.staging import check_new

    folder = place_of(f"flip/{task}", source, download)
    if download:
        check_new(Path(out))
        check_split(task, split)
        click.echo("\n".join(download_flip(task, split, folder)))
    click.echo("\n".join(prepare_flip(task, folder, out, split, allow_other_sizes)))


@prepare.command("tape", short_help="Write a task of TAPE as tables of labelled proteins.")
@click.argument("task", type=click.Choice(TAPE_TASKS), metavar="TASK")
@_source("DIR", "Folder with the LMDB files of the task, as TAPE publishes them")
@_DOWNLOAD
@click.option("--out", required=True, metavar="DIR", help="Directory to create, with a CSV for each split.")
@single_process
def prepare_tape_command(task: str, source: str | None, download: bool, out: str) -> None:
    """Write a task of TAPE as tables for fine-tuning.

    TASK is fluorescence, stability, remote_homology, secondary_structure (three states),
    secondary_structure_8 (eight states) or contact_prediction.

    Example: esm2mega prepare tape stability --source tape/stability --out stability
    """
    from esm2mega.data.benchmarks.published import download_tape, place_of
    from esm2mega.data.benchmarks.tape import prepare_tape
    from esm2mega.data.store.staging import check_new

    folder = place_of(f"tape/{TAPE_TASKS[task].folder}", source, download)
    if download:
        check_new(Path(out))
        click.echo("\n".join(download_tape(task, folder)))
    click.echo("\n".join(prepare_tape(task, folder, out)))


@prepare.command("deeploc2", short_help="Write DeepLoc 2's proteins as tables of labelled proteins.")
@_source("CSV", "Swissprot_Train_Validation_dataset.csv")
@_DOWNLOAD
@click.option("--out", required=True, metavar="DIR", help="Directory to create, with a CSV for each split.")
@click.option(
    "--features",
    metavar="DIR",
    help="Also write a directory of token ids, masks and labels that Cerebras Model Zoo reads.",
)
@click.option(
    "--labels",
    type=click.Choice(["membrane", "locations"]),
    default="membrane",
    show_default=True,
    help="Label proteins by whether they are in a membrane, or by which of ten locations they are in.",
)
@click.option(
    "--min-length",
    default=100,
    show_default=True,
    metavar="N",
    help="Leave out proteins with fewer residues.",
)
@click.option(
    "--max-length",
    default=1026,
    show_default=True,
    metavar="N",
    help="Leave out proteins with more residues.",
)
@click.option(
    "--test-fraction",
    type=float,
    show_default="0.2",
    metavar="X",
    help="Random fraction for testing; not with partitions.",
)
@click.option(
    "--valid-fraction",
    type=float,
    show_default="0",
    metavar="X",
    help="Random fraction for validation; not with partitions.",
)
@click.option(
    "--test-partition",
    type=click.IntRange(0, 4),
    metavar="N",
    help="Homology partition for testing, instead of fractions.",
)
@click.option(
    "--valid-partition", type=click.IntRange(0, 4), metavar="N", help="Homology partition for validation."
)
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the random split.")
@single_process
def prepare_deeploc2_command(
    source: str | None, download: bool, out: str, features: str | None, **options: Any
) -> None:
    """Write DeepLoc 2's proteins as tables for fine-tuning.

    Example: esm2mega prepare deeploc2 --source Swissprot_Train_Validation_dataset.csv --out deeploc2
    """
    from esm2mega.data.benchmarks.deeploc2 import DeepLocOptions, check_request, prepare_deeploc2
    from esm2mega.data.benchmarks.published import DEEPLOC2, download_deeploc2, place_of

    file = place_of("deeploc2", source, download, DEEPLOC2.rpartition("/")[2])
    how = DeepLocOptions(**options)
    if download:
        check_request(out, how, features)
        click.echo("\n".join(download_deeploc2(file)))
    click.echo("\n".join(prepare_deeploc2(file, out, how, features)))


@prepare.command("contacts")
@click.option(
    "--source",
    required=True,
    metavar="DIR",
    help="Folder with one FASTA file, and ID.csv for each of its proteins.",
)
@click.option("--out", required=True, metavar="DIR", help="Directory to create, with test.csv.")
@single_process
def prepare_contacts_command(source: str, out: str) -> None:
    """Write proteins with coordinates as a table for evaluating contacts.

    ID.csv has a row for each residue. Its columns are residue, x, y and z of the atom between which distances
    are measured (C-alpha or C-beta); or residue and n_x, n_y, n_z, ca_x, …, c_z, from which an ideal C-beta
    is built.

    Example: esm2mega prepare contacts --source structures --out contacts
    """
    from esm2mega.data.benchmarks.contacts import prepare_contacts

    click.echo("\n".join(prepare_contacts(source, out)))
