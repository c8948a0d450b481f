"""Records what is not finite in ``RUN_DIR/incidents.jsonl``, and decides what follows.

All ranks hold the same counters and reach the same decision; rank 0 writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from esm2mega.data.stream.build import StreamState
from esm2mega.data.stream.loader import PackStream
from esm2mega.errors import MachineError
from esm2mega.files import first_of
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.report.log import JsonlLog, utc_now
from esm2mega.train.step import Batch, StepResult

FILE_NAME = "incidents.jsonl"

MOST_IN_A_ROW = 3
"""So many non-finite steps in a row end a run under every policy."""

_LOWER = "lower optim.lr"

_SHOWN = 4
"""This many proteins are named in a message; the file names all of them."""


class RollBack(Exception):
    """Says that the run must go on from its last good checkpoint; the session catches it."""


@dataclass
class Incidents:
    """Holds what was not finite so far; it is saved with every checkpoint and is the same on every rank.

    Attributes:
        path: File of the records.
        policy: `train.on_nonfinite`.
        skipped: Numbers of packs that are replaced by padding, in the order of all packs.
        in_a_row: Non-finite steps since the last finite one that was not a repetition.
        last_step: Step of the last of them.
    """

    path: Path
    policy: str
    skipped: set[int] = field(default_factory=set)
    in_a_row: int = 0
    last_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain JSON values."""
        return {
            "skipped_packs": sorted(self.skipped),
            "in_a_row": self.in_a_row,
            "last_step": self.last_step,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Add what a checkpoint knows, which is nothing in those of earlier versions.

        After a roll-back this process knows more.
        """
        self.skipped |= set(saved.get("skipped_packs", ()))
        if saved.get("last_step", 0) > self.last_step:
            self.in_a_row, self.last_step = saved["in_a_row"], saved["last_step"]

    def note_finite(self, step: int) -> None:
        """Enter a finite step; one that is done again after a roll-back does not end the row."""
        if step > self.last_step:
            self.in_a_row = 0

    def note_step(
        self,
        step: int,
        result: StepResult,
        batches: Sequence[Batch],
        stream: PackStream[Any],
        before: StreamState,
        ranks: Ranks,
    ) -> str:
        """Enter a step that is not finite; all ranks call this together.

        If the loss is not finite, the packs whose loss it is are to blame, else all packs of the step.

        Args:
            step: Number of the step, from 1.
            result: What it gave.
            batches: This rank's micro-batches of the step.
            stream: The training batches, behind the step.
            before: Their state before the step.
            ranks: Where this process stands.

        Returns:
            What happened, in one line, if the step is skipped.

        Raises:
            MachineError: The run ends here.
            RollBack: It goes on from its last good checkpoint, without these packs.
        """
        # Padding, by which the last round of a step is filled up, has no number.
        mine = [batches[m].pack for m in result.suspects if batches[m].pack >= 0]
        every: list[list[int]] = [[] for _ in range(ranks.world_size)]
        # Over the world, since only the last stage of each pipeline knows the losses of its packs.
        dist.all_gather_object(every, mine)
        blamed = {number for numbers in every for number in numbers}
        what = "loss" if blamed else "gradient norm"
        value = result.metrics["loss"] if blamed else result.grad_norm
        blamed = blamed or set(range(before.consumed_packs, stream.state.consumed_packs))
        blamed -= self.skipped
        action = self._count(step)
        if not blamed and action == "rollback":
            # All packs of the step are padding: the weights are to blame, and would be so again.
            action = "stop"

        def write() -> str:
            packs = stream.contents_of(before, blamed)
            self._write(
                step,
                {
                    "kind": what,
                    "action": action,
                    "loss": _text(result.metrics["loss"]),
                    "grad_norm": _text(result.grad_norm),
                    "packs": packs,
                    "consumed_samples": stream.state.consumed_samples,
                },
            )
            numbers = first_of([str(pack["pack"]) for pack in packs], _SHOWN)
            proteins = first_of([name for pack in packs for name in pack["proteins"]], _SHOWN)
            where = f"in pack{'s' * (len(packs) > 1)} {numbers} (proteins {proteins})"
            where = where if packs else "though all packs of the step are left out"
            return f"step {step}: the {what} is {_text(value)} {where}"

        words = on_one_rank(write)
        if action == "rollback":
            self.skipped |= blamed
        cure = "lower optim.lr, or look at the proteins and set train.on_nonfinite=skip or rollback"
        return self._act(action, words, "the step is skipped", cure if self.policy == "stop" else _LOWER)

    def note_weights(self, step: int) -> None:
        """Enter a state that must not be saved; all ranks call this together.

        Raises:
            MachineError: The run ends here.
            RollBack: It goes on from its last good checkpoint.
        """
        action = self._count(step)
        # Without the update the weights cannot be mended, so there is nothing to skip.
        action = "stop" if action == "skip" else action
        on_one_rank(lambda: self._write(step, {"kind": "weights", "action": action}))
        words = f"step {step}: weights or optimizer are not finite, or give no finite loss, and are not saved"
        self._act(action, words)

    def note_evaluation(self, step: int, split: str, loss: float | None) -> str | None:
        """Enter the loss of an evaluation, which is the same on every rank; all ranks call this together.

        Returns:
            What happened, in one line, if it is not finite and the run goes on; else None.

        Raises:
            MachineError: It is not finite, and the policy is to stop.
        """
        if loss is None or math.isfinite(loss):
            return None
        # No pack of the training data is to blame, so there is nothing to go back for.
        action = "stop" if self.policy == "stop" else "continue"
        name, cure = f"{split}_loss", f"look at data.{split}, or set train.on_nonfinite=skip"
        on_one_rank(lambda: self._write(step, {"kind": name, "action": action, "loss": _text(loss)}))
        return self._act(action, f"step {step}: {name} is {_text(loss)}", "the run continues", cure)

    def _count(self, step: int) -> str:
        """Count a step that is not finite, and return what is done about it."""
        self.in_a_row, self.last_step = self.in_a_row + 1, step
        return "stop" if self.in_a_row >= MOST_IN_A_ROW else self.policy

    def _act(self, action: str, words: str, goes_on: str = "", cure: str = _LOWER) -> str:
        if action == "rollback":
            raise RollBack(f"{words}: back to the last checkpoint; see {self.path}")
        if action == "stop":
            row = f", {self.in_a_row} times in a row" if self.in_a_row > 1 else ""
            raise MachineError(f"{words}{row}; see {self.path}, and {cure}")
        return f"{words}: {goes_on}; see {self.path}"

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record, which is on the disk when this returns."""
        log = JsonlLog(self.path)
        try:
            log.write({"step": step, "time": utc_now(), "policy": self.policy, **values})
        finally:
            log.close()


def _text(value: float | None) -> str:
    """Return a number as text, since JSON has no NaN and no infinity."""
    return "none" if value is None else f"{value:g}"
