"""The command line: parse, load, call; and the one place where an error becomes a line and an exit code.

Exit codes: 0 done, 2 bad input or configuration, 75 stopped by a signal after saving, 1 anything else.
Commands import what they call when they are called, so that `esm2mega --help` needs neither torch nor numpy.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from esm2mega import __version__
from esm2mega.convert.formats import READABLE, WRITABLE
from esm2mega.data.commands import add_commands as add_benchmarks
from esm2mega.errors import MachineError, StoppedBySignal, UserError
from esm2mega.infer.commands import add_commands as add_inference
from esm2mega.lora.commands import add_commands as add_lora
from esm2mega.train.commands import add_finetune_commands


@dataclass
class _Options:
    """What applies to every command."""

    verbose: bool = False


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(_Options).verbose = True


def _verbose_option() -> click.Option:
    """`-v`, accepted before and after the command; eager, so that it holds for argument errors too."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_verbose,
        help="Show the traceback of an error.",
    )


class _Command(click.Command):
    """A command that takes `-v`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_verbose_option())


class _Group(click.Group):
    """A group that takes `-v` and lists its commands in the order of the work."""

    command_class = _Command
    group_class = type  # subgroups are of this class too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_verbose_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="esm2mega")
def cli() -> None:
    """ESM-2 protein language models on Megatron-Core: from FASTA to checkpoints, on a laptop or many GPUs.

    Under several processes: torchrun --nproc-per-node N -m esm2mega COMMAND …
    """


def _single_process(command: Callable[..., None]) -> Callable[..., None]:
    """Under torchrun, a command that one process can do is done by rank 0; the others leave."""

    @functools.wraps(command)
    def on_rank_zero(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("RANK", "0") == "0":
            command(*args, **kwargs)

    return on_rank_zero


@cli.command(short_help="Simulate, prepare, pretrain a tiny model, evaluate and plot, in minutes.")
@click.option("--out", default="quickstart", show_default=True, metavar="DIR", help="Directory to make.")
@_single_process
def quickstart(out: str) -> None:
    """Simulate protein families, pretrain a tiny model on 2 CPU processes, evaluate it and plot the run."""
    from esm2mega.quickstart import quickstart as run_quickstart

    run_quickstart(out)


@cli.group()
def prepare() -> None:
    """Turn sequence files into token stores for training, and benchmarks into labelled tables."""


@prepare.command("fasta")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--out", required=True, metavar="DIR", help="Directory to make; gets train, valid and test.")
@click.option(
    "--val-size",
    "--valid-size",
    "valid_size",
    default=0,
    metavar="N",
    help="Sequences held out for validation.",
)
@click.option("--test-size", default=0, metavar="N", help="Sequences held out for testing.")
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the split.")
@click.option(
    "--format", metavar="NAME", help="fasta, csv, jsonl, parquet, megatron or tape [default: by file name]."
)
@click.option(
    "--sequence-column", default="sequence", show_default=True, metavar="NAME", help="Of tables: residues."
)
@click.option(
    "--id-column", metavar="NAME", help="Of tables: ids [default: id where it exists, else line numbers]."
)
@click.option(
    "--drop-empty", is_flag=True, help="Of tables: leave rows without a sequence out, and count them."
)
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Processes [default: the cores, at most 16]."
)
@click.option(
    "--shard-size",
    type=click.FloatRange(2**-10),
    default=16.0,
    show_default=True,
    metavar="GIB",
    help="Largest file of tokens; more residues go to further files.",
)
@_single_process
def prepare_fasta_command(
    inputs: tuple[str, ...],
    out: str,
    valid_size: int,
    test_size: int,
    seed: int,
    workers: int | None,
    shard_size: float,
    **source: Any,
) -> None:
    """Write sequences into token stores: FASTA, CSV, JSON lines (.gz and .zst too), Parquet, Megatron, TAPE.

    After a kill, the same command goes on with what was finished.
    """
    from esm2mega.data.prepare import PrepareOptions, prepare_fasta
    from esm2mega.data.records import SourceOptions
    from esm2mega.report.progress import show_bytes

    options = PrepareOptions(SourceOptions(**source), workers, int(shard_size * 2**10) << 20)
    report = prepare_fasta(inputs, out, valid_size, test_size, seed, options, show_bytes)
    click.echo("\n".join(report.lines()))


@prepare.command("uniref", short_help="UniRef50 clusters of UniRef90 sequences, for cluster sampling.")
@click.option("--uf50", metavar="FASTA", help="One representative per training cluster.")
@click.option("--uf90", metavar="FASTA", help="All members of the clusters.")
@click.option("--mapping", metavar="TSV", help="Cluster id, tab, member ids; the first line is a header.")
@click.option("--valid", metavar="FASTA", help="Held-out representatives for validation.")
@click.option("--test", metavar="FASTA", help="Held-out representatives for testing.")
@click.option("--val-size", "--valid-size", "valid_size", default=0, metavar="N", help="Or: number to draw.")
@click.option("--test-size", default=0, metavar="N", help="Or: number to draw.")
@click.option("--seed", default=1234, show_default=True, metavar="N", help="Seed of the draw.")
@click.option("--drop-other-clusters", is_flag=True, help="Leave clusters out that are not in --uf50.")
@click.option("--train-cluster-path", metavar="PARQUET", help="BioNeMo 2: lists of member ids, ur90_id.")
@click.option("--train-database-path", metavar="DB", help="BioNeMo 2: SQLite table protein(id, sequence).")
@click.option("--valid-cluster-path", metavar="PARQUET", help="BioNeMo 2: representatives, ur50_id.")
@click.option("--valid-database-path", metavar="DB", help="BioNeMo 2: their sequences.")
@click.option("--table", metavar="PARQUET|DIR", help="Rows of ur50_id, ur90_id, sequence.")
@click.option("--valid-table", metavar="PARQUET|DIR", help="The same for representatives.")
@click.option("--out", required=True, metavar="DIR", help="Directory to make; gets train, valid and test.")
@_single_process
def prepare_uniref_command(**options: Any) -> None:
    """Write UniRef90 sequences and the UniRef50 clusters over them into a token store for cluster sampling.

    Give --uf50, --uf90 and --mapping; or --train-cluster-path and --train-database-path; or --table.
    """
    from esm2mega.data.uniref_inputs import prepare_from_options

    click.echo("\n".join(prepare_from_options(options).lines()))


add_benchmarks(prepare, _single_process)


@cli.command(short_help="Train a masked language model, or resume training.")
@click.option("--config", metavar="FILE|NAME", help="YAML file, or the name of a shipped configuration.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def pretrain(config: str | None, overrides: tuple[str, ...]) -> None:
    """Train a masked language model; resumes from the newest checkpoint in run_dir.

    Example: esm2mega pretrain --config pretrain_esm2_8M data.train=DIR/train data.valid=DIR/valid
    """
    from esm2mega.config.load import load_run
    from esm2mega.config.validate import check_training_inputs, validate, world_size_from_environment

    run = load_run(config, overrides)
    validate(run, world_size_from_environment())
    check_training_inputs(run)

    from esm2mega.train.pretrain import pretrain as run_pretrain

    run_pretrain(run)


add_finetune_commands(cli)


@cli.command(short_help="Loss and perplexity of a checkpoint, or metrics of its task.")
@click.argument("checkpoint")
@click.option(
    "--data", required=True, metavar="STORE", help="Token store, sequence file or table to evaluate on."
)
@click.option("--out", metavar="FILE.json", help="Also write the numbers to this file.")
@click.option("--max-batches", type=click.IntRange(1), metavar="N", help="Packs to evaluate [default: all].")
@click.option(
    "--micro-batch-tokens",
    type=click.IntRange(3),
    metavar="T",
    help="Tokens of one pack [default: as in training].",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
def evaluate(
    checkpoint: str,
    data: str,
    out: str | None,
    max_batches: int | None,
    micro_batch_tokens: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Masked-language-model loss and perplexity of a checkpoint, beside the unigram baseline; of a fine-tuned
    one loss and metrics of its task on a table with labels.
    """
    from esm2mega.infer.task import evaluate_task, has_task
    from esm2mega.train.evaluate import evaluate_checkpoint

    if has_task(checkpoint):
        if max_batches is not None:
            raise UserError("--max-batches: metrics of a task are of the whole table; leave it out")
        if micro_batch_tokens is not None:
            overrides = (f"train.micro_batch_tokens={micro_batch_tokens}", *overrides)
        numbers = evaluate_task(checkpoint, data, out, overrides)
    else:
        numbers = evaluate_checkpoint(
            checkpoint,
            data,
            out,
            max_batches=max_batches,
            micro_batch_tokens=micro_batch_tokens,
            overrides=overrides,
        )
    if os.environ.get("RANK", "0") == "0":
        for name, value in numbers.items():
            click.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


