"""Starts processes that run many trainings, one after the other, in worlds of different sizes.

Starting a process costs seconds, most of them for importing PyTorch and Megatron-Core; a small training costs
less. So a few processes are started once, and process groups are made anew for each training. The processes
meet through a store of the process that started them, as those of torchrun do.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from esm2mega.processes import follow_parent

PRELOADED = (
    "esm2mega.finetune.run",
    "esm2mega.prove.observe",
    # Megatron-Core imports these when it builds the first model.
    "megatron.core.transformer.moe.experts",
    "megatron.core.transformer.multi_token_prediction",
    # Metrics import these when they are first computed.
    "scipy.stats",
    "sklearn.metrics",
)
"""Lists what a training imports; one process imports it, and the workers are forked from that."""

JOB_SECONDS = 900.0
"""Limits the time of one training, which takes some seconds, so that processes do not wait for ever."""


@dataclass(frozen=True)
class Job:
    """Describes one training.

    Attributes:
        overrides: Configuration of the training.
        processes: World size.
        out: Existing directory for the observations of each rank, ``rank0.pt`` and so on.
        code: A user's own code in the training, as the option ``--code`` names it; empty for none.
    """

    overrides: tuple[str, ...]
    processes: int
    out: Path
    code: str = ""


Serve = Callable[[Connection, Path], None]
"""Does the work of a process until its connection closes; it gets that and a file for its output."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    log: Path


@dataclass
class _Running:
    number: int
    workers: list[_Worker]
    deadline: float
    store: TCPStore
    waiting: list[_Worker] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Workers:
    """Runs trainings in a fixed number of processes; use it as a context, which starts and ends them."""

    def __init__(self, count: int, folder: Path, serve: Serve | None = None) -> None:
        """Prepare to start the processes.

        Args:
            count: Number of processes, which is the largest world size.
            folder: Directory for their output.
            serve: Module-level function that every process runs; None for `serve` of this module.
        """
        self.count = count
        self._serve = serve or globals()["serve"]
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._started = 0
        self._idle: list[_Worker] = []

    def __enter__(self) -> Workers:
        self._idle = [self._start() for _ in range(self.count)]
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._idle:
            worker.connection.close()
        for worker in self._idle:
            _end(worker, grace=5.0)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        """Run trainings, as many at a time as there are processes for.

        Args:
            jobs: The trainings, none of which needs more than the number of processes.

        Yields:
            The number in `jobs` of each training as it ends, with None or why it failed.
        """
        waiting = list(range(len(jobs)))
        running: list[_Running] = []
        try:
            while waiting or running:
                while fitting := [n for n in waiting if jobs[n].processes <= len(self._idle)]:
                    waiting.remove(fitting[0])
                    running.append(self._begin(fitting[0], jobs[fitting[0]]))
                for ended in self._advance(running):
                    running.remove(ended)
                    workers = [self._replace(w) for w in ended.workers] if ended.errors else ended.workers
                    # Workers that have trained before come first: they have touched what a training needs.
                    self._idle = [*workers, *self._idle]
                    yield ended.number, "; ".join(ended.errors) or None
        finally:
            # The caller left before the end, so nobody waits for these trainings any more.
            for job in running:
                for worker in job.workers:
                    _end(worker)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        log = self._folder / f"worker{self._started}.log"
        self._started += 1
        # A daemonic process could not start processes of its own, such as those that build batches.
        process = self._context.Process(target=self._serve, args=(theirs, log), daemon=False)
        with _environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"):
            process.start()
        theirs.close()
        return _Worker(process, ours, log)

    def _replace(self, worker: _Worker) -> _Worker:
        """Start a new process for one that failed, since nobody knows what that one still holds."""
        _end(worker)
        return self._start()

    def _begin(self, number: int, job: Job) -> _Running:
        workers, self._idle = self._idle[: job.processes], self._idle[job.processes :]
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, worker in enumerate(workers):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            worker.connection.send((job, rank, environment))
        return _Running(number, workers, time.monotonic() + JOB_SECONDS, store, list(workers))

    def _advance(self, running: list[_Running]) -> list[_Running]:
        """Wait for reports, take them, and return the trainings that ended."""
        seconds = max(0.0, min(job.deadline for job in running) - time.monotonic())
        ready = wait([w.connection for job in running for w in job.waiting], timeout=seconds)
        for job in running:
            for worker in [w for w in job.waiting if w.connection in ready]:
                job.waiting.remove(worker)
                try:
                    error = worker.connection.recv()
                except (EOFError, OSError):
                    error = f"the process ended: {_last_line(worker.log)}"
                if error is not None:
                    job.errors.append(error)
                    # The others may wait for this one for ever.
                    job.deadline = min(job.deadline, time.monotonic() + 5.0)
            if job.waiting and time.monotonic() >= job.deadline:
                job.errors = job.errors or [f"did not end within {JOB_SECONDS:.0f} s"]
                job.waiting = []
        return [job for job in running if not job.waiting]


def serve(connection: Connection, log: Path) -> None:
    """Run the jobs that come through `connection`, and write the output of the trainings to `log`."""
    serve_with(connection, log, train)


def serve_with(connection: Connection, log: Path, run_job: Callable[[Job, int], None]) -> None:
    """Serve as `serve` does, with `run_job` in place of `train`; it gets the job and the rank."""
    # In a process group of its own, what a training starts can be ended with this process, and Ctrl-C reaches
    # only the process that started it.
    os.setpgrp()
    follow_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A search for garbage would copy the memory that the processes share.
    gc.freeze()
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            job, rank, environment = connection.recv()
            with _environment(**environment):
                error = None
                try:
                    run_job(job, rank)
                except BaseException as failure:
                    traceback.print_exc()
                    error = f"rank {rank}: {type(failure).__name__}: {' '.join(str(failure).split())}"
            connection.send(error)


def train(job: Job, rank: int) -> None:
    """Train as a command would, and write what this rank observed."""
    from esm2mega.config.load import load_run
    from esm2mega.config.validate import check_training_inputs, validate
    from esm2mega.finetune.code_option import load_code
    from esm2mega.finetune.run import UserParts, finetune
    from esm2mega.prove.observe import Observer
    from esm2mega.train.pretrain import pretrain

    run = load_run(None, job.overrides)
    validate(run, job.processes)
    check_training_inputs(run)
    observer = Observer()
    if run.task.kind is None:
        pretrain(run, observer)
    else:
        parts = UserParts(code=load_code([job.code] if job.code else []))
        finetune(run, parts, on_gradients=observer)
    observer.save(job.out / f"rank{rank}.pt")


def _end(worker: _Worker, grace: float = 0.0) -> None:
    worker.connection.close()
    worker.process.join(grace)
    if worker.process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        # A process that has just begun is not in a group of its own yet.
        worker.process.kill()
        worker.process.join()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
