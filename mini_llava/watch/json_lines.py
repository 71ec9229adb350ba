"""Files of one JSON object a line, appended to while a run trains and read however it ended.

LLaVA keeps such reports in memory and writes them at the end. Here a kill can tear the last line only, and a full disk
none: the part of a line that was written is removed again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..guards.never_fatal import never_fatal


def append_lines(file: Path, values: Iterable[dict]) -> None:
    """Append a line for each value; if not all can be written, leave the file unchanged and raise OSError."""
    content = "".join(json.dumps(value) + "\n" for value in values).encode("utf-8")
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def append_json_line(file: Path, values: dict) -> None:
    """Append an entry, one JSON object a line with floats to their last bit; a failure is a warning."""
    with never_fatal(f"{file} lacks entries"):
        append_lines(file, [values])


def read_lines(file: Path) -> Iterator[dict]:
    """Yield the objects of a file that may be absent; torn lines are passed over."""
    for _, value in _lines(file):
        if isinstance(value, dict):
            yield value


def truncate_lines(file: Path, keep: Callable[[dict], bool]) -> dict | None:
    """Truncate a file before its first line that is torn or not to be kept; return the last whole line it had.

    Truncation is atomic and needs no room on the disk.
    """
    end, last, is_cut = 0, None, False
    for content, value in _lines(file):
        is_cut = is_cut or not (isinstance(value, dict) and content.endswith(b"\n") and keep(value))
        if not is_cut:
            end += len(content)
        last = value if isinstance(value, dict) else last
    if is_cut:
        os.truncate(file, end)
    return last


def _lines(file: Path) -> Iterator[tuple[bytes, object]]:
    """Yield the bytes of each line, and their value or None."""
    if not file.exists():
        return
    with open(file, "rb") as lines:
        for line in lines:
            try:
                yield line, json.loads(line)
            except (ValueError, RecursionError):
                yield line, None
