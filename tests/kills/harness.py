"""Kills commands again and again, and keeps a journal, with which a later start goes on."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.journal import read_journal
from tests.kills.cases import Case, make_inputs, resumed_step
from tests.ranks import Rank, end_ranks, start_ranks

_PR_SET_CHILD_SUBREAPER = 36
_MOST_IN_A_ROW = 4
_MOST_FAULTS = 5
_POLL = 0.002
# Seconds. A rank learns of a killed one when its connection breaks; torchrun gives it 30 to end.
_GRACE, _LONGEST = 20.0, 180.0
# Seconds in which the helpers of a killed process have to notice that it is gone.
_HELPERS = 10.0

OUTCOMES = ("equal", "unequal", "lost", "left")
"""Equal; another result; a start that failed or went on from too early; a process that was left behind."""


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make this process the parent of every descendant whose own parent ends, so that none goes unseen."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Harness:
    """Kills the commands of one folder; use it in `adopting_orphans`."""

    def __init__(self, out: Path, seed: int, say: Callable[[str], None] = print) -> None:
        """Make the inputs, and read the journal of earlier starts.

        Args:
            out: Folder of the inputs, the results, what failed, and the journal.
            seed: Seed of moments and victims; each chain of kills has a generator of its own.
            say: Prints a line.
        """
        self.out, self._seed, self._say = out, seed, say
        self.cases = {case.name: case for case in make_inputs(out / "inputs")}
        self._journal = out / "journal.jsonl"
        self.kills = read_journal(self._journal)
        self._chains = max((kill["chain"] for kill in self.kills), default=0)
        self._seconds: dict[str, float] = {}
        shutil.rmtree(out / "unbroken", ignore_errors=True)

    def run(self, count: int, names: Sequence[str] = ()) -> None:
        """Kill until the journal holds `count` kills, equally many of each case.

        Args:
            count: Number of kills in the journal, those of earlier starts included.
            names: The cases; all by default.
        """
        cases = [self.cases[name] for name in names or self.cases]
        while len(self.kills) < count:
            done = {case.name: 0 for case in cases}
            for kill in self.kills:
                if kill["case"] in done:
                    done[kill["case"]] += 1
            case = min(cases, key=lambda case: done[case.name])
            self._chain(case, min(_MOST_IN_A_ROW, count - len(self.kills)))

    def table(self) -> Iterator[str]:
        """Yield the kills of each case by outcome, in lines."""
        yield f"{'command':<18}{'kills':>7}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)
        names = [*self.cases, "all"]
        for name in names:
            found = [kill["outcome"] for kill in self.kills if name in ("all", kill["case"])]
            yield f"{name:<18}{len(found):>7}" + "".join(f"{found.count(o):>9}" for o in OUTCOMES)

    def _unbroken(self, case: Case) -> tuple[Path, float]:
        """Run a command to its end, once in this start; return its folder and the seconds it took."""
        folder = self.out / "unbroken" / case.name
        if case.name not in self._seconds:
            folder.mkdir(parents=True)
            began = time.monotonic()
            ranks, output = self._start(case, folder, "unbroken")
            _wait(ranks, _LONGEST)
            if faults := list(_failures(ranks, output)):
                raise AssertionError(f"{case.name} without kills: {faults}")
            self._seconds[case.name] = time.monotonic() - began
        return folder, self._seconds[case.name]

    def _chain(self, case: Case, most: int) -> None:
        """Kill a command up to `most` times in a row, let it finish, judge, and write the kills down."""
        expected, seconds = self._unbroken(case)
        self._chains += 1
        rng = random.Random(f"{self._seed} {self._chains}")
        most = rng.randint(1, most)
        folder = self.out / f"chain-{self._chains}"
        folder.mkdir()
        kills: list[dict[str, Any]] = []
        faults: list[tuple[str, str]] = []
        others = _descendants()
        ended = False
        while not ended and not faults:
            newest, began, is_done = case.newest_step(folder), time.monotonic(), case.is_done(folder)
            ranks, output = self._start(case, folder, str(len(kills)))
            try:
                if len(kills) < most and not _wait(ranks, moment := rng.uniform(0, seconds)):
                    how, victims = _victims(rng, case.processes)
                    if _kill(ranks, victims, how):
                        kills.append({"ranks": victims, "how": how, "after": round(moment, 4)})
                        if not _wait(ranks, _GRACE, tell=True):
                            faults.append(("lost", f"ranks had not ended {_GRACE:.0f} s after the kill"))
                    else:
                        ended = True
                else:
                    ended = True
                if ended:
                    _wait(ranks, _LONGEST)
                    failures = list(_failures(ranks, output))
                    refused = is_done and any("exists" in failure for failure in failures)
                    faults += [] if refused else [("lost", failure) for failure in failures]
                said = resumed_step((output / "rank0.err").read_text()) if case.is_training else None
                if said is not None and said < newest:
                    faults.append(("lost", f"went on from step {said}, and step {newest} was saved"))
                if left := _left_behind(others):
                    faults.append(("left", f"left behind: {left}"))
            finally:
                end_ranks(ranks)
        if not kills:  # it was faster than the first one, which met cold caches
            self._seconds[case.name] = min(seconds, time.monotonic() - began)
        if not faults:
            faults += [("unequal", difference) for difference in case.compare(expected, folder)]
        self._note(case, kills, seconds, faults)
        if not faults:
            shutil.rmtree(folder)
            shutil.rmtree(self.out / "output" / folder.name)

    def _note(
        self, case: Case, kills: list[dict[str, Any]], seconds: float, faults: list[tuple[str, str]]
    ) -> None:
        """Write the kills of a chain to the journal in one piece; its faults count for the last of them."""
        entries = []
        # A fault without a kill must not be passed over.
        kills = kills or [{"ranks": [], "how": "none"}] * bool(faults)
        for number, kill in enumerate(kills, 1):
            own = faults if number == len(kills) else []
            entry = {"case": case.name, "chain": self._chains, **kill, "of": round(seconds, 3)}
            outcome = max((outcome for outcome, _ in own), key=OUTCOMES.index, default="equal")
            entries.append({**entry, "outcome": outcome, "faults": [text for _, text in own[:_MOST_FAULTS]]})
        with self._journal.open("a") as journal:
            journal.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.kills += entries
        shown = [f"{outcome}: {text}" for outcome, text in faults[:_MOST_FAULTS]]
        outcome = "; ".join(shown) or "equal"
        self._say(f"{len(self.kills):>6} chain {self._chains}, {case.name}, {len(kills)} kills: {outcome}")

    def _start(self, case: Case, folder: Path, name: str) -> tuple[list[Rank], Path]:
        output = self.out / "output" / folder.name / name
        return start_ranks([*case.program, *case.words(folder)], case.processes, output), output


def _victims(rng: random.Random, processes: int) -> tuple[str, list[int]]:
    """Draw who is killed: all ranks or one, with the helpers in its group or without them."""
    ranks = list(range(processes)) if rng.random() < 0.5 else [rng.randrange(processes)]
    return rng.choice(["group", "process"]), ranks


def _kill(ranks: Sequence[Rank], victims: Sequence[int], how: str) -> bool:
    """Kill; return whether one of them was still running."""
    running = [ranks[number] for number in victims if ranks[number].poll() is None]
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGKILL)
    return any(process.wait(_GRACE) == -signal.SIGKILL for process in running)


def _wait(ranks: Sequence[Rank], seconds: float, tell: bool = False) -> bool:
    """Wait until all ranks have ended, at most `seconds`.

    When one has failed, the others are told to end, as by torchrun, and get `_GRACE`; at once with `tell`.
    """
    until = time.monotonic() + seconds
    told = False
    while any(process.poll() is None for process in ranks):
        if not told and (tell or any(process.poll() for process in ranks)):
            told, until = True, min(until, time.monotonic() + _GRACE)
            for process in ranks:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL)
    return True


def _failures(ranks: Sequence[Rank], output: Path) -> Iterator[str]:
    for number, process in enumerate(ranks):
        if (code := process.poll()) != 0:
            last = (output / f"rank{number}.err").read_text().strip().splitlines()[-1:]
            yield f"rank {number} ended with code {code}: {' '.join(last)}"


def _descendants() -> set[psutil.Process]:
    """Every process below this one that has not ended; those that have, and were adopted, are waited for."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def _left_behind(others: set[psutil.Process]) -> list[str]:
    """Wait until no descendant is left but `others`; name and end those that stay."""
    until = time.monotonic() + _HELPERS
    while (left := _descendants() - others) and time.monotonic() < until:
        time.sleep(_POLL)
    names = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[-200:] or process.name())
            process.kill()
    psutil.wait_procs(left, timeout=_HELPERS)
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process not in others and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
    return names
