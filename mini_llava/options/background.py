"""A training state is written behind the steps that follow it: copied to host memory, and from there by a thread.

A 7B model's 81 GB to one disk would stop two H200s for two minutes; the copy takes seconds. While its thread writes, a
rank's main thread is in the training's collectives, with which those of another thread must not mix. So the threads of
all ranks agree through the store that these processes found each other by. LLaVA waits for every save.
"""

import contextlib
import json
import mmap
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from ..training.backend import gather_from_ranks
from ..training.checkpoint import Tensors

THREAD = "training state"
LEFT_FREE = 0.25  # of the memory that is free before, for loader workers and files
PATIENCE = timedelta(days=1)  # a rank that has died ends the others before, see `guards/liveness.py`
_in_flight: Future | None = None  # the module's, since a process runs one training at a time


class BackgroundWriter:
    """Holds memory for a copy of this rank's part of a training state, and runs the thread that writes it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.buffer: torch.Tensor | None = None
        self._store, self._token, self._gathers = None, "", 0

    def reserve(self, numel: int) -> str | None:
        """Take the memory for so many fp32 values on this rank. All ranks must call it, and get it, or none does.

        Returns a sentence if the memory of a machine does not suffice for all ranks there.
        """
        size = max(4 * numel, mmap.PAGESIZE)
        try:
            # Of the process alone: shared memory would be a file system's. None of it is taken before it is written to.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            memory = None
        mine = (socket.gethostname(), size, free_memory() if memory else 0, secrets.token_hex(8))
        everyone = gather_from_ranks(self.accelerator, mine)
        self._token = everyone[0][-1]
        for host in dict.fromkeys(host for host, *_ in everyone):
            needed = sum(size for other, size, *_ in everyone if other == host)
            free = min(free for other, _, free, _ in everyone if other == host)
            if needed > free * (1 - LEFT_FREE):
                return (
                    f"Each save will stop the run until it is written: a copy to write while the run goes on would "
                    f"take {needed / 1e9:,.3f} GB of memory on {host}, which has {free / 1e9:,.3f} GB free, and "
                    f"{LEFT_FREE:.0%} of that is to stay free."
                )
        # Large pages are faster. A fork would copy what is pinned at once: a loader's worker needs nothing of it.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(AttributeError, OSError):  # not on this system
                memory.madvise(getattr(mmap, advice))
        self.buffer = torch.frombuffer(memory, dtype=torch.float32)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(torch.Tensor.zero_, self.buffer.split(2**26)))
        if self.accelerator.device.type == "cuda":
            _pin(self.buffer)
        if self.accelerator.num_processes > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A connection of its own: one call on it at a time waits for the other ranks.
            self._store = torch.distributed.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=PATIENCE
            )
        return None

    def copied(self, tensors: Iterable[Tensors]) -> list[Tensors]:
        """Return copies of fp32 tensors in host memory, and others as they are; the host waits for the device."""
        copies, end = [], 0
        for group in tensors:
            copies.append({})
            for name, tensor in group.items():
                if tensor.is_floating_point():
                    begin, end = end, end + tensor.numel()
                    tensor = self.buffer[begin:end].copy_(tensor, non_blocking=True)
                copies[-1][name] = tensor
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def start(self, write: Callable[[], str]) -> Future:
        """Run `write` in a thread, in which ranks agree by `gather`. The one before must have ended on all ranks."""
        global _in_flight
        _in_flight = future = Future()

        def run() -> None:
            try:
                future.set_result(write())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name=THREAD, daemon=True).start()
        return future

    def gather(self, accelerator: Accelerator, mine: object) -> list:
        """Return the JSON values of all ranks, in order, as `gather_from_ranks` does; for the thread."""
        if self._store is None:
            return [mine]
        self._gathers += 1
        key = f"{self._token}/{self._gathers}"
        self._store.set(f"{key}/{accelerator.process_index}", json.dumps(mine))
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(accelerator.num_processes)]


@contextmanager
def finished_at_the_end() -> Iterator[None]:
    """When the block ends with an error, wait for the state that is being written: the work in it must not be lost.

    Ranks that wait in a collective for this one write their parts meanwhile.
    """
    try:
        yield
    except BaseException as error:
        if _in_flight is not None and not _in_flight.done():
            print(f"{type(error).__name__}: this rank ends once the last training state is written.", file=sys.stderr)
            if failure := _in_flight.exception():
                print(f"Warning: {failure}", file=sys.stderr)
        raise


def _pin(buffer: torch.Tensor) -> None:
    """Let the GPU write to this memory by itself, at several times the speed; if it may not, leave it as it is."""
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)):
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # reports the error, which a kernel of the training would report else


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take: of the machine's, and of what its control groups may have."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":  # version 2
                folder, names, prefix = "sys/fs/cgroup", ("memory.max", "memory.current"), ""
            elif "memory" in kinds.split(","):
                names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
                folder = "sys/fs/cgroup/memory"
            else:
                continue
            # Every group above counts as well; in a container the path may begin outside of it.
            inside = Path(path.lstrip("/"))
            for group in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or no limit: `max`
                    limit, used = (int((root / folder / group / name).read_text()) for name in names)
                    rows = (root / folder / group / "memory.stat").read_text().splitlines()
                    counts = dict(row.split() for row in rows)
                    files = sum(int(counts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                    free = min(free, limit - used + files)
    return max(free, 0)
