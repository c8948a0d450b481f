"""`drill` trains unbroken, then with killed processes, and judges whether both left the same behind."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from esm2mega.checkpoint.layout import find_checkpoints, step_of
from esm2mega.config.best_metric import VALID_LOSS, is_downstream
from esm2mega.config.load import values_of
from esm2mega.config.scalars import as_word
from esm2mega.config.schema import Run
from esm2mega.drill.compare import Remains, differences, unaccounted
from esm2mega.drill.ranks import GRACE, Ranks
from esm2mega.errors import MachineError, UserError
from esm2mega.files import first_of, write_json
from esm2mega.train.start import load_run_with_start
from esm2mega.version import __version__

REPORT = "drill.json"
_SAID = re.compile(r"esm2mega: (?:\[rank \d+\] )?(?:error: )?(.*)")
"""Matches a line in which a rank says how it ended."""

Say = Callable[[str], None]
print_line: Say = partial(print, flush=True)


@dataclass(frozen=True)
class Training:
    """Describes the training that is drilled, as the user would start it.

    Attributes:
        command: ``pretrain`` or ``finetune``.
        words: Its arguments.
        config: The file or name among these; None for none.
        overrides: The ``key=value`` among these.
    """

    command: str
    words: tuple[str, ...]
    config: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Kill:
    """Describes one kill.

    Attributes:
        start: Which start of the run it ended, from 1.
        seconds: When, in seconds after that start.
        ranks: The ranks that were killed.
        saved: Step of the newest checkpoint at that moment; 0 before the first.
    """

    start: int
    seconds: float
    ranks: list[int]
    saved: int


@dataclass
class BrokenRun:
    """Describes a run with kills.

    Attributes:
        run_dir: Its directory, which is removed when it holds the same as that of the unbroken run.
        kills: Its kills.
        faults: What differs from the unbroken run, or why the run did not end; empty if all is equal.
    """

    run_dir: Path
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def drill(
    training: Training,
    out: str | Path,
    steps: int = 50,
    rounds: int = 5,
    processes: int = 1,
    seed: int = 1234,
    say: Say = print_line,
) -> bool:
    """Run a training unbroken, then kill its processes again and again, and compare what is left.

    Args:
        training: The training.
        out: Directory for the runs, the output of their processes and the report; absent or empty.
        steps: Optimizer steps of a run.
        rounds: Number of kills, each at a moment drawn uniformly from the time of a run. A run that ends
            before its moment is compared, and another one takes the remaining kills.
        processes: Number of ranks.
        seed: Seed of the moments and of who is killed: one rank, or all at once.
        say: Prints a line.

    Returns:
        Whether every run with kills left the same as the unbroken one, with each sample used once.

    Raises:
        UserError: `out` holds something, or the training refuses its configuration.
        MachineError: The unbroken training failed.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(
            f"--out {out}: is not an empty directory, and a drill overwrites nothing; name another one"
        )
    settings = settings_of(load_run_with_start(training.config, training.overrides)[0], steps)
    (given,) = values_of(("run_dir",), training.config, training.overrides)
    if given is not None:
        say(f"run_dir  {given} of the configuration is left alone; the runs of the drill lie below {out}")
    ranks = "1 process" if processes == 1 else f"{processes} processes"
    say(f"drill    {training.command} on {ranks}, {steps} steps, {rounds} kills, seed {seed}")
    say(f"settings {' '.join(settings)}")
    (out / "output").mkdir(parents=True, exist_ok=True)
    machine = _Machine(training, settings, processes, out)
    runs: list[BrokenRun] = []
    try:
        seconds = machine.unbroken()
    except UserError:
        # All that is there is of this drill; the same --out can be given again, after a correction.
        for path in out.iterdir():
            shutil.rmtree(path)
        raise
    expected = Remains(out / "unbroken")
    faults = list(unaccounted(expected))
    used, left_out = len(expected.samples), len(expected.left_out)
    samples = f"{used:,} samples" + (f", {left_out:,} left out" if left_out else "")
    say(f"unbroken {samples}, in {seconds:.1f} s, weights sha256 {expected.weights_sha256}")
    rng = random.Random(seed)
    longest = seconds
    while not faults and (left := rounds - sum(len(run.kills) for run in runs)):
        began = time.monotonic()
        run = machine.broken(len(runs) + 1, left, longest, rng, say)
        if not run.kills:
            # The first run met cold caches; a moment behind the end kills nothing.
            longest = min(longest, time.monotonic() - began)
        runs.append(run)
        run.faults += run.faults or _compared(expected, Remains(run.run_dir))
        word = "equal" if not run.faults else "UNEQUAL"
        kills = "1 kill" if len(run.kills) == 1 else f"{len(run.kills)} kills"
        say(f"{word:<8} {run.run_dir} after {kills}{'' if run.kills else ': it ended before the first'}")
        faults += run.faults
        if not run.faults:
            shutil.rmtree(run.run_dir)
    for fault in faults:
        say(f"         {fault}")
    count = sum(len(run.kills) for run in runs)
    accounted = "every sample was " + ("used or left out once" if left_out else "used once")
    content = {
        "esm2mega": __version__,
        "command": [training.command, *training.words],
        "settings": settings,
        "processes": processes,
        "steps": steps,
        "seed": seed,
        "equal": not faults,
        "kills": count,
        "samples": used,
        "samples_left_out": left_out,
        "weights_sha256": expected.weights_sha256,
        "seconds": seconds,
        "faults": faults,
        "runs": [{**asdict(run), "run_dir": str(run.run_dir)} for run in runs],
    }
    write_json(out / REPORT, content)
    if not faults:
        say(f"equal    after {count} kills: weights, optimizer, log; and {accounted}")
    say(f"report   {out / REPORT}")
    return not faults