@cli.command("convert", short_help="Checkpoints from and to Hugging Face, fair-esm, BioNeMo, Cerebras.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", required=True, type=click.Choice(WRITABLE), help="Format to write.")
@click.option(
    "--from",
    "source_format",
    type=click.Choice(list(READABLE)),
    help="Format of SRC [default: found out from its files].",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "fp64"]),
    help="Of the weights in DST [default: as in SRC].",
)
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out tensors without a place in ESM-2.")
@click.option("--drop-head", is_flag=True, help="Leave out the head: convert the encoder alone.")
@click.option("--verify", is_flag=True, help="Run both models, compare, and write DST.verify.json.")
@_single_process
def convert_command(
    source: str,
    target: str,
    to: str,
    source_format: str | None,
    dtype: str | None,
    drop: tuple[str, ...],
    drop_head: bool,
    verify: bool,
) -> None:
    """Convert the checkpoint SRC to DST; whatever is not carried over as it is gets a line.

    Example: esm2mega convert facebook/esm2_t6_8M_UR50D my_8M --to esm2mega --verify
    """
    from pathlib import Path

    from esm2mega.convert.convert import convert

    conversion = convert(Path(source), Path(target), to, source_format, dtype, drop, drop_head)
    click.echo("\n".join(conversion.lines()))
    if verify:
        from esm2mega.convert.verify import verify as run_verify

        click.echo("\n".join(run_verify(conversion)))


