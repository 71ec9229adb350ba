"""Files that are whole or absent: written beside their place, flushed to the disk, renamed.

LLaVA writes into place: a kill, a full disk or two processes at once leave half a file there, which is then read.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of fsync, where a file system has none
STAGING = ".unfinished"  # a folder in the directory that is written


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to, which gets its name `path` when the block ends well and is removed otherwise.

    Several processes may write one file at once: the last to finish wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.incomplete")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a folder whose files are flushed to the disk and moved into `directory` when the block ends well."""
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            flush_file(file)
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    flush_file(directory)  # the names too must be on the disk before the next file's are


def flush(descriptor: int) -> str | None:
    """Flush a file or directory to disk before this returns. Raises OSError if it fails.

    Some network file systems and FUSE's have no such operation, or none for directories. What is written there is
    written when they please: the reason is returned, and nothing is lost unless the machine goes down.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        return error.strerror
    return None


def flush_file(path: Path) -> str | None:
    """Flush a file, or the renames and new entries of a directory; return why it could not be, as `flush` does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return flush(descriptor)
    finally:
        os.close(descriptor)
