"""How long training stands still for a checkpoint: one written at once, and one written in the background.

    python benchmarks/save_stall.py --size 8M --json result.json
    torchrun --nproc-per-node 2 benchmarks/save_stall.py --size 8M parallel.distributed_optimizer=true

One model is trained by the loop of `esm2mega pretrain`, first with saves at once and then in the background,
on the same packs of random residues. Reported are medians over the saves after the first of each kind, which
pays for what later ones find ready:

    step      seconds of a step while nothing is written
    begin     seconds until training goes on: checking the state, planning, copying, and writing if that is at
              once
    finish    seconds of completing the checkpoint at a later step
    slower    by how much the steps beside the writing are longer in sum, since both need processors and disk
    stall     begin + finish, as a share of a step

Further arguments are settings of the run. The disk is that of `--folder`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from esm2mega.benchmark.batches import pack, random_proteins
from esm2mega.benchmark.proteins import uniref_lengths


class Packs:
    """The same micro-batches again and again, as the loop asks for them."""

    def __init__(self, tokens: int, count: int) -> None:
        self._packs = [pack(random_proteins(uniref_lengths(tokens, seed), seed)) for seed in range(count)]
        self._next = 0
        self.state = SimpleNamespace(consumed_tokens=0)

    def next_step(self, count: int) -> list[Any]:
        """Return the micro-batches of the next step."""
        batches = []
        for _ in range(count):
            self._next += 1
            batches.append(self._packs[self._next % len(self._packs)])
            self.state.consumed_tokens += batches[-1].num_tokens
        return batches


@dataclass
class Times:
    """Seconds of every step, of those beside a save in the background, and of each half of every save."""

    alone: list[float] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)
    begin: list[float] = field(default_factory=list)
    finish: list[float] = field(default_factory=list)


def measure(run: Any, state: Any, ranks: Any, packs: Packs, folder: Path, in_background: bool) -> Times:
    """Train the steps of `run`, and take the times of the process that calls."""
    from esm2mega.checkpoint.saver import Saver
    from esm2mega.train import loop as loop_module
    from esm2mega.train.incidents import Incidents
    from esm2mega.train.loop import Hooks, LoopState, fit
    from esm2mega.train.signals import StopSignal
    from esm2mega.train.sound import is_sound

    times, train_step = Times(), loop_module.train_step
    checks: list[float] = []
    run = replace(run, checkpoint=replace(run.checkpoint, async_save=in_background))

    class Timed(Saver):
        def finish(self) -> None:
            is_there, begin = self._running is not None, time.perf_counter()
            super().finish()
            if is_there:
                times.finish.append(time.perf_counter() - begin)

    saver = Timed(in_background)

    def timed_check(probe: Any) -> bool:
        begin = time.perf_counter()
        answer = is_sound(state, probe, ranks)
        checks.append(time.perf_counter() - begin)
        return answer

    def save(loop: LoopState) -> None:
        begin, finished = time.perf_counter() - checks[-1], len(times.finish)
        saver.save(folder / f"step_{loop.step:08d}", state.model, state.optimizer, run, loop.to_dict())
        times.begin.append(time.perf_counter() - begin - sum(times.finish[finished:]))
        times.beside.append([])

    def timed_step(*arguments: Any) -> Any:
        was_writing, begin = saver.is_writing, time.perf_counter()
        result = train_step(*arguments)
        seconds = time.perf_counter() - begin
        (times.beside[-1] if was_writing else times.alone).append(seconds)
        return result

    def ignore(what: object) -> None:
        pass

    loop_module.train_step = timed_step
    try:
        hooks = Hooks(ignore, ignore, ignore, None, None, timed_check, save, saver)
        fit(
            *(run, state, packs, LoopState(), hooks, ranks),
            *(StopSignal(ranks.device), Incidents(folder / "incidents.jsonl", run.train.on_nonfinite)),
        )
    finally:
        loop_module.train_step = train_step
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="8M", help="preset of the model")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--packs", type=int, default=4, help="of a step, over all processes")
    parser.add_argument("--saves", type=int, default=4, help="of each kind, at least 3")
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, in each process")
    parser.add_argument("--folder", type=Path, default=Path(), help="directory on the disk that is measured")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options, settings = parser.parse_known_args(arguments)

    import torch

    from esm2mega.config.load import load_run
    from esm2mega.model.build import build_model
    from esm2mega.parallel.errors import on_one_rank
    from esm2mega.parallel.initialize import process_groups
    from esm2mega.train.losses import MLMLossReduction
    from esm2mega.train.optimizer import train_state

    torch.set_num_threads(options.threads)
    fixed = {
        "model.size": options.size,
        "train.micro_batch_tokens": options.tokens,
        "data.max_seq_length": min(1024, options.tokens),
        "train.global_batch_tokens": options.tokens * options.packs,
        "train.max_steps": options.saves * options.every,
        "checkpoint.save_every": options.every,
        "schedule.warmup_steps": 0,
        "schedule.name": "constant",
    }
    run = load_run(None, [*(f"{key}={value}" for key, value in fixed.items()), *settings])
    with process_groups(run.parallel, run.seed) as ranks:
        made = on_one_rank(lambda: tempfile.mkdtemp(dir=options.folder))
        chunks = build_model(run.model, run.parallel, ranks.device, run.seed)
        state = train_state(run, chunks, MLMLossReduction(), ranks, None)
        packs = Packs(options.tokens, options.packs)
        result = {}
        for name, in_background in (("at once", False), ("background", True)):
            times = measure(run, state, ranks, packs, Path(made) / name, in_background)
            step = statistics.median(times.alone[1:])
            begin, finish = statistics.median(times.begin[1:]), statistics.median(times.finish[1:])
            slower = statistics.median(sum(s - step for s in beside) for beside in times.beside[1:-1])
            result[name] = {
                "step": step,
                "begin": begin,
                "finish": finish,
                "slower": slower,
                "stall": (begin + finish) / step,
                "steps_beside": [len(beside) for beside in times.beside],
            }
        size = on_one_rank(lambda: sum(p.stat().st_size for p in (Path(made) / name).rglob("*.distcp")))
        on_one_rank(lambda: shutil.rmtree(made))
        if ranks.is_main:
            each = size // options.saves
            print(f"{options.size}, {ranks.world_size} processes, {each / 1e6:.0f} MB a checkpoint\n")
            print("| saving | step | begin | finish | slower | stall |")
            print("|---|---|---|---|---|---|")
            for name, row in result.items():
                seconds = (f"{row[key]:.3f} s" for key in ("step", "begin", "finish", "slower"))
                print(f"| {name} | {' | '.join(seconds)} | {100 * row['stall']:.1f} % |")
            if options.json:
                options.json.write_text(json.dumps({"checkpoint_bytes": each, **result}, indent=1))


if __name__ == "__main__":
    main()
