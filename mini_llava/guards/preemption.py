"""SIGTERM, SIGUSR1, SIGHUP and SIGINT, from a scheduler, a closed terminal or a person, ask a run to stop.

Before the loop a signal ends the process at once. From then on the first signal sets a flag; the ranks agree on it
(`lockstep.py`), so that all stop after the same step, and the state is saved once.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

from ..processes import end_with_parent, end_worker_with_parent, launcher
from .output_streams import flush_before_the_end, say_before_the_end

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Sent by the kernel when the launcher ends (on Linux), and never a person's second signal.
LAUNCHER_HAS_ENDED = getattr(signal, "SIGRTMIN", None)
# They stay ignored if the run was started so: nohup ignores the first, a shell's background job the second.
MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
# Not 0: a script must not start stage 2 then.
EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
# Slurm signals launcher and ranks, and the launcher passes its signal on: one request.
SECONDS_OF_ONE_REQUEST = 2
# A launcher may pass on Ctrl-C, which the terminal sends to the ranks, too; a person who presses twice means it.
SECONDS_OF_ONE_PRESS = 0.5


class Preemption:
    """Whether this process was asked to stop.

    Attributes:
        asked: it has had a signal since `heed`.
        interrupted: that signal was SIGINT, from a person, who needs no `preempted` file; the run is not to be
            restarted.
        output_dir: where a run that ends before the loop leaves its `preempted` file; None until it owns one.
    """

    def __init__(self) -> None:
        self.asked = self.interrupted = False
        self.output_dir: Path | None = None
        self._heeded, self._lock = False, threading.Lock()
        self._watched: list[int] = []

    def watch(self) -> None:
        """Receive signals in a thread.

        The main thread may be outside of Python, where no handler runs, or in a callback that swallows exceptions.
        """
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _do_nothing)
                self._watched.append(number)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=self._leave_to_parent)
        atexit.register(end_workers)
        if (parent := launcher()) is not None:
            # accelerate's launcher dies of a SIGTERM that a scheduler sends to it alone, and leaves the run an orphan.
            signal.signal(LAUNCHER_HAS_ENDED, _do_nothing)
            self._watched.append(LAUNCHER_HAS_ENDED)
            end_with_parent(LAUNCHER_HAS_ENDED, parent)

    def forget_earlier(self) -> None:
        """Remove an earlier run's `preempted` file, on one rank, before any rank calls `heed` and may leave one."""
        with self._lock:  # held by a thread that is ending this process
            marker(self.output_dir).unlink(missing_ok=True)

    def heed(self) -> None:
        """Leave it to the loop to answer signals from here on."""
        with self._lock:
            self._heeded = True

    def exit_code(self) -> int:
        """Return the exit code with which this process follows another rank that has ended: as asked to, or 1."""
        return (INTERRUPTED if self.interrupted else EXIT_CODE) if self.asked else 1

    def _listen(self) -> None:
        asked_at = 0.0
        while received := self._reader.recv(1):  # a signal's number as one byte, from Python's C handler
            number = received[0]
            if number not in self._watched:
                continue
            with self._lock:
                if not self._heeded:
                    self._end_at_once(number)
            if not self.asked:
                self.interrupted = number == signal.SIGINT
                self.asked, asked_at = True, time.monotonic()
                name = signal.Signals(number).name
                why = "The launcher of this run has ended" if number == LAUNCHER_HAS_ENDED else name
                second = "Ctrl-C" if self.interrupted else "signal"
                say_before_the_end(
                    f"{why}: the run saves its state and ends after this step or the next, this save or this batch of "
                    f"an evaluation; a second {second} ends it at once."
                )
            elif number == LAUNCHER_HAS_ENDED:
                pass  # ended by the same Ctrl-C
            elif time.monotonic() - asked_at > (SECONDS_OF_ONE_PRESS if self.interrupted else SECONDS_OF_ONE_REQUEST):
                end_workers()
                os._exit(128 + number)

    def _end_at_once(self, number: int) -> None:
        by_a_person = number == signal.SIGINT
        if self.output_dir is not None:
            if by_a_person:
                remove_marker(self.output_dir)
            else:
                with contextlib.suppress(OSError):
                    self.output_dir.mkdir(parents=True, exist_ok=True)
                    write_marker(self.output_dir)
        # One rank's message is enough.
        if os.environ.get("RANK", "0") == "0":
            by = "with its launcher" if number == LAUNCHER_HAS_ENDED else f"by {signal.Signals(number).name}"
            what = "interrupted" if by_a_person else f"ended {by}"
            say_before_the_end(
                f"train.py: {what} before the first step; --resume_from_checkpoint latest goes on from what is saved."
            )
        end_workers()
        flush_before_the_end()
        os._exit(INTERRUPTED if by_a_person else EXIT_CODE)

    def _leave_to_parent(self) -> None:
        """Ignore signals in a forked child, which would write them to the parent's socket."""
        if self._watched:
            signal.set_wakeup_fd(-1)
            ignore_signals()


def _do_nothing(*_) -> None:
    pass


def end_workers() -> None:
    """Kill the child processes: at exit Python would send a SIGTERM, which they ignore, and wait."""
    with contextlib.suppress(ValueError):  # not in the main thread, which ends the process anyway
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a worker was killed
    for worker in multiprocessing.active_children():
        worker.kill()


def marker(output_dir: Path) -> Path:
    """Return the file that tells a job script to restart the run, since launchers hide exit codes."""
    return output_dir / "preempted"


def write_marker(output_dir: Path, step: int | None = None, total_steps: int | None = None) -> None:
    """Write the file of a run that has stopped after `step`; None: before the loop."""
    marker(output_dir).write_text(json.dumps({"step": step, "total_steps": total_steps}) + "\n", encoding="utf-8")


def remove_marker(output_dir: Path) -> None:
    """Remove the file, so that a run that cannot start is not restarted for ever."""
    with contextlib.suppress(OSError):
        marker(output_dir).unlink(missing_ok=True)


def start_worker(_worker: int) -> None:
    """Let only the end of its rank end a loader's worker."""
    ignore_signals()
    end_worker_with_parent()


def ignore_signals() -> None:
    """Ignore the signals in a child: one to the whole job must not kill it while its rank finishes the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
