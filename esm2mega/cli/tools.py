"""Defines the commands `quickstart`, `inspect`, `plot`, `watch` and `doctor`."""

from __future__ import annotations

import click

from esm2mega.cli.group import command, single_process
from esm2mega.errors import UserError


@command(short_help="Simulate proteins, pretrain a tiny model, evaluate and plot it, in minutes.")
@click.option("--out", default="quickstart", show_default=True, metavar="DIR", help="Directory to create.")
@single_process
def quickstart(out: str) -> None:
    """Simulate protein families, pretrain a tiny model on 2 CPU processes, evaluate it and plot the run."""
    from esm2mega.quickstart.run import quickstart as run_quickstart

    run_quickstart(out)


@command(short_help="Describe a token store, a run, an output or a checkpoint; find leakage.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option(
    "--verify", is_flag=True, help="List every file of a checkpoint or token store as it is verified."
)
@click.option(
    "--leakage",
    is_flag=True,
    help="Find related proteins in different splits: TRAIN VALID TEST, or one folder with them.",
)
@click.option(
    "--min-identity", type=float, metavar="X", help="Smallest identity that counts as related [default: 0.3]."
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of MMseqs2 [default: 1].")
@click.option("--out", metavar="FILE.csv", help="Write all related pairs to this file, the closest first.")
@single_process
def inspect(
    paths: tuple[str, ...],
    verify: bool,
    leakage: bool,
    min_identity: float | None,
    threads: int | None,
    out: str | None,
) -> None:
    """Show what is in a token store, a run, an output, or a checkpoint of any format that `convert` reads.

    With --leakage, look for related proteins in different splits. Give TRAIN VALID TEST, TRAIN TEST, or one
    folder with train, valid and test; each is a table, a FASTA file or a token store.
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


@command(short_help="Plot the curves of one run, or of several, as PNG and HTML.")
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR…")
@click.option("--out", metavar="DIR", help="Output directory [default: that of the run, if it is one].")
@click.option(
    "--results",
    metavar="DIR",
    help="Results of `esm2mega autoeval` for checkpoints of the run, to show in the HTML too.",
)
@single_process
def plot(run_dirs: tuple[str, ...], out: str | None, results: str | None) -> None:
    """Plot the curves of a run from its log.jsonl, as PNG and as one self-contained HTML file.

    Several runs share one set of axes, with a list of the keys that differ and of the final numbers. So do
    the folds of a cross-validation, with predictions against labels.
    """
    if len(run_dirs) > 1:
        if results is not None:
            raise UserError(f"--results {results} is for the page of one run; leave it out, or plot one run")
        from esm2mega.report.overlay import plot_runs

        if out is None:
            raise UserError("the page of several runs needs a directory of its own: give --out DIR")
        click.echo("\n".join(plot_runs(run_dirs, out)))
        return
    from esm2mega.report.fold_dirs import fold_dirs
    from esm2mega.report.folds import plot_folds

    if fold_dirs(run_dirs[0]):
        if results is not None:
            raise UserError(f"--results {results} is for the page of one run; name one of the folds")
        click.echo("\n".join(plot_folds(run_dirs[0], out)))
        return
    from esm2mega.report.plot import plot_run

    benchmarks = None
    if results is not None:
        from esm2mega.autoeval.of_run import benchmarks_of_run

        benchmarks = benchmarks_of_run(run_dirs[0], results)
    files = plot_run(run_dirs[0], benchmarks, out)
    click.echo(f"{files.png}\n{files.html}")


@command(short_help="Follow a run from another terminal or machine.")
@click.argument("run_dir")
@click.option(
    "--every",
    type=click.FloatRange(0.1),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds between two updates.",
)
@click.option("--once", is_flag=True, help="Show the current state once, and exit.")
@single_process
def watch(run_dir: str, every: float, once: bool) -> None:
    """Show the progress of a run whenever its log changes: speed, time left, evaluations, incidents.

    It only reads the files of the run, so it works on any machine that sees them, also after the run has
    ended. A run that has not begun is waited for. For a cross-validation, it shows the fold that is being
    trained.
    """
    from datetime import datetime, timezone

    from esm2mega.report.watch import standing
    from esm2mega.report.watch import watch as run_watch

    if once:
        click.echo("\n".join(standing(run_dir, datetime.now(timezone.utc))))
    else:
        run_watch(run_dir, every, click.echo)


@command(short_help="Check this machine, and say how to fix what is missing.")
@click.argument("directory", default=".")
@click.option("--quick", is_flag=True, help="Skip checks that need PyTorch or start processes.")
def doctor(directory: str, quick: bool) -> None:
    """Check versions, devices, kernels, limits, communication, and the file system of DIRECTORY.

    DIRECTORY is where runs will be written; the default is the current one. When torchrun or srun starts this
    command on several hosts, it also compares their clocks and checks that they see each other's files.
    """
    from esm2mega.doctor.run import doctor as run_doctor

    works, report = run_doctor(directory, quick)
    if report:  # rank 0 reports for all
        click.echo(report)
    if not works:
        raise click.exceptions.Exit(1)
