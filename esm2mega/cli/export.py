"""Defines the command `export`.

Importing it needs no torch.
"""

from __future__ import annotations

from pathlib import Path

import click

from esm2mega.cli.group import command, listed, single_process


@command("export", short_help="Write a model as a PyTorch or ONNX program that runs without esm2mega.")
@click.argument("checkpoint")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["torch", "onnx"]),
    help="A program of torch.export (.pt2), or of ONNX (.onnx).",
)
@click.option("--out", required=True, metavar="FILE", help="File to make, NAME.pt2 or NAME.onnx.")
@click.option(
    "--include",
    multiple=True,
    metavar="A,B",
    help="Any of encoder, head, contacts [default: encoder, and the head if there is one].",
)
@single_process
def export_command(checkpoint: str, to: str, out: str, include: tuple[str, ...]) -> None:
    """Write CHECKPOINT as a program that takes padded batches, and compare the file with the model.

    The comparison is on 20 proteins; if an output differs by more than 1e-4, there is no file.

    Example: esm2mega export runs/mine --to onnx --out mine.onnx
    """
    from esm2mega.export.command import export

    click.echo("\n".join(export(checkpoint, to, Path(out), listed(include))))
