"""Files of one JSON object a line, written while a run goes on and read after whatever ended it.

LLaVA keeps such reports in memory and writes them at the end. Here each line is appended at once: a kill can tear the
last line only, a full disk none, because what it let through of a line is cut off again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def append_lines(file: Path, values: Iterable[dict]) -> None:
    """Appends a line for each value, all of them or none. Raises OSError, the file being as it was before."""
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


def read_lines(file: Path) -> Iterator[dict]:
    """The objects of a file that may be absent; what is no whole line of JSON, as a kill leaves it, is passed over."""
    for _, value in _lines(file):
        if isinstance(value, dict):
            yield value


def cut_after(file: Path, keep: Callable[[dict], bool] = lambda value: True) -> dict | None:
    """Cuts a file before its first line that is torn or that `keep` refuses; returns the last whole line it had.

    Shortening a file happens at once or not at all, and needs no room on the disk.
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
    """The bytes of each line, and their value or None."""
    if not file.exists():
        return
    with open(file, "rb") as lines:
        for line in lines:
            try:
                yield line, json.loads(line)
            except (ValueError, RecursionError):
                yield line, None