add_inference(cli)
add_lora(cli, _single_process)


@cli.command()
@click.argument("path")
@_single_process
def inspect(path: str) -> None:
    """What a checkpoint or token store holds."""
    from esm2mega.inspect import inspect_path

    click.echo(inspect_path(path))


@cli.command(short_help="Prove that every parallel layout trains the same model, on CPU processes.")
@click.option(
    "--layouts",
    metavar="GROUP|random:N",
    help="ci, more, resume, heads, bf16, families, lora, lora-heads (several with commas), random:N, or all "
    "(default).",
)
@click.option("--row", metavar="NAME", help="One row of the groups, as the table names it.")
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Tensor-parallel size of one layout.")
@click.option("--pp", type=click.IntRange(1), metavar="N", help="Pipeline stages.")
@click.option("--vpp", type=click.IntRange(1), metavar="N", help="Pieces per pipeline stage.")
@click.option("--dp", type=click.IntRange(1), metavar="N", help="Data-parallel size.")
@click.option("--sp", is_flag=True, default=None, help="Sequence parallelism.")
@click.option(
    "--packed",
    type=click.Choice(["1", "2", "3", "4", "6", "12", "auto"]),
    is_flag=False,
    flag_value="auto",
    metavar="[K]",
    help="Proteins per micro-batch, a divisor of 12; without a number some. The reference has one.",
)
@click.option("--distributed-optimizer", is_flag=True, default=None, help="Sharded optimizer state.")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), help="Recomputation.")
@click.option(
    "--layers",
    type=click.IntRange(1),
    metavar="N",
    help="Layers of the model; by default 5, and with --vpp one for each piece.",
)
@click.option("--precision", type=click.Choice(["fp64", "bf16"]), help="Of one layout; by default fp64.")
@click.option(
    "--lora", is_flag=True, help="Train adapters; alone: --layouts lora; with --head also its head."
)
@click.option("--head", metavar="NAME", help="Fine-tune with this head; a wrong name lists them.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=1234, show_default=True, help="Of everything random."
)
@click.option("--processes", type=click.IntRange(1), metavar="N", help="Limit; by default 4.")
@click.option("--json", "out", metavar="FILE", help="Also write all numbers to this file.")
@_single_process
def prove(
    layouts: str | None,
    row: str | None,
    seed: int,
    processes: int | None,
    out: str | None,
    precision: str | None,
    lora: bool,
    head: str | None,
    **axes: Any,
) -> None:
    """Train a small ESM-2 at parallel layouts and compare every loss, gradient, weight and checkpoint with
    those of one process.

    Either a group of layouts, or one: esm2mega prove --tp 2 --pp 2 --sp
    """
    from esm2mega.prove.layouts import layout_from_options
    from esm2mega.prove.training import SETTINGS
    from esm2mega.prove.trials import Trial, with_head, with_lora

    chosen: dict[str, Any] = {name: value for name, value in axes.items() if value}
    one = bool(chosen or precision)
    if row is not None and (lora or head is not None):
        raise UserError(f"--row and --{'lora' if lora else 'head'} exclude each other; give one of them")
    given = {"layouts": layouts, "row": row, **chosen, "precision": precision}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1 and given.keys() & {"layouts", "row"}:
        first, second = (f"--{name.replace('_', '-')}" for name in [*given][:2])
        raise UserError(f"{first} {layouts or row} and {second} exclude each other; give one of them")
    if one:
        # Refused before PyTorch is imported.
        layout = layout_from_options(chosen, SETTINGS)
        trial = Trial((layout,), precision or "fp64")
        trial = trial if head is None else with_head(trial, head)
        trials = [with_lora(trial) if lora else trial]
        processes = processes or layout.processes

    from esm2mega.prove.command import PROCESSES, choose_trials, row_named
    from esm2mega.prove.command import prove as run_prove

    processes = processes or PROCESSES
    if row is not None:
        trials = [row_named(row)]
    elif not one:
        group = {(True, False): "lora", (False, True): "heads", (True, True): "lora-heads"}.get(
            (lora, head is not None), "all"
        )
        trials = choose_trials(layouts or group, seed, processes, lora, head)
    shrink = (layouts or "").startswith("random")
    if not run_prove(trials, seed, processes, out, shrink):
        raise click.exceptions.Exit(1)


