"""Defines the commands `pretrain`, `finetune`, `evaluate` and `compare`.

Importing them needs no torch or numpy.
"""

from __future__ import annotations

import time
from typing import Any

import click

from esm2mega.cli.group import command, say
from esm2mega.errors import UserError

CODE = click.option(
    "--code",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Your own head or loss class, imported from this folder or from an installed package.",
)

_FAST_DEV_RUN = click.option(
    "--fast-dev-run",
    is_flag=True,
    help="Try it out: two steps, an evaluation and a checkpoint, all removed at the end.",
)


@command(short_help="Train a masked language model, or resume training.", goes_on=True)
@click.option("--config", metavar="FILE|NAME", help="YAML file, or the name of a shipped configuration.")
@click.option("--dry-run", is_flag=True, help="Only print how much memory each rank of this job would need.")
@_FAST_DEV_RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def pretrain(config: str | None, dry_run: bool, fast_dev_run: bool, overrides: tuple[str, ...]) -> None:
    """Train a masked language model, or resume from the newest checkpoint in run_dir.

    Example: esm2mega pretrain --config pretrain_esm2_8M data.train=DIR/train data.valid=DIR/valid
    """
    begun = time.monotonic()
    from esm2mega.config.launcher import world_size_from_environment
    from esm2mega.config.load import load_run, values_of
    from esm2mega.config.paths import is_expanded
    from esm2mega.config.split import has_valid
    from esm2mega.config.validate import check_training_inputs, validate

    opened = None
    # Only with one of these it is worth the import of torch before the checks.
    if values_of(["init_from"], config, overrides)[0] is not None:
        from esm2mega.train.start import load_run_with_start

        run, opened = load_run_with_start(config, overrides)
    elif not is_expanded(run := load_run(config, overrides)):
        from esm2mega.parallel.paths import expand_paths

        run = expand_paths(run)
    validate(run, world_size_from_environment())
    check_training_inputs(run)
    if dry_run:
        from esm2mega.cli.plan import say_dry_run

        say_dry_run(run, world_size_from_environment())
        return

    from esm2mega.train.pretrain import pretrain as run_pretrain

    downstream = None
    if run.downstream.tasks:
        from esm2mega.autoeval.downstream.measure import Downstream

        downstream = Downstream(run)
    if fast_dev_run:
        from esm2mega.train.trial import done, trial_of

        with trial_of(run) as short:
            run_pretrain(short, begun=begun, opened=opened, is_trial=True)
        say([done(has_valid(run.data))])
        return
    run_pretrain(run, begun=begun, downstream=downstream, opened=opened)


@command(short_help="Train a head and the encoder on labelled proteins.", goes_on=True)
@click.option("--config", metavar="FILE|NAME", help="YAML file, or the name of a shipped configuration.")
@click.option(
    "--folds",
    type=click.IntRange(3),
    metavar="K",
    help="Cross-validate: train K models, each tested on a different part of data.train.",
)
@CODE
@_FAST_DEV_RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def finetune(
    config: str | None,
    folds: int | None,
    code: tuple[str, ...],
    fast_dev_run: bool,
    overrides: tuple[str, ...],
) -> None:
    """Fine-tune on a table of labelled proteins, or resume from the newest checkpoint in run_dir.

    Batch size, epochs, learning rate, warmup, evaluations and early stopping are chosen from the data and the
    model unless you set them, and printed.

    Example: esm2mega finetune run_dir=runs/fitness init_from=runs/mine task.kind=regression
    task.target_columns=[fitness] data.train=train.csv data.valid=valid.csv
    """
    begun = time.monotonic()
    from esm2mega.config.launcher import world_size_from_environment
    from esm2mega.config.load import given_keys
    from esm2mega.config.split import has_valid
    from esm2mega.config.task import validate_task
    from esm2mega.config.validate import check_training_inputs, validate
    from esm2mega.finetune.defaults import provisional
    from esm2mega.train.start import load_run_with_start

    run, opened = load_run_with_start(config, overrides)
    given = given_keys(config, overrides)
    if folds is not None:
        if run.data.split is not None:
            raise UserError(f"--folds {folds} splits data.train itself; set data.split=null")
        run.data.split = f"fold:1/{folds}"
    run = provisional(run, given, has_valid(run.data))
    validate(run, world_size_from_environment())
    validate_task(run)
    check_training_inputs(run)

    from esm2mega.finetune.code_option import load_code
    from esm2mega.finetune.run import UserParts
    from esm2mega.finetune.run import finetune as run_finetune

    parts = UserParts(code=load_code(code))
    if fast_dev_run:
        from esm2mega.train.trial import KEYS, done, trial_of

        with trial_of(run) as short:
            run_finetune(short, parts, opened=opened, begun=begun, given={*given, *KEYS}, is_trial=True)
        say([done(has_valid(run.data))])
        return
    if folds is None:
        run_finetune(run, parts, opened=opened, begun=begun, given=given)
        return
    from esm2mega.finetune.folds import cross_validate

    say(cross_validate(run, folds, parts, opened, begun, given))


