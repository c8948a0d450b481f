"""Gives all commands the option `-v`, an order in the help, and output from rank 0 alone."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import click

from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.renamed import refusal_of_option
from esm2mega.errors import UserError
from esm2mega.infer.target import Mode
from esm2mega.processes import end_with_parent

_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""torchrun sets this variable for the processes that it starts."""


@dataclass
class Options:
    """Holds the options that apply to every command, and what is known of the one that runs.

    Attributes:
        verbose: Whether to show the traceback of an error.
        goes_on: Whether the command, stopped and started again, goes on from where it was.
    """

    verbose: bool = False
    goes_on: bool = False


def _set_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Options).verbose = True


def _verbose_option() -> click.Option:
    """Make `-v`, accepted before and after the command; it is eager, to apply to argument errors too."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_verbose,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """Defines a command that takes `-v`, names the successor of a renamed option, and knows its rank."""

    def __init__(self, *args: Any, goes_on: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_verbose_option())
        self._goes_on = goes_on

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            accepted = [option for parameter in self.params for option in parameter.opts]
            if (refusal := refusal_of_option(error.option_name, accepted)) is not None:
                raise UserError(refusal) from error
            if any(parameter.name == "overrides" for parameter in self.params):
                from esm2mega.config.foreign.answers import answer

                if (advice := answer(error.option_name)) is not None:
                    raise UserError(f"No such option {error.option_name}, which is one {advice}") from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        # A process that mistook its rank would do nothing, or everything for one of several, without a word.
        world_size_from_environment()
        ctx.ensure_object(Options).goes_on = self._goes_on
        if _TORCHRUN in os.environ:
            # It starts its processes in sessions of their own, in which they would outlive it.
            end_with_parent(signal.SIGTERM)
        return super().invoke(ctx)


class Group(click.Group):
    """Defines a group that takes `-v` and lists its commands in the order in which they are used."""

    command_class = Command
    group_class = type  # subgroups are of this class too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_verbose_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def output_mode(resume: bool, overwrite: bool) -> Mode:
    """Return what to do with an output that exists, after checking that the options agree.

    Raises:
        UserError: Both options are set.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    return "resume" if resume else "overwrite" if overwrite else "new"


def listed(values: Iterable[str]) -> list[str] | None:
    """Return the words of a comma-separated option, which may also be repeated; None if it is not given."""
    return [word.strip() for value in values for word in value.removesuffix(",").split(",")] or None


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

command = functools.partial(click.command, cls=Command)
group = functools.partial(click.group, cls=Group)


def single_process(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command run on rank 0 alone; under torchrun the other processes end at once."""

    @functools.wraps(command)
    def on_rank_zero(*args: Any, **kwargs: Any) -> None:
        if os.environ.get("RANK", "0") == "0":
            command(*args, **kwargs)

    return on_rank_zero


def say(lines: Iterable[str]) -> None:
    """Print `lines` to stdout from rank 0 alone, however many processes run the command."""
    if os.environ.get("RANK", "0") == "0":
        click.echo("\n".join(lines))
