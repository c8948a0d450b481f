"""Compares what two runs of the same training left behind, bit for bit, and accounts for their samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from esm2mega.checkpoint.layout import find_checkpoints, read_state
from esm2mega.checkpoint.tensor_filter import OPTIMIZER
from esm2mega.checkpoint.tensors import TensorReader, combined_sha256, tensor_sha256
from esm2mega.errors import UserError
from esm2mega.files import first_of, shortened
from esm2mega.report.log import CLOCK, LOG_NAME, TRAIN, read_log
from esm2mega.train.incidents import FILE_NAME as INCIDENTS_NAME


@dataclass(frozen=True)
class Remains:
    """Reads what a run left behind: its log and its last checkpoint."""

    run_dir: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Return the records of the log, without what measures the machine."""
        records = read_log(self.run_dir / LOG_NAME)
        return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        complete, incomplete = find_checkpoints(self.run_dir)
        if not complete or incomplete:
            what = f"the incomplete {incomplete[0].name}" if incomplete else "no checkpoint"
            raise UserError(f"{self.run_dir}: holds {what}")
        return complete

    @cached_property
    def state(self) -> dict[str, Any]:
        """Return what the last checkpoint says about itself."""
        return read_state(self.checkpoints[-1])

    @cached_property
    def digests(self) -> dict[str, str]:
        """Return the checksum of every tensor of the last checkpoint, by name; one is in memory at a time."""
        reader = TensorReader(self.checkpoints[-1])
        return {name: tensor_sha256(reader.read(name)) for name in reader.index}

    @property
    def weights_sha256(self) -> str:
        """Return the checksum of all weights together, as `esm2mega inspect` shows it."""
        weights = [(name, value) for name, value in self.digests.items() if not name.startswith(OPTIMIZER)]
        return combined_sha256(weights)

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Return the samples in the order in which the steps used them, see `logging.samples`."""
        training = (record for record in self.records if record["kind"] == TRAIN)
        return [(sample, start) for record in training for sample, start in record["samples"]]

    @cached_property
    def left_out(self) -> list[tuple[int, int]]:
        """Return the samples of the packs that were left out by `train.on_nonfinite=rollback`."""
        skipped = self.state["incidents"]["skipped_packs"]
        if not skipped:
            return []
        # A step that was done again after a kill is recorded again.
        incidents = read_log(self.run_dir / INCIDENTS_NAME)
        packs = {pack["pack"]: pack["samples"] for record in incidents for pack in record.get("packs", ())}
        return [(sample, start) for number in skipped for sample, start in packs.get(number, ())]


def differences(expected: Remains, actual: Remains) -> Iterator[str]:
    """Say in a line each what of two runs is not the same bit by bit."""
    names = [[path.name for path in remains.checkpoints] for remains in (expected, actual)]
    if names[0] != names[1]:
        yield f"checkpoints: {first_of(names[1])} in place of {first_of(names[0])}"
    for what, is_meant in (("weights", False), ("optimizer", True)):
        mine, theirs = (
            {name: x for name, x in remains.digests.items() if name.startswith(OPTIMIZER) == is_meant}
            for remains in (actual, expected)
        )
        others = [name for name in sorted(mine | theirs) if mine.get(name) != theirs.get(name)]
        if others:
            yield f"{what}: {len(others)} of {len(theirs)} tensors differ: {first_of(others)}"
    for key in sorted(expected.state.keys() | actual.state.keys()):
        if key != "sha256" and (a := actual.state.get(key)) != (b := expected.state.get(key)):
            yield f"state: {key} is {shortened(a)} in place of {shortened(b)}"
    yield from _records(expected.records, actual.records)


def _records(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> Iterator[str]:
    if len(actual) != len(expected):
        yield f"log: {len(actual)} records in place of {len(expected)}"
    for number, (a, b) in enumerate(zip(actual, expected, strict=False), 1):
        if others := [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]:
            mine, theirs = (shortened(record.get(others[0])) for record in (a, b))
            yield f"log: record {number}: {others[0]} is {mine} in place of {theirs}"
            return


def unaccounted(remains: Remains) -> Iterator[str]:
    """Say in a line each which samples the records of a run show other than once, by the rule of the packs.

    A window of packs holds `data.pack_window` consecutive samples. So when window w is the next one, the
    steps have used every sample below ``w * pack_window``, and of window w as many pieces as its packs hold;
    ``train_state.json`` counts these as the packs are planned, and the records name what the model got, and
    what it did not get since it is not finite. The data must have no end (`train.max_epochs=null`), since the
    last window of those that do is smaller.
    """
    steps = [record["step"] for record in remains.records if record["kind"] == TRAIN]
    if steps != list(range(1, remains.state["step"] + 1)):
        yield f"log: the training records are not those of steps 1 to {remains.state['step']}, each once"
    used, data = [*remains.samples, *remains.left_out], remains.state["data"]
    twice = [piece for piece, count in Counter(used).items() if count > 1]
    if twice:
        yield f"samples: {len(twice)} were used more than once: {_shown(twice)}"
    if len(used) != (count := data["consumed_samples"]):
        yield f"samples: {len(used)} were used in place of {count}"
    window, offset = data["cursor"]["window"], data["cursor"]["offset"]
    size = data["identity"]["data.pack_window"]
    numbers = {number for number, _ in used}
    if missing := [number for number in range(window * size) if number not in numbers]:
        yield f"samples: {len(missing)} were not used: {_shown(missing)}"
    if beyond := sorted(number for number in numbers if number >= (window + (offset > 0)) * size):
        yield f"samples: {len(beyond)} do not belong to these steps: {_shown(beyond)}"


def _shown(samples: list[Any]) -> str:
    return first_of([str(sample) for sample in samples])
