"""SIGTERM, SIGUSR1 and SIGINT as a wish to stop: of a scheduler that takes the machine away, of a person at Ctrl-C.

The first signal sets a flag and nothing else. The loop adds the flag to the all-reduce that every step begins with, so
that all ranks stop after the same step although only one of them may have been signalled, and no step waits for it.
"""

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Not 0: a script that runs stage 2 after stage 1 must not go on.
EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
# Slurm signals the launcher and the ranks, and the launcher passes its own signal on to the ranks: one wish, not two.
SECONDS_OF_ONE_WISH = 2
# A launcher may pass on what the terminal has sent to the ranks too, but a person who presses twice means it.
SECONDS_OF_ONE_PRESS = 0.5


class Preemption:
    """Watches for the signals from its creation until `restore`.

    asked: whether this process has had one; interrupted: whether it was SIGINT, from a person, who need not be told by
    a `preempted` file and whose run nothing shall start again.

    A thread takes them, because the main thread may wait for another rank outside of Python, where no handler runs.
    """

    def __init__(self) -> None:
        self.asked = self.interrupted = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(_end_workers)

    def _listen(self) -> None:
        asked_at = 0.0
        while received := self._reader.recv(1):  # the number of a signal as one byte, from Python's handler in C
            number = received[0]
            if number not in SIGNALS:
                continue
            if not self.asked:
                self.interrupted = number == signal.SIGINT
                self.asked, asked_at = True, time.monotonic()
                second = "a second Ctrl-C" if self.interrupted else "a second signal"
                text = f"saving after this step or the next, then ending; {second} ends it at once."
                print(f"\n{signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)
            elif time.monotonic() - asked_at > (SECONDS_OF_ONE_PRESS if self.interrupted else SECONDS_OF_ONE_WISH):
                os._exit(128 + number)

    def restore(self) -> None:
        """From here on a signal does what it did before."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()  # which ends the thread


def _do_nothing(*_) -> None:
    pass


def _end_workers() -> None:
    """At exit after an exception Python asks the loader's workers to end by the SIGTERM that they ignore, and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a worker was killed
    for worker in multiprocessing.active_children():
        worker.kill()


def marker(output_dir: Path) -> Path:
    """The file by which a job script knows that the run wants to be started again; launchers hide exit codes."""
    return output_dir / "preempted"


def write_marker(output_dir: Path, step: int, total_steps: int) -> None:
    marker(output_dir).write_text(json.dumps({"step": step, "total_steps": total_steps}) + "\n", encoding="utf-8")


def ignore_signals(_worker: int = 0) -> None:
    """For loader workers: a signal to the whole job must not kill them while their rank finishes the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
