"""Defines the command `prove`.

Importing it needs no torch.
"""

from __future__ import annotations

from typing import Any

import click

from esm2mega.cli.group import command, single_process
from esm2mega.errors import UserError


@command(short_help="Prove that every parallel layout trains the same model, on CPU processes.")
@click.option(
    "--layouts",
    metavar="GROUP|random:N",
    help="Groups, separated by commas: ci, more, resume, heads, bf16, fp16, families, exports, lora, "
    "lora-heads, dropout, cp; or random:N [default: all].",
)
@click.option("--row", metavar="NAME", help="Run one row of a group, by its name in the table.")
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Tensor-parallel size of one layout.")
@click.option("--pp", type=click.IntRange(1), metavar="N", help="Pipeline stages.")
@click.option("--vpp", type=click.IntRange(1), metavar="N", help="Chunks per pipeline stage (interleaved).")
@click.option("--dp", type=click.IntRange(1), metavar="N", help="Data-parallel size.")
@click.option("--cp", type=click.IntRange(1), metavar="N", help="Context-parallel size.")
@click.option(
    "--exchange",
    type=click.Choice(["auto", "heads", "needed", "gather"]),
    help="How context-parallel processes attend to each other's tokens [default: auto].",
)
@click.option("--sp", is_flag=True, default=None, help="Use sequence parallelism.")
@click.option(
    "--packed",
    type=click.Choice(["1", "2", "3", "4", "6", "12", "auto"]),
    is_flag=False,
    flag_value="auto",
    metavar="[K]",
    help="Proteins per micro-batch, a divisor of 12; without K the smallest above 1. The reference has one.",
)
@click.option("--distributed-optimizer", is_flag=True, default=None, help="Shard the optimizer state.")
@click.option(
    "--recompute", type=click.Choice(["none", "selective", "full"]), help="Which activations to recompute."
)
@click.option(
    "--layers",
    type=click.IntRange(1),
    metavar="N",
    help="Layers of the model [default: 5, with --vpp one for each chunk].",
)
@click.option(
    "--precision",
    type=click.Choice(["fp64", "bf16", "fp16"]),
    help="Precision of one layout [default: fp64].",
)
@click.option(
    "--lora",
    is_flag=True,
    help="Train adapters, and with --head also a head; on its own it means --layouts lora.",
)
@click.option("--head", metavar="NAME", help="Fine-tune with this head; an unknown name lists them.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=1234,
    show_default=True,
    help="Seed of everything that is random.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="Run at most N processes at once [default: 4, or more if a row needs them].",
)
@click.option("--json", "out", metavar="FILE", help="Also write all numbers to this file.")
@single_process
def prove(
    layouts: str | None,
    row: str | None,
    seed: int,
    processes: int | None,
    out: str | None,
    precision: str | None,
    lora: bool,
    head: str | None,
    **axes: Any,
) -> None:
    """Train a small ESM-2 at parallel layouts, and compare it with one process.

    Every loss, gradient, weight and checkpoint is compared. Give a group of layouts, or one layout, as in
    esm2mega prove --tp 2 --pp 2 --sp
    """
    from esm2mega.prove.layouts import layout_from_options
    from esm2mega.prove.training import SETTINGS
    from esm2mega.prove.trials import Trial, with_head, with_lora

    chosen: dict[str, Any] = {name: value for name, value in axes.items() if value}
    one = bool(chosen or precision)
    if row is not None and (lora or head is not None):
        raise UserError(f"--row and --{'lora' if lora else 'head'} exclude each other; give one of them")
    given = {"layouts": layouts, "row": row, **chosen, "precision": precision}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1 and given.keys() & {"layouts", "row"}:
        first, second = (f"--{name.replace('_', '-')}" for name in [*given][:2])
        raise UserError(f"{first} {layouts or row} and {second} exclude each other; give one of them")
    if one:
        # A layout that cannot run is refused before PyTorch is imported.
        layout = layout_from_options(chosen, SETTINGS)
        trial = Trial((layout,), precision or "fp64")
        trial = trial if head is None else with_head(trial, head)
        trials = [with_lora(trial) if lora else trial]
        processes = processes or layout.processes

    from esm2mega.prove.command import PROCESSES, choose_trials, most_processes, row_named
    from esm2mega.prove.command import prove as run_prove

    if row is not None:
        trials = [row_named(row)]
    elif not one:
        group = {(True, False): "lora", (False, True): "heads", (True, True): "lora-heads"}.get(
            (lora, head is not None), "all"
        )
        trials = choose_trials(layouts or group, seed, processes or PROCESSES, lora, head)
    shrink = (layouts or "").startswith("random")
    if not run_prove(trials, seed, processes or most_processes(trials), out, shrink):
        raise click.exceptions.Exit(1)
