"""Processes that end with the one that started them, and a pool of such workers.

A killed run leaves nothing behind that holds memory, locks or stdout. On Linux only; elsewhere a worker whose parent
was killed lives on until somebody ends it.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

PR_SET_PDEATHSIG = 1
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun"}
LAUNCHER_MODULES = {
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "mini_llava.launch",
}


def end_with_parent(number: int, parent: int) -> None:
    """Make the kernel send this process the signal when its parent ends, or send it if the parent has ended already.

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
    """Make the kernel kill this process when its parent ends: for a pool's or a loader's worker, at its start.

    Such a worker would wait for work for ever, since its siblings hold the other ends of its pipes.
    """
    parent = multiprocessing.parent_process()
    # A fork server is the real parent of what it starts, and ends with this parent by itself.
    if parent is not None:
        forked = multiprocessing.get_start_method() != "forkserver"
        end_with_parent(signal.SIGKILL, parent.pid if forked else os.getppid())


def launched_rank() -> tuple[int, int]:
    """Return rank and number of processes from the launcher's variables, before any process group exists."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


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


class WorkerKilled(OSError):
    """One sentence about a process of a pool that the system, or somebody, has killed."""


def map_ranges(
    function: Callable[[range], object], count: int, num_workers: int, what: str, workers_flag: str = "--num_workers"
) -> Iterator:
    """Yield `function(part)` for the consecutive parts of `range(count)`, computed by forked processes, in order.

    The processes share what the function refers to (store, tokenizer); nothing is pickled but the results.

    Args:
        what: is done, for the progress bar and errors: "measuring records".
        workers_flag: the flag that `num_workers` comes from, for errors.

    Raises:
        WorkerKilled: the sentence says how far they had come.
    """
    parts = [range(start, min(start + 512, count)) for start in range(0, count, 512)]
    progress = tqdm(total=count, desc=what, unit=f" {what.split()[-1]}", delay=2, mininterval=1)

    def with_progress(results: Iterable) -> Iterator:
        for part, result in zip(parts, results, strict=True):
            progress.update(len(part))
            yield result
        progress.close()

    if num_workers > 1 and len(parts) > 1 and "fork" in multiprocessing.get_all_start_methods():
        # The tokenizer's own threads would give nothing here, and it complains when a process that used them forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        context, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
        with ProcessPoolExecutor(min(num_workers, len(parts)), context, _start_worker, (function,)) as workers:
            try:
                yield from with_progress(workers.map(_do_work, parts))
            except BrokenProcessPool:
                # The pool asks the others to end by a SIGTERM, which a run's children ignore, and would wait for ever.
                for process in set(multiprocessing.active_children()).difference(others):
                    process.kill()
                raise WorkerKilled(
                    f"A process was killed while {what}, after {progress.n:,} of {count:,}; the system's "
                    f"log (dmesg: out of memory?) may say why. Fewer {workers_flag} need less memory."
                ) from None
    else:
        yield from with_progress(map(function, parts))


def _start_worker(function: Callable[[range], object]) -> None:
    global _work
    end_worker_with_parent()
    _work = function


def _do_work(part: range) -> object:
    return _work(part)
