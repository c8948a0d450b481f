"""The commands `prepare flip`, `tape` and `deeploc2`; importing them needs no numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from esm2mega.data.flip_tasks import TASKS
from esm2mega.data.tape_names import TAPE_TASKS

Wrap = Callable[[Callable[..., None]], Callable[..., None]]


def add_commands(prepare: click.Group, once: Wrap) -> None:
    """Add them to `prepare`.

    Args:
        prepare: Of the command line.
        once: Makes one process of several do a command.
    """
    prepare.command("flip", short_help="A task of FLIP, to tables of labelled proteins.")(once(_flip))
    prepare.command("tape", short_help="A task of TAPE, to tables of labelled proteins.")(once(_tape))
    prepare.command("deeploc2", short_help="DeepLoc 2's proteins, to tables of labelled proteins.")(
        once(_deeploc2)
    )


@click.argument("task", type=click.Choice(TASKS), metavar="TASK")
@click.option("--source", required=True, metavar="DIR", help="The task's files, as FLIP publishes them.")
@click.option(
    "--out", required=True, metavar="DIR", help="Directory to make: train.csv, valid.csv, test.csv."
)
@click.option("--split", metavar="NAME", help="One of the task's splits; a wrong name lists them.")
@click.option(
    "--allow-other-sizes", is_flag=True, help="Take other numbers of proteins than the published ones."
)
def _flip(task: str, source: str, out: str, split: str | None, allow_other_sizes: bool) -> None:
    """Write a task of FLIP as tables for fine-tuning: aav, gb1, meltome, scl, sav, bind, conservation or
    secondary_structure.

    Example: esm2mega prepare flip gb1 --source flip/gb1 --split sampled --out gb1
    """
    from esm2mega.data.flip import prepare_flip

    click.echo("\n".join(prepare_flip(task, source, out, split, allow_other_sizes)))


@click.argument("task", type=click.Choice(TAPE_TASKS), metavar="TASK")
@click.option("--source", required=True, metavar="DIR", help="The task's LMDB files, as TAPE publishes them.")
@click.option("--out", required=True, metavar="DIR", help="Directory to make: a CSV per split.")
def _tape(task: str, source: str, out: str) -> None:
    """Write a task of TAPE as tables for fine-tuning: fluorescence, stability, remote_homology,
    secondary_structure or contact_prediction.

    Example: esm2mega prepare tape stability --source tape/stability --out stability
    """
    from esm2mega.data.tape_tasks import prepare_tape

    click.echo("\n".join(prepare_tape(task, source, out)))


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
def _deeploc2(source: str, out: str, **options: Any) -> None:
    """Write DeepLoc 2's proteins as tables for fine-tuning.

    Example: esm2mega prepare deeploc2 --source Swissprot_Train_Validation_dataset.csv --out deeploc2
    """
    from esm2mega.data.deeploc2 import DeepLocOptions, prepare_deeploc2

    click.echo("\n".join(prepare_deeploc2(source, out, DeepLocOptions(**options))))
