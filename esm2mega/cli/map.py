"""Defines the command `map`.

Importing it needs no torch.
"""

from __future__ import annotations

from pathlib import Path

import click

from esm2mega.cli.group import command, single_process
from esm2mega.data.labels.numbers import DECIMAL_COMMA, PLAIN, THOUSANDS_COMMA


@command("map", short_help="Draw embeddings in two dimensions: a page, or a file for ProtSpace.")
@click.argument("embeddings", metavar="EMBEDDINGS.h5")
@click.option(
    "--out", required=True, metavar="FILE", help="NAME.html, or NAME.parquetbundle, which ProtSpace opens."
)
@click.option(
    "--labels", metavar="TABLE", help="CSV or Excel table with labels of the proteins, by their ids."
)
@click.option(
    "--column", metavar="NAME", help="Column of --labels that colours the points [default: the only one]."
)
@click.option("--id-column", default="id", show_default=True, metavar="NAME", help="Column of the ids.")
@click.option(
    "--numbers",
    type=click.Choice([PLAIN, DECIMAL_COMMA, THOUSANDS_COMMA]),
    default=PLAIN,
    show_default=True,
    help="How numbers in --labels are written: 1234.5, 1.234,5 or 1,234.5.",
)
@click.option("--layer", type=int, metavar="N", help="Number of the layer [default: the last of the file].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of UMAP.")
@single_process
def map_command(
    embeddings: str,
    out: str,
    labels: str | None,
    column: str | None,
    id_column: str,
    numbers: str,
    layer: int | None,
    seed: int,
) -> None:
    """Draw a map of the proteins in EMBEDDINGS.h5, written by `esm2mega embed`; similar ones lie close.

    It shows the first two principal components and, where umap-learn is installed, also UMAP. The page is one
    file, in which you can search for proteins by their ids.

    Example: esm2mega map proteins.h5 --labels labels.csv --column family --out map.html
    """
    from esm2mega.autoeval.embedding_map import MapRequest, draw_map

    request = MapRequest(
        Path(embeddings),
        Path(out),
        None if labels is None else Path(labels),
        column,
        id_column,
        numbers,
        layer,
        seed,
    )
    click.echo("\n".join(draw_map(request)))
