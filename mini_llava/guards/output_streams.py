"""What a run prints is never worth the run: where stdout or stderr takes no more, the text is dropped.

A full disk under the file that stdout goes to, a `| tee` that has ended and a terminal that is gone make `print`, a
progress bar and Python's own flush at exit raise. A run's numbers stand in log.jsonl in any case.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable

PATIENCE = 2  # seconds for the last words of a process that ends; a pipe that nobody reads takes none


class LossyStream:
    """A text stream whose `write` and `flush` drop what the stream beneath cannot take; all else is that stream's."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def drop_what_cannot_be_printed() -> None:
    """Let nothing that is printed from here on end this process or change its exit code."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed: Python has no stream then
            stream = _stream_to_nowhere(descriptor)
        if not isinstance(stream, LossyStream):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it flushes; somebody's own stream lacks it
                stream.reconfigure(errors="backslashreplace")  # a terminal need not know every character
            setattr(sys, name, LossyStream(stream))


def _stream_to_nowhere(descriptor: int):
    try:
        os.fstat(descriptor)
    except OSError:  # the next file that is opened, a training state perhaps, would get what libraries write to it
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
    return open(os.devnull, "w")


def say_before_the_end(text: str) -> None:
    """Write a line to stderr, past the stream that the main thread may hold; wait `PATIENCE` seconds at most."""
    _in_time(lambda: os.write(2, f"\n{text}\n".encode(errors="backslashreplace")))


def flush_before_the_end() -> None:
    """Flush stdout; wait `PATIENCE` seconds at most, for the main thread may hold it."""
    _in_time(lambda: sys.stdout.flush())


def _in_time(act: Callable[[], object]) -> None:
    def run() -> None:
        with contextlib.suppress(OSError, ValueError):
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
