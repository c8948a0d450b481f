"""Defines the command `autoeval`.

Importing it needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from esm2mega.autoeval.tasks import MODES, check_modes, check_options, parse_tasks
from esm2mega.cli.group import command, listed, say
from esm2mega.errors import UserError


@command(short_help="Evaluate checkpoints on the field's benchmarks.", goes_on=True)
@click.argument("words", nargs=-1, required=True, metavar="CHECKPOINT… [KEY=VALUE]…")
@click.option(
    "--tasks",
    multiple=True,
    required=True,
    metavar="A,B",
    help="Tasks and suites; an unknown name lists them.",
)
@click.option(
    "--mode", "modes", multiple=True, metavar="A,B", help=f"Any of {', '.join(MODES)} [default: probe]."
)
@click.option("--source", required=True, metavar="DIR", help="Folder with the published files of the tasks.")
@click.option(
    "--out", required=True, metavar="DIR", help="Folder for the results; continues if it holds some."
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of seeds, that is of heads trained for each model.",
)
@click.option("--seed", type=click.IntRange(0), default=1234, show_default=True, help="First seed.")
@click.option(
    "--layers", multiple=True, metavar="N,M", help="Layers that a probe chooses from [default: -1]."
)
@click.option("--limit-train", type=click.IntRange(2), metavar="N", help="Use at most N training proteins.")
@click.option("--limit-valid", type=click.IntRange(2), metavar="N", help="Use at most N validation proteins.")
@click.option("--limit-test", type=click.IntRange(2), metavar="N", help="Use at most N test proteins.")
def autoeval(
    words: tuple[str, ...],
    tasks: tuple[str, ...],
    modes: tuple[str, ...],
    source: str,
    out: str,
    seeds: int,
    seed: int,
    layers: tuple[str, ...],
    **limits: int | None,
) -> None:
    """Evaluate checkpoints on benchmarks, with simple baselines and published figures beside each number.

    Tasks have names such as flip/gb1:sampled, tape/stability, deeploc2 and proteingym; suites are flip, tape,
    quick and contacts. KEY=VALUE changes settings of fine-tuning, and parallel.* the layout in every mode. If
    the command is stopped, the same command continues.

    Example: esm2mega autoeval runs/mine --tasks quick --source flip --out results
    """
    chosen = parse_tasks(listed(tasks) or (), source)
    asked = listed(modes) or ["probe"]
    check_modes(chosen, asked)
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    checkpoints = [word for word in words if word not in overrides]
    if not checkpoints:
        raise UserError("no checkpoint is named; give a run, or a model in any format of `esm2mega convert`")

    most = {name.removeprefix("limit_"): value for name, value in limits.items() if value is not None}
    check_options(chosen, asked, listed(layers) or (), most, overrides)

    from esm2mega.autoeval.report import lines
    from esm2mega.autoeval.request import SuiteRequest
    from esm2mega.autoeval.suite import run_suite

    request = SuiteRequest(
        checkpoints, chosen, asked, source, out, most, seed, seeds, listed(layers) or (), overrides
    )
    say(lines(run_suite(request, _run_command, lambda line: say([line])), out))


def _run_command(words: Sequence[str]) -> None:
    """Run one command as the shell would, in this process; its errors come through."""
    from esm2mega.cli.app import cli

    cli.main(list(words), "esm2mega", standalone_mode=False)
