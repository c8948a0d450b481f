"""Defines the commands `embed` and `score`.

Importing them needs neither torch nor numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from esm2mega.cli.group import command, output_mode, say
from esm2mega.errors import UserError
from esm2mega.files import check_writable


def _settings(options: dict[str, Any], overrides: tuple[str, ...]) -> list[str]:
    """Options as `key=value`, then what was given in that form."""
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    return [*given, *overrides]


def _list(values: tuple[Any, ...]) -> str | None:
    """A comma-separated option, which may also be repeated, as a list of the configuration."""
    return f"[{','.join(values)}]" if values else None


@command(short_help="Embeddings, logits and contacts of proteins.")
@click.argument("checkpoint")
@click.argument("input", metavar="INPUT")
@click.option(
    "--out", required=True, metavar="PATH", help="NAME.h5, .npz or .parquet; else a folder of .pt files."
)
@click.option(
    "--include", multiple=True, metavar="A,B", help="residue, pooled, logits, contacts [residue,pooled]."
)
@click.option(
    "--layers", multiple=True, metavar="N,M", help="Hidden states; 0 the embedding, -1 the last [-1]."
)
@click.option("--pooling", metavar="mean|cls|max", help="One vector of a protein [mean].")
@click.option("--precision", metavar="fp32|bf16", help="To compute in [as trained].")
@click.option("--dtype", metavar="fp32|fp16|bf16", help="To store in [fp32].")
@click.option("--layout", metavar="ragged|bionemo", help="Of HDF5 files [ragged].")
@click.option("--too-long", metavar="error|crop|chunk", help="Proteins longer than --max-seq-length [error].")
@click.option("--max-seq-length", metavar="N", help="Tokens at once, with <cls> and <eos> [as trained].")
@click.option("--pack-tokens", metavar="T", help="Tokens that are computed together [by device].")
@click.option("--sequence-column", metavar="NAME", help="Of a table [sequence].")
@click.option("--id-column", metavar="NAME", help="Of a table [id, else line numbers].")
@click.option("--contact-maps", metavar="DIR", help="Also draw a PNG of each protein's contacts.")
@click.option("--config", metavar="FILE|NAME", help="Configuration with an `infer` section, such as `infer`.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished output; begin if there is none.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def embed(checkpoint: str, input: str, out: str, resume: bool, overwrite: bool, **options: Any) -> None:
    """Embeddings of the proteins of INPUT: FASTA, CSV, Parquet and others, also compressed, or a token store.

    Results are in input order with their ids, the same for a protein whatever its neighbours.

    Example: esm2mega embed runs/mine proteins.fasta --out proteins.h5
    """
    mode = output_mode(resume, overwrite)
    from esm2mega.infer.embed import EmbedRequest
    from esm2mega.infer.embed import embed as run_embed

    settings = {
        "infer.outputs": _list(options["include"]),
        "infer.layers": _list(options["layers"]),
        **{
            f"infer.{name}": options[name] for name in ("pooling", "precision", "dtype", "layout", "too_long")
        },
        "infer.max_seq_length": options["max_seq_length"],
        "infer.micro_batch_tokens": options["pack_tokens"],
        **{f"data.{name}": options[name] for name in ("sequence_column", "id_column")},
    }
    request = EmbedRequest(
        checkpoint,
        input,
        out,
        mode,
        _settings(settings, options["overrides"]),
        options["config"],
        options["contact_maps"],
    )
    say(run_embed(request))


@command(short_help="Zero-shot scores of variants.")
@click.argument("checkpoint")
@click.option("--sequence", metavar="S", help="The wild type.")
@click.option("--fasta", metavar="FILE", help="One or more wild types.")
@click.option("--variants", metavar="CSV", help="Table of variants [all single substitutions].")
@click.option("--out", required=True, metavar="PATH", help="CSV to write; with --proteingym a folder.")
@click.option(
    "--strategy",
    type=click.Choice(["wt-marginals", "masked-marginals", "pseudo-ppl"]),
    default="masked-marginals",
    show_default=True,
)
@click.option(
    "--normalize",
    type=click.Choice(["vocabulary", "residues"]),
    default="vocabulary",
    show_default=True,
    help="Probabilities over all 33 tokens, or the 20 residues.",
)
@click.option("--offset", type=int, default=1, show_default=True, help="Number of the first residue.")
@click.option("--mutation-column", default="mutant", show_default=True, metavar="NAME")
@click.option(
    "--id-column", default="id", show_default=True, metavar="NAME", help="Names the wild type of a row."
)
@click.option("--score-column", default="score", show_default=True, metavar="NAME", help="The column to add.")
@click.option("--measured", metavar="NAME", help="Column of measured values, for Spearman's correlation.")
@click.option("--heat-map", metavar="FILE.png", help="Draw the scan of a single wild type.")
@click.option("--proteingym", metavar="CSV", help="ProteinGym's reference file: score all its assays.")
@click.option("--assays", metavar="DIR", help="Folder of the assays of --proteingym.")
@click.option("--precision", metavar="fp32|bf16", help="To compute in [as trained].")
@click.option("--max-seq-length", metavar="N", help="Tokens of the window around a residue [as trained].")
@click.option("--pack-tokens", metavar="T", help="Tokens that are computed together [by device].")
@click.option("--resume", is_flag=True, help="Of --proteingym: keep the assays that are finished.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def score(checkpoint: str, out: str, resume: bool, overwrite: bool, **options: Any) -> None:
    """Score substitutions by how likely they make a protein, without training on measurements.

    Example: esm2mega score runs/mine --fasta wild_type.fasta --variants variants.csv --out scores.csv
    """
    kinds = [name for name in ("sequence", "fasta", "proteingym") if options[name] is not None]
    if len(kinds) != 1:
        raise UserError("give the wild type by one of --sequence, --fasta and --proteingym")
    if (options["proteingym"] is None) != (options["assays"] is None):
        raise UserError(
            "--proteingym and --assays go together: the reference file, and the folder of its tables"
        )
    mode = output_mode(resume, overwrite)
    if resume and options["proteingym"] is None:
        raise UserError("--resume is for the assays of --proteingym; one table is scored in one go")
    if options["proteingym"] is not None:
        fixed = {"variants": None, "measured": None, "offset": 1, "mutation_column": "mutant"}
        for name, value in fixed.items():
            if options[name] != value:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is fixed by the layout of ProteinGym; leave it out")
    scan = options["variants"] is None and options["proteingym"] is None
    if options["heat_map"] is not None and not scan:
        raise UserError("--heat-map shows all single substitutions; leave --variants out")
    if mode == "new" and options["proteingym"] is None:
        for path in filter(None, (out, options["heat_map"])):
            if Path(path).exists():
                raise UserError(f"{path}: exists; replace it with --overwrite, or choose another name")

    from esm2mega.infer import score as scoring

    settings = {
        "infer.precision": options["precision"],
        "infer.max_seq_length": options["max_seq_length"],
        "infer.micro_batch_tokens": options["pack_tokens"],
    }
    how = scoring.ScoreOptions(
        strategy=options["strategy"],
        normalization=options["normalize"],
        offset=options["offset"],
        mutation_column=options["mutation_column"],
        id_column=options["id_column"],
        score_column=options["score_column"],
        measured_column=options["measured"],
        overrides=_settings(settings, options["overrides"]),
    )
    if options["proteingym"] is not None:
        from esm2mega.infer.proteingym import read_reference, score_assays

        assays = read_reference(options["proteingym"], options["assays"])
        say(score_assays(checkpoint, assays, out, how, mode))
        return
    if options["sequence"] is not None:
        proteins = [scoring.WildType("sequence", scoring.clean(options["sequence"]))]
    else:
        proteins = scoring.read_wild_types(options["fasta"])
    if options["heat_map"] is not None and len(proteins) > 1:
        raise UserError(
            f"--heat-map shows one wild type, {options['fasta']} has {len(proteins)}; leave it out"
        )
    if options["heat_map"] is not None:
        check_writable(Path(options["heat_map"]))
    report = scoring.score_file(checkpoint, proteins, options["variants"], out, how)
    say(report)
    if options["heat_map"] is not None and report:
        scoring.draw_scan(options["heat_map"], proteins[0], out, how)
        click.echo(options["heat_map"])
