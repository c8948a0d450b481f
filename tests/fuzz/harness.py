"""Changes inputs one after the other, runs commands on them, judges, and keeps a journal to go on with."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm2mega.convert.formats.registry import READABLE
from esm2mega.files import replacing
from tests import warm
from tests.fuzz.mutations import mutate, rot
from tests.fuzz.subjects import CRC, OURS, PLAIN, Subject, Words, subjects
from tests.journal import read_journal

IMPORTED = [
    *(f"esm2mega.convert.formats.{module}" for module in READABLE.values()),
    "esm2mega.autoeval.compare",
    "esm2mega.convert.verify.verify",
    "esm2mega.drill.compare",
    "esm2mega.finetune.run",
    "esm2mega.infer.score",
    "esm2mega.inspect",
    "esm2mega.report.plot",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "scipy.stats",
    "sklearn.metrics",
    "transformers.models.esm.modeling_esm",
    "Bio.SeqIO",
]
"""What the commands import when they need it, which would take most of the time of an input."""

HANG_SECONDS = 60.0
GROWTH_BYTES = 1 << 30
"""Limits for a command on a small input: it takes a second at most, and some ten MB."""

OUTCOMES = ("refused", "accepted", "silent", "traceback", "internal", "hang", "memory", "other")
"""The first two are right: one line, or numbers that are those of the file. All others are faults."""

_SAID = re.compile(r"^esm2mega: (?:\[rank \d+\] )?(?:error|stopped|internal error)", re.MULTILINE)


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int | None
    seconds: float
    out: str
    err: str
    report: dict[str, Any] | None


class Harness:
    """Changes the inputs of one folder, which it makes unless they are there."""

    def __init__(self, out: Path, seed: int, say: Callable[[str], None] = print) -> None:
        """Make the inputs, and read the journal of earlier starts.

        Args:
            out: Folder of the inputs, the journal, and the inputs that met a fault.
            seed: Seed of everything that is drawn; each input has a generator of its own.
            say: Prints a line.
        """
        self.out, self._seed, self._say = out.resolve(), seed, say
        inputs = self.out / "inputs"
        if not (self.out / "made").exists():
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir(parents=True)
            code = (
                f"from pathlib import Path; from tests.fuzz.inputs import make; make(Path({str(inputs)!r}))"
            )
            made = warm.run(["-c", code], timeout=600)
            if made.returncode:
                raise AssertionError(made.stderr)
            (self.out / "made").touch()
        # The first process waits for all imports, which is no fault of the first input.
        warm.run(["-c", "pass"], timeout=600)
        self.subjects = subjects(inputs)
        self._journal = self.out / "journal.jsonl"
        self.entries = read_journal(self._journal)
        self._sound: dict[tuple[str, Words], Ran] = {}

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["outcome"] not in OUTCOMES[:2]]

    def run(self, count: int, only_rot: bool, names: Sequence[str] = ()) -> None:
        """Go on until the journal holds `count` inputs, as many of each subject; repeat what met a fault.

        Args:
            count: Number of inputs in the journal, those of earlier starts included.
            only_rot: Whether each change is one flipped bit, of a file that keeps some number.
            names: The subjects; all by default.
        """
        found = [s for s in self.subjects if not names or s.name in names]
        if only_rot:
            found = [s for s in found if s.rule != PLAIN or s.witness or "--verify" in s.commands[0]]
        for entry in self.faults:
            subject = next(s for s in self.subjects if s.name == entry["subject"])
            again = self.input(entry["number"], subject, entry["rot"])
            self.entries[self.entries.index(entry)] = again
            self._report(again)
            with replacing(self._journal) as partial:
                partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        while len(self.entries) < count:
            number = len(self.entries)
            self._note(self.input(number, found[number % len(found)], only_rot))

    def input(self, number: int, subject: Subject, only_rot: bool) -> dict[str, Any]:
        """Make, read and judge the input of a number; return its entry of the journal."""
        rng = random.Random(f"{self._seed} {number}")
        words = rng.choice(subject.commands)
        case, it = self._fresh(subject)
        path, how = (rot if only_rot else mutate)(rng, it, subject.files)
        name = path.relative_to(case / "it").as_posix()
        is_told = only_rot or subject.rule == OURS
        ran = self._run(case, it, words, subject.witness if is_told else None)
        outcome, what = self._judge(ran)
        if outcome in OUTCOMES[:2] and (strays := self._strays(case)):
            outcome, what = "other", f"wrote {strays}"
        if outcome == "accepted" and self._must_be_equal(subject, name, how):
            changed = case.rename(self.out / "changed")
            if other := _difference(self._run_sound(subject, words), ran):
                outcome, what = "silent", other
            shutil.rmtree(case, ignore_errors=True)
            changed.rename(case)
        if outcome not in OUTCOMES[:2]:
            kept = self.out / "faults" / f"{number}-{subject.name}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(case, kept, symlinks=True)
        grown = ran.report["grown"] >> 20 if ran.report else None
        return {
            "number": number,
            "rot": only_rot,
            "subject": subject.name,
            "command": " ".join(words[:2] if words[0] in ("lora", "prepare") else words[:1]),
            "file": name,
            "change": how,
            "code": ran.code,
            "seconds": round(ran.seconds, 2),
            "mib": grown,
            "outcome": outcome,
            "what": what,
        }

    def sound(self) -> None:
        """Run every command on its sound input: the refusal of a changed one proves something only then."""
        for subject in self.subjects:
            for words in subject.commands:
                self._run_sound(subject, words)

    def table(self) -> Iterator[str]:
        """Yield the outcomes for each subject, in lines."""
        yield f"{'input':<24}{'count':>7}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES)
        for name in [*dict.fromkeys(entry["subject"] for entry in self.entries), "all"]:
            found = [entry["outcome"] for entry in self.entries if name in ("all", entry["subject"])]
            yield f"{name:<24}{len(found):>7}" + "".join(f"{found.count(o):>11}" for o in OUTCOMES)

    def _fresh(self, subject: Subject) -> tuple[Path, Path]:
        """Copy the sound input to where it is changed; every command sees the same paths."""
        case = self.out / "case"
        shutil.rmtree(case, ignore_errors=True)
        (case / "it").mkdir(parents=True)
        (case / "out").mkdir()
        # Of the cache the cases share the compiled kernels, which take seconds.
        kernels = self.out / "kernels"
        kernels.mkdir(exist_ok=True)
        (case / "cache/esm2mega").mkdir(parents=True)
        (case / "cache/esm2mega/kernels").symlink_to(kernels)
        it = case / "it" / subject.path.name
        if subject.path.is_dir():
            shutil.copytree(subject.path, it)
        else:
            shutil.copyfile(subject.path, it)
        if subject.witness == "hdf5":
            shutil.copyfile(subject.path, case / "sound.h5")
        return case, it

    def _run_sound(self, subject: Subject, words: Words) -> Ran:
        """Run a command on the sound input, once in this start; it must end well."""
        key = (subject.name, words)
        if key not in self._sound:
            case, it = self._fresh(subject)
            ran = self._run(case, it, words, subject.witness)
            if ran.code != 0 or ran.report is None or ran.report["witness"]:
                raise AssertionError(f"{subject.name}: {words[:3]} without a change: {ran}")
            self._sound[key] = ran
        return self._sound[key]

    def _run(self, case: Path, it: Path, words: Words, witness: str | None) -> Ran:
        place = {"it": str(it), "out": str(case / "out")}
        request = {
            "words": [word.format(**place) if "{" in word else word for word in words],
            "it": str(it),
            "out": str(
                it if any(word.startswith(("{it}/x.h5", "run_dir={it}")) for word in words) else case / "out"
            ),
            "witness": witness,
            "bytes": GROWTH_BYTES,
            "report": str(case / "report.json"),
        }
        (case / "request.json").write_text(json.dumps(request))
        environment = {**os.environ, "HOME": str(case / "home"), "XDG_CACHE_HOME": str(case / "cache")}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        out, err = case / "stdout", case / "stderr"
        program = ["-m", "tests.fuzz.program", str(case / "request.json")]
        began = time.monotonic()
        process = warm.start(program, out, err, environment, case)
        try:
            code: int | None = process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        seconds = time.monotonic() - began
        report = case / "report.json"
        texts = [path.read_text(errors="replace") for path in (out, err)]
        return Ran(code, seconds, *texts, json.loads(report.read_text()) if report.exists() else None)

    @staticmethod
    def _judge(ran: Ran) -> tuple[str, str]:
        """Return the outcome by the command and its witness alone, and what was wrong or said."""
        last = ran.err.strip().splitlines()[-1:] or [""]
        if ran.code is None:
            return "hang", f"still running after {HANG_SECONDS:.0f} s"
        if "MemoryError" in ran.err or "allocate" in ran.err:
            return "memory", last[0]
        if "Traceback" in ran.err:
            return "traceback", last[0]
        if "internal error" in ran.err:
            return "internal", last[0]
        if ran.report is None or ran.code not in (0, 1, 2):
            return "other", f"ended with {ran.code}: {last[0]}"
        if ran.code:
            lines = len(_SAID.findall(ran.err))
            return ("refused", last[0]) if lines == 1 else ("other", f"{lines} errors: {ran.err[-300:]}")
        if ran.report["witness"]:
            return "silent", "; ".join(ran.report["witness"])
        return "accepted", ""

    @staticmethod
    def _must_be_equal(subject: Subject, name: str, how: str) -> bool:
        if subject.rule == OURS:
            return True
        covered = not any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in subject.uncovered)
        # What stands in a changed archive with the right CRC is another file, and may be accepted; so may
        # another stream behind a compressed one.
        return subject.rule == CRC and covered and not how.startswith(("structure", "file", "appended"))

    @staticmethod
    def _strays(case: Path) -> list[str]:
        known = {"it", "out", "home", "cache", "stdout", "stderr", "request.json", "report.json", "sound.h5"}
        return sorted(path.name for path in case.iterdir() if path.name not in known)

    def _note(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        with self._journal.open("a") as journal:
            journal.write(json.dumps(entry) + "\n")
        self._report(entry)

    def _report(self, entry: dict[str, Any]) -> None:
        if entry["outcome"] not in OUTCOMES[:2]:
            self._say(" ".join(f"{entry[key]}" for key in ("number", "subject", "command", "file", "change")))
            self._say(f"       {entry['outcome']}: {entry['what'][:400]}")


def _difference(sound: Ran, ran: Ran) -> str:
    """Say which results are others than those of the sound input."""
    assert sound.report is not None and ran.report is not None
    ours, theirs = ran.report["result"], sound.report["result"]
    if others := [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]:
        return f"other results: {others[:5]}"
    if not theirs and _numbers(ran.out) != _numbers(sound.out):
        return "another text on stdout"
    return ""


def _numbers(text: str) -> str:
    """Return what a command said, without times, and without the line that a manifest lacks its checksum."""
    text = re.sub(r"^its manifest .* has no checksum of its own\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\d+(\.\d+)? s\b", "", text)