def settings_of(run: Run, steps: int) -> list[str]:
    """Return the settings with which a training is drilled: a short run that saves often and logs every step.

    The learning rate goes as in the first steps of the whole run.

    Args:
        run: The configuration of the user.
        steps: Optimizer steps of the drill.
    """
    often = max(1, steps // 10)
    saved, schedule = run.checkpoint.save_every, run.schedule
    settings: dict[str, object] = {
        "train.max_steps": steps,
        "train.max_epochs": None,
        "train.max_minutes": None,
        "schedule.decay_steps": schedule.decay_steps or schedule.warmup_steps + steps,
        "train.log_every": 1,
        "logging.samples": True,
        "logging.wandb": False,
        "checkpoint.resume": "auto",
        "checkpoint.save_every": min(saved, often) if saved else often,
    }
    if run.downstream.tasks:
        # Heads are fitted beside the training: when they are logged, and whether a kill loses one, is chance.
        settings["downstream.tasks"] = []
        if is_downstream(run.checkpoint.best_metric):
            settings["checkpoint.best_metric"] = VALID_LOSS
    return [as_word(key, value) for key, value in settings.items()]


class _Machine:
    """Starts the runs of one drill."""

    def __init__(self, training: Training, settings: Sequence[str], processes: int, out: Path) -> None:
        self._training, self._settings = training, settings
        self._processes, self._out = processes, out

    def unbroken(self) -> float:
        """Train to the end; return the seconds that it took."""
        began = time.monotonic()
        with self._start("unbroken", 1) as ranks:
            ranks.wait(float("inf"))
        if fault := _fault(ranks):
            kind = UserError if UserError.exit_code in ranks.codes.values() else MachineError
            raise kind(f"{self._training.command} without kills: {fault}")
        return time.monotonic() - began

    def broken(self, number: int, most: int, seconds: float, rng: random.Random, say: Say) -> BrokenRun:
        """Train to the end with at most `most` kills, the moments of which are drawn from `seconds`."""
        run = BrokenRun(self._out / f"killed-{number}")
        limit = 10 * seconds + 120
        start = 0
        while True:
            start += 1
            with self._start(run.run_dir.name, start) as ranks:
                moment = rng.uniform(0, seconds)
                everyone = list(range(self._processes))
                victims = everyone if rng.random() < 0.5 else [rng.choice(everyone)]
                if len(run.kills) < most and not ranks.wait(moment):
                    saved = newest_step(run.run_dir)
                    if killed := ranks.kill(victims):
                        run.kills.append(Kill(start, round(moment, 3), killed, saved))
                        who = f"rank {first_of([str(rank) for rank in killed])} of {run.run_dir.name}"
                        say(f"killed   {who} after {moment:.1f} s; newest checkpoint: step {saved}")
                        ranks.wait(2 * GRACE)
                        continue
                if not ranks.wait(limit):
                    run.faults.append(f"{run.run_dir}: start {start} had not ended after {limit:.0f} s")
                elif fault := _fault(ranks):
                    run.faults.append(f"{run.run_dir}: start {start}: {fault}")
                return run

    def _start(self, name: str, start: int) -> Ranks:
        words = [self._training.command, *self._training.words, *self._settings]
        words.append(as_word("run_dir", self._out / name))
        outputs = [self._out / "output" / f"{name}.{start}.rank{rank}.log" for rank in range(self._processes)]
        return Ranks(words, outputs)


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest complete checkpoint of a run that may be writing; 0 if there is none."""
    complete, _ = find_checkpoints(run_dir)
    return step_of(complete[-1]) if complete else 0


def _compared(expected: Remains, actual: Remains) -> list[str]:
    try:
        return [*differences(expected, actual), *unaccounted(actual)]
    except UserError as error:
        return [str(error)]


def _fault(ranks: Ranks) -> str:
    """Say why ranks that have ended did not end well; empty if they did."""
    failed = {rank: code for rank, code in ranks.codes.items() if code}
    if not failed:
        return ""
    lines = [line for output in ranks.outputs for line in output.read_text(errors="replace").splitlines()]
    # One rank reports; what it says is better than the codes of those that it took along.
    reasons = [found[1] for line in lines if (found := _SAID.match(line))]
    rank, code = next(iter(failed.items()))
    return reasons[-1] if reasons else f"rank {rank} ended with code {code}, see {ranks.outputs[rank]}"
