"""Runs iterators ahead of their consumer: one in a daemon thread, or several in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Generic, TypeVar

from esm2mega.errors import LostWorkerError
from esm2mega.processes import follow_parent

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `items`, and builds the next ones in a thread while the consumer works on the last.

    An exception inside `items` is raised by the `next` that would have returned that item.
    """

    def __init__(
        self, items: Iterator[T], ahead: int = 1, on_close: Callable[[], None] = lambda: None
    ) -> None:
        """Start the thread, which builds the first items at once.

        Args:
            items: What is built; only the thread takes from it.
            ahead: Most items that wait to be taken, at least 1.
            on_close: Ends what `items` take from, so that the thread does not wait for that; called first.
        """
        self._items, self._on_close = items, on_close
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(ahead)  # how many items the thread may still build
        self._closed = False
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._run, name="esm2mega-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._end is None:
            item = self._ready.get()
            if not isinstance(item, _End):
                self._wanted.release()
                return item
            self._end = item
        raise self._end.error

    def close(self) -> None:
        """Stop the thread, after the item that it is building; may be called twice."""
        self._closed = True
        self._end = self._end or _End(StopIteration())
        self._wanted.release()
        self._on_close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            try:
                self._ready.put(next(self._items))
            except BaseException as error:  # raised again in the consumer, StopIteration included
                self._ready.put(_End(error))
                return


class ProcessPrefetcher(Generic[T]):
    """Iterates over what several processes build, taking one item from each in turn.

    Process w of n runs `items(w)`, which yields the items number w, w + n, w + 2 n, ... It runs ahead by as
    many items as fit into its pipe, at least one. An error in a process is raised here by the `next` that
    would have returned the item.
    """

    def __init__(self, items: Callable[[int], Iterator[T]], num_processes: int) -> None:
        """Start the processes.

        Args:
            items: function that is called in each process with its number; it must be possible to pickle it.
            num_processes: number of processes that share the work, at least 1.
        """
        # Do not fork: the training process has threads (gloo, OpenMP, CUDA) whose locks a fork would copy.
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        with _signals_blocked():
            for number in range(num_processes):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_send_items,
                    args=(items, number, sender),
                    name=f"esm2mega-data-{number}",
                    daemon=True,
                )
                process.start()
                sender.close()  # the process has its own copy; once both are closed, the pipe ends
                pipes.append(receiver)
                processes.append(process)
        self._pipes, self._processes = pipes, processes
        self._turn = 0
        self._end: BaseException | None = None
        # This also runs at exit, before multiprocessing waits there for processes that wait to send.
        self._finish = Finalize(self, _finish, args=(pipes, processes), exitpriority=0)

    def __iter__(self) -> ProcessPrefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._end is not None:
            raise self._end
        try:
            item: T | _End = self._pipes[self._turn].recv()
        except (EOFError, OSError):
            self._processes[self._turn].join()
            code = self._processes[self._turn].exitcode
            item = _End(
                LostWorkerError(
                    f"data worker {self._turn} of {len(self._pipes)} died (exit code {code}); -9 means "
                    "killed, mostly for lack of memory: lower data.workers; data.workers=0 shows its error"
                )
            )
        if isinstance(item, _End):
            self._end = item.error
            raise self._end
        self._turn = (self._turn + 1) % len(self._pipes)
        return item

    def close(self) -> None:
        """End the processes; may be called twice."""
        self._end = self._end or StopIteration()
        self._finish()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep the processes started in the block from seeing the signals with which schedulers stop a job.

    They are sent to all processes. The training process acts on them, and needs its data until then.
    """
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _finish(pipes: list[Connection], processes: list[SpawnProcess]) -> None:
    # The pipes end with the processes, for a thread that reads one too, and are closed by nobody then.
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _send_items(items: Callable[[int], Iterator[T]], number: int, pipe: Connection) -> None:
    """Send items to the training process until it is gone or the items end; a process runs this alone."""
    follow_parent()
    # A closed pipe means that the training process is gone.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        iterator = None
        while True:
            try:
                iterator = iterator or items(number)
                item: T | _End = next(iterator)
            except Exception as error:  # StopIteration included
                pipe.send(_End(error))
                return
            pipe.send(item)


class _End:
    """Holds the error that the consumer raises in the place of an item."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
