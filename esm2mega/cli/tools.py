"""Defines the commands `quickstart`, `inspect`, `plot` and `doctor`."""

from __future__ import annotations

import click

from esm2mega.cli.group import command, single_process
from esm2mega.errors import UserError


@command(short_help="Simulate, prepare, pretrain a tiny model, evaluate and plot, in minutes.")
@click.option("--out", default="quickstart", show_default=True, metavar="DIR", help="Directory to make.")
@single_process
def quickstart(out: str) -> None:
    """Simulate protein families, pretrain a tiny model on 2 CPU processes, evaluate it and plot the run."""
    from esm2mega.quickstart.run import quickstart as run_quickstart

    run_quickstart(out)


@command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option(
    "--verify", is_flag=True, help="List the files of a checkpoint or token store as they are verified."
)
@click.option(
    "--leakage", is_flag=True, help="Find related proteins in the splits TRAIN VALID TEST, or of one folder."
)
@click.option("--min-identity", type=float, metavar="X", help="Least identity of related proteins [0.3].")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of MMseqs2 [1].")
@click.option("--out", metavar="FILE.csv", help="File for all related pairs, the worst first.")
@single_process
def inspect(
    paths: tuple[str, ...],
    verify: bool,
    leakage: bool,
    min_identity: float | None,
    threads: int | None,
    out: str | None,
) -> None:
    """Show what a token store, or a checkpoint in any format that `convert` reads, holds.

    With --leakage, compare the proteins of the splits TRAIN VALID TEST, of TRAIN TEST, or of one folder with
    train, valid and test: tables, FASTA files, or token stores.
    """
    if leakage:
        from esm2mega.data.leakage.command import leakage_lines

        if verify:
            raise UserError("--verify and --leakage are two commands; leave one of them out")
        for line in leakage_lines(paths, 0.3 if min_identity is None else min_identity, threads or 1, out):
            click.echo(line)
        return
    given = {"--min-identity": min_identity, "--threads": threads, "--out": out}
    for option in (name for name, value in given.items() if value is not None):
        raise UserError(f"{option} is for --leakage; add --leakage, or leave it out")
    if len(paths) > 1:
        raise UserError(
            f"inspect describes one path, not {len(paths)}; give one, or add --leakage to compare splits"
        )
    from esm2mega.inspect import inspect_path

    click.echo(inspect_path(paths[0], verify))


@command(short_help="Draw the curves of a run as PNG and HTML.")
@click.argument("run_dir")
@single_process
def plot(run_dir: str) -> None:
    """Draw the curves of a run from its log.jsonl, as PNG and as one self-contained HTML file."""
    from esm2mega.report.plot import plot_run

    files = plot_run(run_dir)
    click.echo(f"{files.png}\n{files.html}")


@command(short_help="Check what this machine can do, with cures for what is missing.")
@click.argument("directory", default=".")
@click.option("--quick", is_flag=True, help="Leave out what needs PyTorch or other processes.")
def doctor(directory: str, quick: bool) -> None:
    """Check versions, devices, kernels, limits, communication, and the file system of DIRECTORY.

    DIRECTORY is where runs are to be written, by default the current one. Started by torchrun or srun on
    several hosts, also compare their clocks and what they see of each other's files.
    """
    from esm2mega.doctor.run import doctor as run_doctor

    works, report = run_doctor(directory, quick)
    if report:  # rank 0 speaks for all
        click.echo(report)
    if not works:
        raise click.exceptions.Exit(1)
