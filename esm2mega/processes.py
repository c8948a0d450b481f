"""Ends processes with the one that started them, and says which signals stop one and which threads wait.

A process that was left behind, since the one that started it was killed and could end nobody, would hold its
memory and its ports, and go on writing, for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""These signals ask a command to end: a scheduler sends them before it kills."""

_NICENESS = 10
"""Training has the processors first, as beside the writing process of Megatron-Core 0.19."""

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this process of `multiprocessing` as soon as the process that wanted it has ended.

    That one need not be its parent for the system, which may be a server of forks; so a thread waits for it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="esm2mega-follow", daemon=True).start()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Let the system send this process a signal when its parent ends; elsewhere than on Linux do nothing.

    To be called in the new process: by itself, or as the ``preexec_fn`` of `subprocess.Popen`. It must have
    been started by a thread that lives as long as the parent, whose end is what the system looks at.

    Args:
        number: The signal. SIGTERM lets a training save, and torchrun end its processes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def yield_processors() -> None:
    """Let all other threads of the machine have the processors before this one, where threads can differ."""
    if sys.platform == "linux":
        # Elsewhere a priority is that of a whole process. A container may forbid even to lower it.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
