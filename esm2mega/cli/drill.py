"""Defines the command `drill`.

Importing it needs no torch.
"""

from __future__ import annotations

import click

from esm2mega.cli.group import command
from esm2mega.cli.train import finetune, pretrain
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.errors import UserError

_TRAININGS = {"pretrain": pretrain, "finetune": finetune}


@command(short_help="Kill the processes of your own training, and prove that nothing is lost.")
@click.option("--out", required=True, metavar="DIR", help="Directory to create, for the runs and drill.json.")
@click.option(
    "--steps", type=click.IntRange(1), default=50, show_default=True, help="Number of steps of each run."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of kills.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of ranks, all on this machine.",
)
@click.option("--seed", type=click.IntRange(0), default=1234, show_default=True, help="Seed of the kills.")
@click.argument("words", nargs=-1, required=True, metavar="-- pretrain|finetune …")
def drill(out: str, steps: int, rounds: int, processes: int, seed: int, words: tuple[str, ...]) -> None:
    """Run a training for some steps without interruption, and again with ranks killed and restarted.

    Weights, optimizer and log must be identical bit by bit, and every sample used exactly once; otherwise the
    exit code is 1. The runs are new ones below DIR; your run_dir is not touched. Only processes that the
    drill started are killed.

    Example: esm2mega drill --out drill --processes 2 -- pretrain --config my.yaml
    parallel.tensor_model_parallel_size=2
    """
    if world_size_from_environment() > 1:
        raise UserError("drill starts the ranks itself; run it without torchrun or srun, with --processes N")
    name, *rest = words
    if name not in _TRAININGS:
        raise UserError(f"drill cannot run {name!r}; give -- and pretrain or finetune, with its arguments")
    given = _TRAININGS[name].make_context(name, list(rest), parent=click.get_current_context()).params

    from esm2mega.drill.command import Training
    from esm2mega.drill.command import drill as run_drill

    training = Training(name, tuple(rest), given["config"], tuple(given["overrides"]))
    if not run_drill(training, out, steps, rounds, processes, seed):
        raise click.exceptions.Exit(1)
