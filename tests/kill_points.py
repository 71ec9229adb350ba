"""Sees every file operation of a run of train.py, lists it, and ends the run by SIGKILL at a chosen one.

`watch` is called in each rank before train.py starts (`inside` of `forked_runs.start`), so that the trainer has no code
for it. Python's audit events tell of most operations before they happen; `os.fsync` and safetensors' writing, which
raise none, are wrapped. What an operation leaves on the disk is what the next one finds: killing before every
operation also covers the instant after it. Opening to read changes nothing and is left out.
"""

import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# Of the audit events with a path first, those that change something; the last argument of some is a directory.
CHANGES = {
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "shutil.rmtree": "rmtree",
    "os.truncate": "truncate",
    "os.link": "link",
    "os.symlink": "symlink",
}
IN_A_STATE = ("save", "behind")  # moments
NUMBERS = re.compile(r"[0-9a-f]{32,}|(?<=/tmp)\w{8}(?=\.)|[0-9]+")  # and names that are drawn or computed


@dataclass(frozen=True)
class Kill:
    """Where a run ends: before an operation of a rank, in the middle of its writing, or some time after it."""

    rank: int
    operation: str  # as `watch` lists it
    occurrence: int = 1
    written: float | None = None  # in the middle of its writing: how much of that is on the disk, from 0 to 1
    delay: float | None = None  # seconds after the operation
    alone: bool = False  # this rank only, instead of all processes at once

    def __str__(self) -> str:
        when = "before"
        if self.written is not None:
            when = f"{self.written:.0%} into"
        elif self.delay is not None:
            when = f"{self.delay:.3f} s after"
        return f"{when} {self.operation} ({self.occurrence}), rank {self.rank}{' alone' if self.alone else ''}"


def operations(listing: Path) -> dict[int, list[str]]:
    """What `watch` has listed, of each rank."""
    return {
        int(file.suffix[1:]): file.read_text().splitlines() for file in sorted(listing.parent.glob(listing.name + ".*"))
    }


def watch(output_dir: Path, listing: Path, kill: Kill | None) -> None:
    """Lists the operations below `output_dir`, one a line, in the file `listing.RANK`, and does as `kill` says.

    An operation is named by where it is (in a `save`; in the thread that writes `behind` the steps; elsewhere in the
    `run`), what it is, and its path, numbers as #.
    """
    rank = int(os.environ.get("RANK", 0))
    _Watch(output_dir, Path(f"{listing}.{rank}"), kill if kill is not None and kill.rank == rank else None).begin()


class _Watch:
    def __init__(self, output_dir: Path, listing: Path, kill: Kill | None):
        self.output_dir, self.kill, self.process = os.fspath(output_dir), kill, os.getpid()
        self.listing = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.moment, self.seen = "run", 0
        self.to_cut: tuple[str, int] | None = None  # the file that is being written, and how much of it is older

    def begin(self) -> None:
        import safetensors.torch

        from mini_llava.options.background import THREAD
        from mini_llava.saving import Saving

        fsync, write, save = os.fsync, safetensors.torch.serialize_file, Saving.save

        def watched_fsync(descriptor):
            self.sees("fsync", f"/proc/self/fd/{descriptor}")
            fsync(descriptor)

        def watched_write(tensors, path, metadata=None):
            self.sees("write", path)
            write(tensors, path, metadata=metadata)
            self.cuts_off()

        def watched_save(*arguments, **others):
            self.moment = "save"
            result = save(*arguments, **others)
            self.moment = "run"
            return result

        self.behind = THREAD
        os.fsync, safetensors.torch.serialize_file, Saving.save = (
            watched_fsync,
            watched_write,
            watched_save,
        )
        if self.kill is not None and self.kill.delay is not None:
            self.to_killer = self.start_killer()
        sys.addaudithook(self.hears)

    def start_killer(self) -> int:
        """Return where to write to have the run ended after the delay, by a process that none of its locks holds up.

        Started before the run, for in the middle of taking a lock filelock forbids a fork.
        """
        wakes, to_killer = os.pipe()
        if os.fork() == 0:
            os.close(to_killer)
            if os.read(wakes, 1):  # nothing if the run has ended
                time.sleep(self.kill.delay)
                if os.getppid() == self.process:
                    self.ends(self.process)
            os._exit(0)
        os.close(wakes)
        return to_killer

    def hears(self, event: str, arguments: tuple) -> None:
        """Of everything that the interpreter does: a file is opened to be written, or a directory changed."""
        if event == "open":
            path, _, flags = arguments
            # A directory is opened so for a file without a name, of which nothing can be left.
            if flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int) and not os.path.isdir(path):
                self.sees("write", path, os.path.getsize(path) if flags & os.O_APPEND and os.path.exists(path) else 0)
        elif event in CHANGES and not isinstance(arguments[0], int):  # a lock's file is emptied by its number
            directory = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
            path = os.fsdecode(arguments[0])
            self.sees(CHANGES[event], f"/proc/self/fd/{directory}/{path}" if directory not in (-1, None) else path)

    def sees(self, what: str, path, older_bytes: int = 0) -> None:
        """`older_bytes` of the file are not of this operation."""
        directory, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        # Not the last part, which may be a link that is removed; of a descriptor it is the link to the file.
        path = os.path.realpath(path) if what == "fsync" else os.path.join(os.path.realpath(directory), name)
        if os.getpid() != self.process or not f"{path}{os.sep}".startswith(self.output_dir + os.sep):
            return
        self.cuts_off()
        moment = "behind" if threading.current_thread().name == self.behind else self.moment
        name = f"{moment}: {what} {NUMBERS.sub('#', os.path.relpath(path, self.output_dir))}"
        os.write(self.listing, f"{name}\n".encode())
        if self.kill is None or name != self.kill.operation:
            return
        self.seen += 1
        if self.seen == self.kill.occurrence:
            if self.kill.written is not None:
                self.to_cut = path, older_bytes
            elif self.kill.delay is None:
                self.ends(self.process)
            else:
                os.write(self.to_killer, b"!")

    def cuts_off(self) -> None:
        """Called when the writing that began before is over: undoes some of it and ends the run."""
        if self.to_cut is not None:
            path, older_bytes = self.to_cut
            process, self.process = self.process, 0  # what follows is not the run's
            os.truncate(path, older_bytes + int(self.kill.written * (os.path.getsize(path) - older_bytes)))
            self.ends(process)

    def ends(self, process: int) -> None:
        os.write(self.listing, b"killed\n")
        if self.kill.alone:
            os.kill(process, signal.SIGKILL)
        else:
            os.killpg(0, signal.SIGKILL)
