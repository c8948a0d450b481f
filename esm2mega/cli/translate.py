"""Defines the command `translate`.

Importing it needs neither torch nor numpy.
"""

from __future__ import annotations

import click

from esm2mega.cli.group import command, single_process


@command(short_help="Turn a configuration of an earlier system into one of esm2mega.")
@click.argument("file", metavar="THEIR_FILE")
@click.option("--out", required=True, metavar="OURS.yaml", help="File to write.")
@single_process
def translate(file: str, out: str) -> None:
    """Translate a configuration of BioNeMo 1 or 2, Cerebras Model Zoo, ESM2-FA or ProteinLM.

    THEIR_FILE is YAML or JSON, or a script that starts one of their programs with options; the script is not
    run. What cannot be translated is listed with the reason, on the screen and at the top of OURS.yaml.

    Example: esm2mega translate pretrain_esm2_8M.yaml --out mine.yaml
    """
    from esm2mega.config.foreign.translate import translate_file

    click.echo("\n".join(translate_file(file, out)))