@command(short_help="Compute the loss and perplexity of a checkpoint, or the metrics of its task.")
@click.argument("checkpoint")
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="STORE",
    help="Token store, sequence file or table to evaluate on; may be given several times.",
)
@click.option(
    "--out",
    multiple=True,
    metavar="FILE.json",
    help="Also write the numbers to this file; give one for each --data, in the same order.",
)
@click.option(
    "--max-batches", type=click.IntRange(1), metavar="N", help="Use at most N packs [default: all]."
)
@click.option(
    "--micro-batch-tokens",
    type=click.IntRange(3),
    metavar="T",
    help="Tokens per pack [default: same as in training].",
)
@CODE
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def evaluate(
    checkpoint: str,
    data: tuple[str, ...],
    out: tuple[str, ...],
    max_batches: int | None,
    micro_batch_tokens: int | None,
    code: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Compute the loss of a checkpoint, next to the loss of predicting residue frequencies alone.

    For a fine-tuned checkpoint, compute the loss and metrics of its task on a table with labels. RUN@best,
    RUN@last and RUN@step_N name a checkpoint of a run; RUN alone means the best checkpoint of a fine-tuning
    run and the last one of a pretraining run. Repeat --data to evaluate several test splits in one command.
    """
    if out and len(out) != len(data):
        raise UserError(
            f"--out is given {len(out)} times, --data {len(data)} times; give a file for each, or none"
        )
    if len(set(out)) < len(out):
        raise UserError(f"--out {out[0]}: each result needs a file of its own; give other names")
    from esm2mega.convert.start_point import asks_to_verify, open_checkpoint
    from esm2mega.finetune.checkpoint import evaluate_task
    from esm2mega.finetune.code_option import load_code
    from esm2mega.train.evaluate import evaluate_checkpoint

    start = open_checkpoint(checkpoint, asks_to_verify(overrides))
    if start.task is not None:
        if max_batches is not None:
            raise UserError("--max-batches: metrics of a task need the whole table; leave it out")
        if micro_batch_tokens is not None:
            overrides = (f"train.micro_batch_tokens={micro_batch_tokens}", *overrides)
    elif code:
        raise UserError(f"--code {code[0]}: {start.path} has no head of a task; leave it out")
    for number, (table, file) in enumerate(zip(data, out or [None] * len(data), strict=True)):
        if start.task is not None:
            numbers = evaluate_task(start, table, file, overrides, load_code(code))
        else:
            numbers = evaluate_checkpoint(
                start,
                table,
                file,
                max_batches=max_batches,
                micro_batch_tokens=micro_batch_tokens,
                overrides=overrides,
            )
        intervals = numbers.pop("intervals", {})
        lines = [
            f"{name}: {_shown(value)}{_interval(intervals.get(name))}" for name, value in numbers.items()
        ]
        say(["", *lines] if number else lines)


@command(short_help="Test whether two checkpoints or runs differ by more than chance.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--data", required=True, metavar="STORE", help="Token store, sequence file or table to evaluate on."
)
@click.option("--out", metavar="FILE.json", help="Also write the numbers to this file.")
@click.option("--per-protein", is_flag=True, help="Include the loss of every protein in this file.")
@CODE
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def compare(
    a: str,
    b: str,
    data: str,
    out: str | None,
    per_protein: bool,
    code: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Compute the difference between B and A, paired per protein, with 95 % intervals.

    Language models are compared on the same masked residues, fine-tuned models on the same rows of a table.
    Name A and B as for `evaluate`. Join runs that differ only in their seed by commas: the variation between
    seeds then widens the interval. KEY=VALUE applies to all of them.

    Example: esm2mega compare runs/a1,runs/a2,runs/a3 runs/b1,runs/b2,runs/b3 --data my_store/valid
    """
    if extra := next((word for word in overrides if "=" not in word), None):
        raise UserError(
            f"{extra}: is an unexpected third argument; join the runs of one side by commas, as in RUN,RUN"
        )
    from esm2mega.autoeval.compare import compare as run_compare
    from esm2mega.autoeval.compare import lines
    from esm2mega.finetune.code_option import load_code

    result = run_compare((a, b), data, out, per_protein, overrides, load_code(code))
    if result is not None:
        say(lines(result))


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f" (95 % interval {ends[0]:.6g} to {ends[1]:.6g})"


def _shown(value: Any) -> str:
    """Return a value of a result as text; what is not defined reads as in JSON."""
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
