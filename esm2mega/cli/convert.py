"""Defines the command `convert`.

Importing it needs no torch.
"""

from __future__ import annotations

from pathlib import Path

import click

from esm2mega.cli.group import command, single_process
from esm2mega.convert.formats.registry import READABLE, WRITABLE


@command("convert", short_help="Convert checkpoints from and to Hugging Face, fair-esm, BioNeMo and others.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", required=True, type=click.Choice(WRITABLE), help="Format to write.")
@click.option(
    "--from",
    "source_format",
    type=click.Choice(list(READABLE)),
    help="Format of SRC [default: detected from its files].",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "fp64"]),
    help="Data type of the weights in DST [default: as in SRC].",
)
@click.option(
    "--drop", multiple=True, metavar="PATTERN", help="Leave out tensors for which ESM-2 has no place."
)
@click.option("--drop-head", is_flag=True, help="Leave out the head: convert the encoder alone.")
@click.option("--license", metavar="ID", help="Licence for the model card of --to hf, such as apache-2.0.")
@click.option(
    "--results", metavar="DIR", help="Results of `esm2mega autoeval` for SRC, for the card of --to hf."
)
@click.option("--verify", is_flag=True, help="Run both models, compare them, and write DST.verify.json.")
@single_process
def convert_command(
    source: str,
    target: str,
    to: str,
    source_format: str | None,
    dtype: str | None,
    drop: tuple[str, ...],
    drop_head: bool,
    license: str | None,
    results: str | None,
    verify: bool,
) -> None:
    """Convert the checkpoint SRC to DST, and list everything that is changed or left out.

    With --to hf, DST has a model card, README.md, with what is known of the training.

    Example: esm2mega convert facebook/esm2_t6_8M_UR50D my_8M --to esm2mega --verify
    """
    from esm2mega.convert.convert import convert

    benchmarks = None if results is None else Path(results)
    conversion = convert(
        *(Path(source), Path(target), to, source_format, dtype, drop, drop_head),
        license=license,
        results=benchmarks,
    )
    click.echo("\n".join(conversion.lines()))
    if verify:
        from esm2mega.convert.verify.verify import verify as run_verify

        click.echo("\n".join(run_verify(conversion)))
