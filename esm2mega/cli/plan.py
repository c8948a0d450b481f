"""Defines the command `plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from esm2mega.cli.group import command, say, single_process
from esm2mega.errors import UserError

if TYPE_CHECKING:
    from esm2mega.config.schema import Run


@command(short_help="Estimate which layouts of a model fit on given GPUs, and how fast they are.")
@click.option("--model", metavar="SIZE", help="Model size: 8M, 35M, 150M, 650M, 3B or 15B.")
@click.option("--config", metavar="FILE|NAME", help="YAML file, or the name of a shipped configuration.")
@click.option(
    "--gpus", type=click.IntRange(1), metavar="N", help="Number of GPUs of the job, over all hosts."
)
@click.option("--memory-gb", type=click.FloatRange(0, min_open=True), metavar="X", help="Memory of one GPU.")
@click.option(
    "--gpu",
    type=click.Choice(["a100", "h100"]),
    default="h100",
    show_default=True,
    help="GPU whose speed is assumed.",
)
@click.option(
    "--tflops",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Measured rate of matrix products, in TFLOP/s.",
)
@click.option(
    "--link-gbps",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Bandwidth between GPUs of a host, in GB/s.",
)
@click.option(
    "--network-gbps",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Bandwidth between hosts per GPU, in GB/s.",
)
@click.option(
    "--gpus-per-host",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Number of GPUs of a host.",
)
@click.option(
    "--length",
    type=click.IntRange(3),
    metavar="N",
    help="Tokens of each protein [default: the largest number allowed].",
)
@click.option("--json", "out", metavar="FILE", help="Also write all numbers to this file.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@single_process
def plan(
    model: str | None,
    config: str | None,
    gpus: int | None,
    memory_gb: float | None,
    gpu: str,
    tflops: float | None,
    link_gbps: float | None,
    network_gbps: float | None,
    gpus_per_host: int,
    length: int | None,
    out: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Plan a pretraining run without its GPUs: memory of every rank, communication, and time per step.

    Lists the layouts that fit, the fastest first, and says why the others do not. If KEY=VALUE or the
    configuration sets a layout, only that one is planned, stage by stage.

    Example: esm2mega plan --model 3B --gpus 16 --memory-gb 80
    """
    if gpus is None:
        raise UserError("--gpus is not given: say how many GPUs the job has, e.g. --gpus 16")
    if memory_gb is None:
        raise UserError("--memory-gb is not given: say how much memory a GPU has, e.g. --memory-gb 80")
    from esm2mega.plan.command import plan as run_plan
    from esm2mega.plan.command import with_rates

    hardware = with_rates(gpu, tflops, link_gbps, network_gbps, gpus_per_host)
    say(run_plan(model, config, overrides, gpus, memory_gb, hardware, length, out))


@single_process
def say_dry_run(run: Run, world_size: int) -> None:
    """Print what the ranks of a job need, from rank 0 alone."""
    from esm2mega.plan.command import dry_run

    say(dry_run(run, world_size))
