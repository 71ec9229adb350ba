"""Processes end with the one that started them: a killed run leaves nothing behind that holds memory, locks or stdout.

On Linux only. Elsewhere a worker whose parent was killed lives on until somebody ends it.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
LAUNCHER_MODULES = {
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "mini_llava.launch",
}


def end_with_parent(number: int, parent: int) -> None:
    """Have the kernel send this process the signal when its parent ends, or send it if the parent has ended already.

    The kernel means the thread that started this process: to be used where that is one which lives as long as the
    parent, mostly the main one.

    Args:
        parent: its process id, known before it can have ended.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_worker_with_parent() -> None:
    """Be killed when the parent ends: for a pool's or a loader's worker, at its start.

    Such a worker would wait for work for ever, since its siblings hold the other ends of its pipes.
    """
    parent = multiprocessing.parent_process()
    # A fork server is the real parent of what it starts, and ends with this parent by itself.
    if parent is not None:
        forked = multiprocessing.get_start_method() != "forkserver"
        end_with_parent(signal.SIGKILL, parent.pid if forked else os.getppid())


def launcher() -> int | None:
    """Return the id of the parent process if that is accelerate's, torchrun's or our launcher, by its command line."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # not Linux, or it has ended
        return None
    for before, word in itertools.pairwise(["", *words]):
        if before == "-m":
            return parent if word in LAUNCHER_MODULES else None
        if Path(word).name in LAUNCHERS:
            return parent
        if word.endswith(".py"):  # a program of somebody's own; what follows are its arguments
            return None
    return None
