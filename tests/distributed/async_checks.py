"""Two ranks save the same state at once and in the background, at one layout after another.

Arguments: a directory; for each layout the port at which its ranks meet, a name and settings: PORT/NAME/A,B.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from esm2mega.checkpoint import saver
from esm2mega.checkpoint.saver import Saver
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.step import train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

BATCHES = [
    packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23}),
    packed_batch([[0, 9, 11, 2], [0, 2]], {1: 6, 2: 7, 4: 4}),
]


def save_both(folder: Path, settings: list[str]) -> None:
    run = tiny_run(*settings)
    with process_groups(run.parallel, seed=1):
        state = train_state(run)
        for _ in range(2):
            train_step(state, BATCHES)
        what = (state.model, state.optimizer, run, {"step": 2})
        Saver().save(folder / "sync" / "step_00000002", *what)
        stepped = threading.Event()
        work = saver._work

        def wait_then_work(*arguments: Any) -> None:
            assert stepped.wait(60)
            work(*arguments)

        saver._work = wait_then_work
        background = Saver(in_background=True)
        background.save(folder / "async" / "step_00000002", *what)
        saver._work = work
        assert background.is_writing
        train_step(state, BATCHES)
        stepped.set()
        background.finish()
        assert not background.is_writing
        # The step between has changed everything, which a later save shows.
        Saver().save(folder / "later" / "step_00000002", *what)


if __name__ == "__main__":
    for layout in sys.argv[2:]:
        os.environ["MASTER_PORT"], name, settings = layout.split("/", 2)
        save_both(Path(sys.argv[1], name), settings.split(","))