@cli.command(short_help="Curves of a run as PNG and HTML.")
@click.argument("run_dir")
@_single_process
def plot(run_dir: str) -> None:
    """Draw the curves of a run from its log.jsonl, as PNG and as one self-contained HTML file."""
    from esm2mega.report.plot import plot_run

    files = plot_run(run_dir)
    click.echo(f"{files.png}\n{files.html}")


@cli.command(short_help="What this machine can do, with cures for what is missing.")
@_single_process
def doctor() -> None:
    """Check versions, devices, communication between processes, and the file system."""
    from esm2mega.doctor import doctor as run_doctor

    works, report = run_doctor()
    click.echo(report)
    if not works:
        raise click.exceptions.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error of every command ends here.

    Args:
        arguments: the words after the program name; None takes them from the process.
    """
    options = _Options()
    # Megatron-Core warns at import about each optional package that is absent; `esm2mega doctor` says that
    # once.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Of Megatron-Core's use of PyTorch's checkpoints; nothing that a user could change.
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch\.distributed\.checkpoint\.")
    # Reading a checkpoint in one process is what `inspect` and `prove` intend.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        # Not standalone: click would print its own multi-line usage errors and exit by itself.
        code = cli.main(
            None if arguments is None else list(arguments), "esm2mega", standalone_mode=False, obj=options
        )
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 0
    except click.ClickException as error:
        hint = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "esm2mega"
        _report(f"error: {' '.join(error.format_message().split())} (see `{hint} --help`)", error, options)
        return 2
    except (UserError, StoppedBySignal) as error:
        # Every process finds the same mistake in a configuration; a machine's fault may strike only one.
        kind = "stopped" if isinstance(error, StoppedBySignal) else "error"
        _report(f"{kind}: {error}", error, options, common=not isinstance(error, MachineError))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        _report("interrupted", error, options)
        return 1
    except OSError as error:
        # A full disk, a vanished file system, no permission: what failed and where is all there is to say.
        place = f": {error.filename}" if error.filename else ""
        _report(f"error: {error.strerror or error}{place}", error, options, common=False)
        return 1
    except Exception as error:
        text = " ".join(str(error).split())
        _report(
            f"internal error: {type(error).__name__}: {text} (run with -v for the traceback)",
            error,
            options,
            common=False,
        )
        return 1


def _report(line: str, error: BaseException, options: _Options, common: bool = True) -> None:
    """Print an error to stderr if it is this process's turn.

    Args:
        common: every process meets this error, so rank 0 speaks for all until they know each other.
    """
    if not _may_speak(error, common):
        return
    if options.verbose:
        traceback.print_exception(error)
    rank = f"[rank {os.environ.get('RANK', '0')}] " if _world_size_or_one() > 1 else ""
    print(f"esm2mega: {rank}{line}", file=sys.stderr, flush=True)


def _may_speak(error: BaseException, common: bool) -> bool:
    if _world_size_or_one() == 1:
        return True
    # Whoever takes the process group down while an error passes asks first and leaves the answer on it.
    claimed = getattr(error, "claimed_report", None)
    if claimed is not None:
        return bool(claimed)
    # Looked up, not imported: without torch.distributed there is no process group to ask.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from esm2mega.parallel.errors import claim_error_report

        return claim_error_report()
    return not common or os.environ.get("RANK", "0") == "0"


def _world_size_or_one() -> int:
    from esm2mega.config.validate import world_size_from_environment

    try:
        return world_size_from_environment()
    except UserError:
        return 1
