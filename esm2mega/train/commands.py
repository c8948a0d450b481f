"""The commands `finetune` and `predict`; imported by the command line, so neither torch nor numpy is imported
here.
"""

from __future__ import annotations

from typing import Any

import click


def add_finetune_commands(cli: click.Group) -> None:
    """Add both to the command line."""
    cli.command(short_help="Train a head, and the encoder under it, on labelled proteins.")(finetune)
    cli.command(short_help="Predictions of a fine-tuned model, in input order.")(predict)


@click.option("--config", metavar="FILE|NAME", help="YAML file, or the name of a shipped configuration.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def finetune(config: str | None, overrides: tuple[str, ...]) -> None:
    """Fine-tune on a table of labelled proteins; resumes from the newest checkpoint in run_dir.

    Example: esm2mega finetune init_from=runs/mine task.kind=regression task.target_columns=[fitness]
    data.train=train.csv data.valid=valid.csv
    """
    from esm2mega.config.task import validate_task
    from esm2mega.config.validate import check_training_inputs, validate, world_size_from_environment
    from esm2mega.convert.into_model import load_run_with_model

    run = load_run_with_model(config, overrides)
    validate(run, world_size_from_environment())
    validate_task(run)
    check_training_inputs(run)

    from esm2mega.train.finetune import finetune as run_finetune

    run_finetune(run)


@click.argument("checkpoint")
@click.argument("input", metavar="INPUT")
@click.option("--out", required=True, metavar="PATH", help="NAME.csv, .parquet or .h5.")
@click.option("--sequence-column", metavar="NAME", help="Of a table [as in training].")
@click.option("--id-column", metavar="NAME", help="Of a table [id, else line numbers].")
@click.option("--long", metavar="error|crop", help="Proteins longer than --max-seq-length [as in training].")
@click.option("--max-seq-length", metavar="N", help="Tokens at once, with <cls> and <eos> [as in training].")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def predict(checkpoint: str, input: str, out: str, overwrite: bool, **options: Any) -> None:
    """Predict the proteins of INPUT (FASTA, CSV, Parquet and others) with a fine-tuned checkpoint.

    Example: esm2mega predict runs/mine proteins.fasta --out predictions.csv
    """
    import os

    from esm2mega.infer.predict import predict as run_predict

    settings = {
        "data.sequence_column": options["sequence_column"],
        "data.id_column": options["id_column"],
        "data.too_long": options["long"],
        "data.max_seq_length": options["max_seq_length"],
    }
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    lines = run_predict(checkpoint, input, out, [*given, *options["overrides"]], overwrite)
    if os.environ.get("RANK", "0") == "0":
        click.echo("\n".join(lines))
