"""Defines the commands `embed` and `score`.

Importing them needs neither torch nor numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from esm2mega.cli.group import command, listed, output_mode, say
from esm2mega.config.scalars import as_word
from esm2mega.errors import UserError
from esm2mega.files import check_writable


def _settings(options: dict[str, Any], overrides: tuple[str, ...]) -> list[str]:
    """Return options as `key=value`, then what was given in that form."""
    given = [as_word(key, value) for key, value in options.items() if value is not None]
    return [*given, *overrides]


_PACK_TOKENS = click.option(
    "--pack-tokens",
    metavar="T",
    help="Tokens per pack, which are computed together [default: 2048 on a CPU, 16384 on a GPU].",
)


@command(short_help="Compute embeddings, logits and contact maps of proteins.")
@click.argument("checkpoint")
@click.argument("input", metavar="INPUT")
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    help="Output: NAME.h5, .npz or .parquet, or a folder for .pt files.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="A,B",
    help="Any of residue, pooled, logits and contacts [default: residue,pooled].",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="N,M",
    help="Layers whose output is stored: 0 is the token embedding, -1 the last layer [default: -1].",
)
@click.option(
    "--pooling", metavar="mean|cls|max", help="How residue vectors become one protein vector [default: mean]."
)
@click.option(
    "--precision",
    metavar="fp32|bf16|fp16|fp64|int8",
    help="Precision of the computation [default: same as in training].",
)
@click.option("--max-drift", metavar="D", help="Largest drift of --precision int8 from fp32 [default: 0.02].")
@click.option("--dtype", metavar="fp32|fp16|bf16|fp64", help="Data type of the output [default: fp32].")
@click.option("--layout", metavar="ragged|bionemo", help="Layout of HDF5 files [default: ragged].")
@click.option(
    "--compression", metavar="none|gzip|lzf", help="Compression with --layout bionemo [default: none]."
)
@click.option(
    "--too-long",
    metavar="error|crop|chunk",
    help="What to do with proteins longer than --max-seq-length [default: error].",
)
@click.option(
    "--max-seq-length",
    metavar="N",
    help="Most tokens at once, with <cls> and <eos> [default: same as in training].",
)
@_PACK_TOKENS
@click.option(
    "--sequence-column", metavar="NAME", help="Column of the sequences in a table [default: sequence]."
)
@click.option(
    "--id-column", metavar="NAME", help="Column of the ids in a table [default: id, else line numbers]."
)
@click.option(
    "--contact-maps", metavar="DIR", help="Also draw the contact map of each protein as a PNG in DIR."
)
@click.option("--config", metavar="FILE|NAME", help="Configuration with an `infer` section, such as `infer`.")
@click.option("--resume", is_flag=True, help="Continue an unfinished output; start one if there is none.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def embed(checkpoint: str, input: str, out: str, resume: bool, overwrite: bool, **options: Any) -> None:
    """Compute embeddings of the proteins of INPUT, in input order, with their ids.

    INPUT is a FASTA, CSV, Parquet or other sequence file, compressed or not, a stream, or a token store; -
    reads standard input. The result for a protein does not depend on the other proteins of INPUT.

    Example: esm2mega embed runs/mine proteins.fasta --out proteins.h5
    """
    mode = output_mode(resume, overwrite)
    from esm2mega.infer.embed import EmbedRequest
    from esm2mega.infer.embed import embed as run_embed

    settings = {
        "infer.outputs": listed(options["include"]),
        "infer.layers": listed(options["layers"]),
        **{
            f"infer.{name}": options[name]
            for name in ("pooling", "precision", "max_drift", "dtype", "layout", "compression", "too_long")
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


@command(short_help="Score variants by how likely the model finds them, without training.")
@click.argument("checkpoint")
@click.option("--sequence", metavar="S", help="Sequence of the wild type, on the command line.")
@click.option("--fasta", metavar="FILE", help="FASTA with one or more wild types.")
@click.option(
    "--variants",
    metavar="FILE",
    help="Table of variants or of whole sequences, or FASTA [default: all single substitutions].",
)
@click.option("--out", required=True, metavar="PATH", help="CSV to write, or with --proteingym a folder.")
@click.option(
    "--strategy",
    type=click.Choice(["wt-marginals", "masked-marginals", "pseudo-ppl"]),
    help="[default: masked-marginals; pseudo-ppl for whole sequences]",
)
@click.option(
    "--normalize",
    type=click.Choice(["vocabulary", "residues"]),
    default="vocabulary",
    show_default=True,
    help="Normalise probabilities over all 33 tokens, or over the 20 standard residues.",
)
@click.option(
    "--offset", type=int, default=1, show_default=True, help="Number that variants give to the first residue."
)
@click.option(
    "--mutation-column", default="mutant", show_default=True, metavar="NAME", help="Column with the variants."
)
@click.option(
    "--sequence-column",
    metavar="NAME",
    help="Column with whole sequences [default: mutated_sequence, if there is no column of variants].",
)
@click.option(
    "--id-column",
    default="id",
    show_default=True,
    metavar="NAME",
    help="Column that names the wild type of a row.",
)
@click.option(
    "--score-column",
    default="score",
    show_default=True,
    metavar="NAME",
    help="Name of the column that is added.",
)
@click.option(
    "--measured",
    metavar="NAME",
    help="Column of measured values; report Spearman's correlation with the scores.",
)
@click.option(
    "--skip-invalid",
    is_flag=True,
    help="Leave rows that cannot be scored empty and list them, instead of stopping.",
)
@click.option("--heat-map", metavar="FILE.png", help="Also draw all single substitutions of the wild type.")
@click.option("--proteingym", metavar="CSV", help="ProteinGym's reference file; score all its assays.")
@click.option("--assays", metavar="DIR", help="Folder with the assays, for --proteingym.")
@click.option(
    "--precision",
    metavar="fp32|bf16|fp16|fp64",
    help="Precision of the computation [default: same as in training].",
)
@click.option(
    "--max-seq-length",
    metavar="N",
    help="Tokens of the window around a residue [default: same as in training].",
)
@_PACK_TOKENS
@click.option("--resume", is_flag=True, help="With --proteingym, keep the assays that are finished.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def score(checkpoint: str, out: str, resume: bool, overwrite: bool, **options: Any) -> None:
    """Score variants, or whole sequences, by how likely the model finds them (zero-shot).

    Whole sequences may be longer or shorter than the wild type, and can be scored without one.

    Example: esm2mega score runs/mine --fasta wild_type.fasta --variants variants.csv --out scores.csv
    """
    kinds = [name for name in ("sequence", "fasta", "proteingym") if options[name] is not None]
    if len(kinds) > 1 or not (kinds or options["variants"] is not None):
        raise UserError(
            "give the wild type by one of --sequence, --fasta and --proteingym; only whole sequences in "
            "--variants need none"
        )
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
    of_tables = {"measured": None, "sequence_column": None, "skip_invalid": False}
    for name, value in of_tables.items():
        if scan and options[name] != value:
            raise UserError(f"--{name.replace('_', '-')} is about the rows of --variants; leave it out")
    if options["heat_map"] is not None and not scan:
        raise UserError("--heat-map shows all single substitutions; leave --variants out")
    if mode == "new" and options["proteingym"] is None:
        for path in filter(None, (out, options["heat_map"])):
            if Path(path).exists():
                raise UserError(f"{path}: exists; replace it with --overwrite, or choose another name")

    from esm2mega.data.variants.wild_types import WildType, clean, read_wild_types
    from esm2mega.infer.plan import ScoreOptions
    from esm2mega.infer.score import draw_scan, score_file

    settings = {
        "infer.precision": options["precision"],
        "infer.max_seq_length": options["max_seq_length"],
        "infer.micro_batch_tokens": options["pack_tokens"],
    }
    how = ScoreOptions(
        strategy=options["strategy"],
        normalization=options["normalize"],
        offset=options["offset"],
        mutation_column=options["mutation_column"],
        sequence_column=options["sequence_column"],
        id_column=options["id_column"],
        score_column=options["score_column"],
        measured_column=options["measured"],
        skip_invalid=options["skip_invalid"],
        overrides=_settings(settings, options["overrides"]),
    )
    if options["proteingym"] is not None:
        from esm2mega.infer.proteingym import read_reference, score_assays

        assays = read_reference(options["proteingym"], options["assays"])
        say(score_assays(checkpoint, assays, out, how, mode))
        return
    proteins = []
    if options["sequence"] is not None:
        proteins = [WildType("sequence", clean(options["sequence"]))]
    elif options["fasta"] is not None:
        proteins = read_wild_types(options["fasta"])
    if options["heat_map"] is not None and len(proteins) > 1:
        raise UserError(
            f"--heat-map shows one wild type, {options['fasta']} has {len(proteins)}; leave it out"
        )
    if options["heat_map"] is not None:
        check_writable(Path(options["heat_map"]))
    report = score_file(checkpoint, proteins, options["variants"], out, how)
    say(report)
    if options["heat_map"] is not None and report:
        draw_scan(options["heat_map"], proteins[0], out, how)
        click.echo(options["heat_map"])
