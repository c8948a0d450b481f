"""Defines the command `probe`.

Importing it needs neither torch nor numpy.
"""

from __future__ import annotations

from pathlib import Path

import click

from esm2mega.cli.group import command, listed, say, single_process
from esm2mega.errors import UserError


@command(short_help="Fit a small head to embeddings, and evaluate it.")
@click.option(
    "--labels",
    required=True,
    metavar="PATH",
    help="Folder with train.csv, valid.csv and test.csv, one table with a column of splits, or FLIP's FASTA.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder for results.json and predictions.csv.")
@click.option(
    "--head",
    type=click.Choice(["linear", "mlp", "cnn"]),
    default="linear",
    show_default=True,
    help="linear: ridge regression for numbers, logistic regression for classes; cnn: for residues.",
)
@click.option("--layers", multiple=True, metavar="N,M", help="Layers to choose from [default: all].")
@click.option(
    "--split-column",
    metavar="NAME",
    help="Column that names the split of each row, if there is one table [default: split, else set].",
)
@click.option("--config", metavar="FILE|NAME", help="Configuration with a section `task`, such as flip_gb1.")
@click.option(
    "--max-residues",
    type=click.IntRange(1),
    metavar="N",
    help="Use the labels of at most N training residues, chosen by the seed [default: all].",
)
@click.option("--overwrite", is_flag=True, help="Replace existing results.")
@click.argument("words", nargs=-1, required=True, metavar="EMBEDDINGS.h5… [KEY=VALUE]…")
@single_process
def probe(
    words: tuple[str, ...],
    labels: str,
    out: str,
    head: str,
    layers: tuple[str, ...],
    split_column: str | None,
    config: str | None,
    max_residues: int | None,
    overwrite: bool,
) -> None:
    """Fit a small head to frozen embeddings of labelled proteins, and evaluate it.

    EMBEDDINGS.h5 are files that `esm2mega embed` wrote, or _hiddens.h5 and _embeddings.h5 of BioNeMo 1;
    proteins are matched by their ids. The regularisation and the layer are chosen on the validation split.

    Example: esm2mega probe gb1.h5 --labels flip/gb1 --config flip_gb1 --out probes/gb1
    """
    from esm2mega.autoeval.probe.run import ProbeRequest
    from esm2mega.autoeval.probe.run import probe as run_probe

    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    embeddings = [word for word in words if word not in overrides]
    if not embeddings:
        raise UserError("no embeddings are named; give the files of `esm2mega embed`")
    names = listed(layers) or ()
    request = ProbeRequest(
        *(embeddings, labels, out, head, names, split_column, config, overrides, overwrite, max_residues)
    )
    say(run_probe(request))
