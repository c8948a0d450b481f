"""Assembles the command line, and turns every error into one line and an exit code.

Exit codes: 0 done, 2 bad input or configuration, 75 a training that was stopped by a signal or its time limit
and goes on when it is started again, 1 anything else.
Commands import what they call when they are called, so that `esm2mega --help` needs neither torch nor numpy.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from esm2mega.cli.autoeval import autoeval
from esm2mega.cli.benchmark import benchmark
from esm2mega.cli.convert import convert_command
from esm2mega.cli.drill import drill
from esm2mega.cli.export import export_command
from esm2mega.cli.group import CONTEXT, Group, Options
from esm2mega.cli.infer import embed, score
from esm2mega.cli.lora import lora
from esm2mega.cli.map import map_command
from esm2mega.cli.plan import plan
from esm2mega.cli.predict import predict
from esm2mega.cli.prepare import prepare
from esm2mega.cli.probe import probe
from esm2mega.cli.prove import prove
from esm2mega.cli.stopped import Stopped, stopped_by_signals
from esm2mega.cli.tools import doctor, inspect, plot, quickstart, watch
from esm2mega.cli.train import compare, evaluate, finetune, pretrain
from esm2mega.cli.translate import translate
from esm2mega.errors import MachineError, StoppedBySignal, UserError
from esm2mega.version import __version__


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="esm2mega")
def cli() -> None:
    """Train and use ESM-2 protein language models on Megatron-Core, on a laptop or on many GPUs.

    With several processes: torchrun --nproc-per-node N -m esm2mega COMMAND …
    """


for _command in (
    *(quickstart, translate, prepare, plan, pretrain, finetune, predict, evaluate, compare, convert_command),
    *(export_command, embed, map_command, probe, autoeval, score, lora),
    *(inspect, prove, drill, plot, watch, benchmark, doctor),
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error of every command ends here.

    Args:
        arguments: Words after the program's name; None for those of this process.
    """
    options = Options()
    # Megatron-Core warns at import about each missing optional package; `esm2mega doctor` reports them once.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # These come from Megatron-Core's use of PyTorch's checkpoints; a user could change nothing about them.
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch\.distributed\.checkpoint\.")
    # Megatron-Core calls collectives by names that newer versions of PyTorch have others for.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Reading a checkpoint in one process is what `inspect` and `prove` intend.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        with stopped_by_signals(lambda name: _end(name, options)):
            # Not standalone: click would print its own multi-line usage errors and exit by itself.
            code = cli.main(
                None if arguments is None else list(arguments), "esm2mega", standalone_mode=False, obj=options
            )
        return code if isinstance(code, int) else 0
    except Stopped as stopped:
        _report(_words(str(stopped), options), stopped, options)
        return _code(options)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 0
    except click.ClickException as error:
        hint = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "esm2mega"
        _report(f"error: {' '.join(error.format_message().split())} (see `{hint} --help`)", error, options)
        return 2
    except (UserError, StoppedBySignal) as error:
        # Every process finds the same mistake in a configuration; a machine's fault may strike only one.
        words = str(error) if isinstance(error, StoppedBySignal) else f"error: {error}"
        _report(words, error, options, common=not isinstance(error, MachineError))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        _report("interrupted", error, options)
        return 1
    except OSError as error:
        # A full disk, a lost file system, no permission: the message says what failed and where.
        location = f": {error.filename}" if error.filename else ""
        _report(f"error: {error.strerror or error}{location}", error, options, common=False)
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


def _end(name: str, options: Options) -> None:
    """End the process at once for a signal; rank 0 says so."""
    if os.environ.get("RANK", "0") == "0":
        _print(_words(name, options))
    os._exit(_code(options))


def _words(name: str, options: Options) -> str:
    return f"stopped by {name}" + ("; start the same command again to continue" if options.goes_on else "")


def _code(options: Options) -> int:
    return StoppedBySignal.exit_code if options.goes_on else MachineError.exit_code


def _report(line: str, error: BaseException, options: Options, common: bool = True) -> None:
    """Print an error to stderr, unless another process reports it.

    Args:
        line: Text of the error.
        error: The error, for its traceback.
        options: Whether the traceback is wanted.
        common: Whether every process gets this error; then rank 0 reports it if there are no process groups.
    """
    if not _may_speak(error, common):
        return
    if options.verbose:
        traceback.print_exception(error)
    _print(line)


def _print(line: str) -> None:
    rank = f"[rank {os.environ.get('RANK', '0')}] " if _world_size_or_one() > 1 else ""
    print(f"esm2mega: {rank}{line}", file=sys.stderr, flush=True)


def _may_speak(error: BaseException, common: bool) -> bool:
    if _world_size_or_one() == 1:
        return True
    # Code that destroys the process group because of an error asks first, and stores the answer in the error.
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
    from esm2mega.config.launcher import world_size_from_environment

    try:
        return world_size_from_environment()
    except UserError:
        return 1
