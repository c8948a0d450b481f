"""Defines the command `predict`.

Importing it needs no torch or numpy.
"""

from __future__ import annotations

from typing import Any

import click

from esm2mega.cli.group import command, listed, output_mode, say
from esm2mega.cli.train import CODE
from esm2mega.config.scalars import as_word
from esm2mega.errors import UserError


@command(short_help="Predict labels with a fine-tuned model, in input order.")
@click.argument("checkpoint")
@click.argument("input", metavar="INPUT")
@click.option("--out", required=True, metavar="PATH", help="File to write: NAME.csv, .parquet or .h5.")
@click.option(
    "--sequence-column",
    metavar="NAME",
    help="Column of the sequences in a table [default: same as in training].",
)
@click.option(
    "--id-column",
    metavar="NAME",
    help="Column of the ids in a table [default: id, else variants or line numbers].",
)
@click.option(
    "--too-long",
    metavar="error|crop",
    help="What to do with proteins longer than --max-seq-length [default: same as in training].",
)
@click.option(
    "--max-seq-length",
    metavar="N",
    help="Most tokens at once, with <cls> and <eos> [default: same as in training].",
)
@click.option(
    "--uncertainty",
    type=click.Choice(["ensemble", "dropout"]),
    help="Also report uncertainty: from an ensemble (the default for RUN,RUN) or from samples of dropout.",
)
@click.option(
    "--samples", type=click.IntRange(2), metavar="N", help="Number of dropout samples [default: 20]."
)
@click.option(
    "--rank",
    flag_value="highest",
    default=None,
    help="Add the rank of each predicted number, 1 for the highest.",
)
@click.option("--rank-lowest", "rank", flag_value="lowest", help="Add the rank, 1 for the lowest number.")
@click.option(
    "--keep-columns",
    metavar="NAME,NAME|all",
    help="Copy these columns of the input table, such as labels or notes.",
)
@click.option("--calibrate", metavar="TABLE", help="Labelled proteins to calibrate the 95 % intervals on.")
@CODE
@click.option("--resume", is_flag=True, help="Continue an unfinished output; start one if there is none.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def predict(checkpoint: str, input: str, out: str, resume: bool, overwrite: bool, **options: Any) -> None:
    """Predict labels for the proteins of INPUT with a fine-tuned model; of a run, the best checkpoint.

    INPUT is a FASTA, CSV, Parquet or other sequence file, compressed or not, or a token store; - reads
    standard input. Several runs joined by commas form an ensemble, and so do the folds of `finetune --folds`:
    their mean is the prediction, and their spread its uncertainty. Classes of proteins come with the
    probability of each.

    Example: esm2mega predict runs/fitness proteins.fasta --out predictions.csv
    """
    mode = output_mode(resume, overwrite)
    from esm2mega.config.run_name import joined_names
    from esm2mega.finetune.folds import folds_of

    names = [member for name in joined_names("CHECKPOINT", checkpoint) for member in folds_of(name)]
    kind = options["uncertainty"] or ("ensemble" if len(names) > 1 else None)
    for option in ("samples", "calibrate"):
        if options[option] is not None and kind is None:
            raise UserError(f"--{option} {options[option]}: needs --uncertainty, or several runs as RUN,RUN")
    if options["samples"] is not None and kind == "ensemble":
        raise UserError(
            f"--samples {options['samples']}: counts samples of dropout; give --uncertainty dropout"
        )
    from esm2mega.finetune.code_option import load_code
    from esm2mega.finetune.draws import Uncertainty
    from esm2mega.finetune.predict import predict as run_predict

    samples = (options["samples"] or 20) if kind == "dropout" else 0
    uncertainty = None if kind is None else Uncertainty(kind, samples, options["calibrate"])

    settings = {
        "data.sequence_column": options["sequence_column"],
        "data.id_column": options["id_column"],
        "infer.too_long": options["too_long"],
        "infer.max_seq_length": options["max_seq_length"],
    }
    given = [as_word(key, value) for key, value in settings.items() if value is not None]
    overrides = [*given, *options["overrides"]]
    keep = listed([options["keep_columns"]] if options["keep_columns"] else []) or ()
    code = load_code(options["code"])
    say(run_predict(names, input, out, overrides, mode, code, uncertainty, options["rank"], keep))
