"""Ends processes with the one that started them, also if that one is killed and can end nobody.

A process that was left behind would hold its memory and its ports, and go on writing, for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

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
