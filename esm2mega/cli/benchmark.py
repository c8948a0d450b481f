"""Defines the command `benchmark`.

Importing it needs neither torch nor numpy.
"""

from __future__ import annotations

import click

from esm2mega.cli.group import command, listed, single_process


@command(short_help="Measure how fast this machine computes, trains and embeds, next to other programs.")
@click.argument("fasta", required=False, metavar="[FASTA]")
@click.option("--model", metavar="SIZE", default="8M", show_default=True, help="8M, 35M, 150M, 650M, …")
@click.option(
    "--peers", is_flag=True, help="Measure transformers, fair-esm and esm-cpp too, where installed."
)
@click.option(
    "--precision",
    multiple=True,
    metavar="A,B",
    help="fp32, bf16, or both [default: both where the device multiplies bf16].",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Approximate number of batches in a round.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Measured rounds, after one that warms up.",
)
@click.option(
    "--pack-tokens",
    type=click.IntRange(64),
    metavar="T",
    help="Tokens of a batch [default: 4096 on a CPU, 16384 on a GPU].",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads [default: as PyTorch chooses].")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=1,
    show_default=True,
    help="Seed of proteins and masks.",
)
@click.option("--out", default="benchmark", show_default=True, metavar="DIR", help="Directory to make.")
@single_process
def benchmark(
    fasta: str | None,
    model: str,
    peers: bool,
    precision: tuple[str, ...],
    steps: int,
    rounds: int,
    pack_tokens: int | None,
    threads: int | None,
    seed: int,
    out: str,
) -> None:
    """Measure matrix products, memory copies, data loading, training, embedding, and the parts of a step.

    All programs get the same proteins, from FASTA or made up with the lengths of UniRef90, and take turns; a
    ratio is taken within a round. DIR gets benchmark.json and benchmark.png.

    Example: esm2mega benchmark --model 35M --peers my_proteins.fasta
    """
    from pathlib import Path

    from esm2mega.files import check_out, refuse_existing

    refuse_existing(Path(out))  # before PyTorch is imported
    check_out(Path(out) / "benchmark.json")
    from esm2mega.benchmark.command import benchmark as run_benchmark
    from esm2mega.benchmark.command import settings_of

    chosen = settings_of(model, listed(precision), steps, rounds, pack_tokens, seed, threads, peers)
    for line in run_benchmark(chosen, fasta, out, lambda line: click.echo(line, err=True)):
        click.echo(line)
