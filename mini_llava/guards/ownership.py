"""One run owns an output directory: two would mix their logs, training states and results.

Rank 0 holds a lock on the file `.owner`, which says who it is. The kernel, or the server of a shared file system,
releases the lock when the process ends, so that a killed run blocks nobody. On a file system without locks the file's
content decides. It is a POSIX record lock, which forked loader workers do not inherit; closing another descriptor of
the file in this process would lose it. The state is the module's, since a process runs one training at a time.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

NAME = ".owner"
HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Owner(NamedTuple):
    """Who owns an output directory, as its file says."""

    host: str
    pid: int
    since: str  # ISO 8601, seconds

    def __str__(self) -> str:
        return f"the run of process {self.pid} on {self.host}, since {self.since}"

    @property
    def has_ended(self) -> bool | None:
        """Return whether its process has ended; None: it is on another host."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            # A process that began later reuses the number, as in a restarted container.
            is_another = process.create_time() > datetime.fromisoformat(self.since).timestamp() + 1
            return is_another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class _Held(NamedTuple):
    file: Path
    descriptor: int
    owner: Owner
    made_directory: bool


_held: _Held | None = None


def own(output_dir: Path) -> None:
    """Make this process the owner of an output directory, which is created, and release what it owned before.

    An owner stays one without a moment in which another run could become it.

    Raises BlockingIOError if another run owns it, before anything is written, and OSError if `.owner` cannot be opened.
    """
    global _held
    if _held is not None and _held.file.parent == output_dir and _held.owner.pid == os.getpid():
        return
    release()
    made_directory = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / NAME
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(
                f"{file}, which says whose run writes here, cannot be opened: {error.strerror}. If no run is going on "
                "there, delete it; else choose another --output_dir."
            ) from error
        try:
            _lock(descriptor, output_dir)
            if _is_named(file, descriptor):  # not removed by a run that has just ended
                owner = Owner(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(" ", "seconds"))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner._asdict()).encode() + b"\n", 0)
                _held = _Held(file, descriptor, owner, made_directory)
                return
        finally:
            if _held is None:
                os.close(descriptor)


def release() -> None:
    """Release the output directory that this process owns, if any."""
    global _held
    if _held is None:
        return
    held, _held = _held, None
    with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
        is_whose = _written_in(held.descriptor) if _is_named(held.file, held.descriptor) else None
        if is_whose == held.owner and held.owner.pid == os.getpid():  # not in a forked child
            held.file.unlink()  # before the lock is released
            if held.made_directory:
                held.file.parent.rmdir()  # if it is empty: the run was refused at once
    os.close(held.descriptor)


@contextmanager
def released_at_the_end() -> Iterator[None]:
    """Release what is owned when the block ends."""
    try:
        yield
    finally:
        release()


def check_still_owned() -> None:
    """Raise BlockingIOError if another run has taken the directory, where locks are not shared between machines."""
    if _held is None:
        return
    with contextlib.suppress(FileNotFoundError):  # removed by a person
        is_named = _is_named(_held.file, _held.descriptor)
        found = _written_in(_held.descriptor) if is_named else _parse(_held.file.read_bytes())
        if found not in (None, _held.owner):
            raise BlockingIOError(f"{_held.file.parent} is owned by {found}. End one of the two.")


def _lock(descriptor: int, output_dir: Path) -> None:
    """Lock the file. Raises BlockingIOError if another run holds it, or may hold it where there are no locks."""
    try:
        return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD_BY_ANOTHER + NO_LOCKS:
            raise
        owner, has_locks = _written_in(descriptor), error.errno in HELD_BY_ANOTHER
    if not has_locks and (owner is None or owner.has_ended):
        return
    if not has_locks and owner.has_ended is None:
        raise BlockingIOError(
            f"{output_dir} (--output_dir) was last owned by {owner}, and this file system has no locks that would tell "
            f"whether it has ended. If it has, delete {output_dir / NAME}; else choose another --output_dir."
        )
    who = owner or "a run that has not identified itself yet"
    raise BlockingIOError(f"{output_dir} (--output_dir) is owned by {who}. End it, or choose another --output_dir.")


def _is_named(file: Path, descriptor: int) -> bool:
    """Return whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _written_in(descriptor: int) -> Owner | None:
    return _parse(os.pread(descriptor, 4096, 0))


def _parse(content: bytes) -> Owner | None:
    """Return the owner; None for an empty or torn file."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None
