"""Ends a command in one line when SIGTERM or SIGUSR1 comes, wherever it stands.

A training has handlers of its own while it does steps, see `esm2mega.train.signals`. Before, in imports, at
the rendezvous, while data are read and models are built, and in all other commands these count.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from esm2mega.processes import STOP_SIGNALS

_GRACE_SECONDS = 3.0
"""A process that waits outside of Python, as for other processes, gets so much time to come back."""


class Stopped(BaseException):
    """Says that a signal ends the command. No handler of errors must take it for one."""


@contextlib.contextmanager
def stopped_by_signals(end: Callable[[str], None]) -> Iterator[None]:
    """Raise `Stopped` for a signal in this block.

    Python raises nothing while other code waits, such as a rank for the others at the rendezvous. So a thread
    is told by the operating system, and ends the process if that lasts. It sleeps until then.

    Args:
        end: Takes the name of a signal and ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can have handlers
        return
    raised = threading.Event()
    names: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        raised.set()
        raise Stopped(names[-1])

    def watch(reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while told := os.read(reader, 1):
            is_ours = told[0] in STOP_SIGNALS and signal.getsignal(told[0]) is stop
            if is_ours and not raised.wait(_GRACE_SECONDS):
                end(signal.Signals(told[0]).name)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, args=(reader,), daemon=True)
    watcher.start()
    # A parent that ignores a signal, as nohup does, means it for its children too.
    ours = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in ours}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except Exception as error:
        if names:
            # What was raised, as in the middle of an import, can get lost in code that then fails otherwise.
            raise Stopped(names[0]) from error
        raise
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _in_child() -> None:
    """Let forked processes die of these signals, and not tell the thread of their parent."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if getattr(signal.getsignal(number), "__module__", None) == __name__:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)
