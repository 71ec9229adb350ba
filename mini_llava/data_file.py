"""A data file that is read while a run lasts, which may be days, and must stay what it was."""

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator

from .errors import UserError
from .words import counted

CHUNK_BYTES = 16 * 2**20


def check_data_files(
    data_path: list[str] | None, image_folder: list[str] | None, exclude: list[str] | None = None, flag_prefix: str = ""
) -> None:
    """Raise FileNotFoundError, NotADirectoryError or UserError as `RecordStore` does, without reading a file."""
    image_folder = list(image_folder or [])
    data_flag, folder_flag = f"--{flag_prefix}data_path", f"--{flag_prefix}image_folder"
    if not data_path:
        raise UserError(f"No training data: give at least one file as {data_flag}.")
    if image_folder and len(image_folder) != len(data_path):
        raise UserError(
            f"{data_flag} lists {counted(len(data_path), 'file')} and {folder_flag} "
            f"{counted(len(image_folder), 'folder')}; they are matched by position, so give one folder for each file."
        )
    for folder in image_folder:
        if not os.path.isdir(folder):
            state = "is not a directory" if os.path.exists(folder) else "does not exist"
            raise NotADirectoryError(f"The image folder {folder} ({folder_flag}) {state}.")
    for path in data_path:
        if not os.path.isfile(path):
            state = "is a directory: give the file in it" if os.path.isdir(path) else "does not exist"
            raise FileNotFoundError(f"The data file {path} ({data_flag}) {state}.")
    for path in exclude or []:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The list {path} (--exclude) does not exist.")


class DataFileError(OSError):
    """A data file cannot be read any more, which ends the run, whatever `--on_bad_sample` says."""


class DataFile:
    """The bytes of a file, read by position; DataFileError once its content has changed.

    A memory map would be as fast, but a file that is truncated while it is mapped kills the process by a signal.
    Reading by position needs no offset of its own, so forked workers share the descriptor. A pickled copy opens the
    file again. A file with another time of change but the same content (`touch`, a backup put back) is accepted: it is
    read once more as a whole, which takes one or two seconds per GB, in every process that reads it.
    """

    def __init__(self, path: str, stamp: tuple[int, int] | None = None, digest: str | None = None):
        """stamp, digest: (size, time of change) and digest of the content that the file must have; None: as found."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = stamp or self._stamp_now()
        self.size = self._stamp[0]
        self._digest = digest
        if self._stamp_now() != self._stamp:
            self._accept_another_time()

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, which may lie beyond the end of the file."""
        wanted = min(end, self.size) - start
        while True:
            content = self._read_unchecked(start, wanted)
            if self._stamp_now() == self._stamp:
                break
            self._accept_another_time()
        if len(content) < wanted:
            raise self._changed()
        return content

    def chunks(self, start: int, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end`, None: to the end of the file, a chunk at a time."""
        end = self.size if end is None else end
        for position in range(start, end, CHUNK_BYTES):
            yield self.read(position, min(position + CHUNK_BYTES, end))

    def digest(self) -> str:
        """Return a digest of the content, which is read for it the first time only."""
        if self._digest is None:
            self._digest = _digest_of(self.chunks(0))
        elif self._stamp_now() != self._stamp:
            self._accept_another_time()
        return self._digest

    def identity(self) -> str:
        """Return a text that differs whenever the file does, without reading it: its path, size, times and inode."""
        status = os.fstat(self._descriptor)
        return f"{os.path.realpath(self.path)} {self._stamp} {status.st_ino} {status.st_ctime_ns}"

    def set_digest(self, digest: str) -> None:
        """Set the digest that a cache has of this very file, so that it need not be read."""
        self._digest = digest

    def _accept_another_time(self) -> None:
        """Accept the file's new time of change if size and content are the old ones; DataFileError if not."""
        stamp = self._stamp_now()  # before the content is read: what changes meanwhile has another one yet
        if stamp[0] != self.size or self._digest is None:
            raise self._changed()
        starts = range(0, self.size, CHUNK_BYTES)
        if _digest_of(self._read_unchecked(start, CHUNK_BYTES) for start in starts) != self._digest:
            raise self._changed()
        self._stamp = stamp

    def _read_unchecked(self, start: int, wanted: int) -> bytes:
        """Return `wanted` bytes, or those up to the end of the file, whether or not it has changed."""
        content = b""
        try:
            while len(content) < wanted:  # the system may give less than is asked for, 2 GiB at most
                more = os.pread(self._descriptor, wanted - len(content), start + len(content))
                if not more:
                    break
                content = content + more if content else more
        except OSError as error:
            raise self._unreadable(error) from error
        return content

    def _stamp_now(self) -> tuple[int, int]:
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise self._unreadable(error) from error
        return status.st_size, status.st_mtime_ns

    def _unreadable(self, error: OSError) -> DataFileError:
        return DataFileError(f"The data file {self.path} cannot be read any more: {error.strerror}.")

    def _changed(self) -> DataFileError:
        size = self._stamp_now()[0]
        found = (
            f"it had {counted(self.size, 'byte')} and has {size:,}" if size != self.size else "it has been written to"
        )
        return DataFileError(
            f"The data file {self.path} has changed while it was read: {found}. Its records may no longer be where "
            f"they were. Start again with a file that stays as it is; to replace one, write another and rename it."
        )

    def __reduce__(self):
        return DataFile, (self.path, self._stamp, self._digest)


def _digest_of(chunks: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
