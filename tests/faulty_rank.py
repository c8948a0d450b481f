"""The command line with a rank that gets a signal in the middle of training.

``python -m tests.faulty_rank SIGNAL RANK STEP COMMAND …``: this rank sends itself the signal when it begins
this step, in the first start that torchrun makes.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest.mock import patch

from esm2mega.cli.app import main
from esm2mega.train import loop
from esm2mega.train.step import StepResult, TrainState, train_step


def run(number: signal.Signals, rank: str, step: int, arguments: list[str]) -> int:
    """Run a command in this process."""
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def faulty(state: TrainState, batches: Any) -> StepResult:
        if is_first and os.environ.get("RANK") == rank and state.schedule.num_steps == step - 1:
            os.kill(os.getpid(), number)
        return train_step(state, batches)

    with patch.object(loop, "train_step", faulty):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
