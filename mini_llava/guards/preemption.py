"""SIGTERM, SIGUSR1, SIGHUP and SIGINT as a request to stop: of a scheduler, of a terminal that is gone, of a person.

Until the loop begins, a signal ends the process at once: nothing is lost that is not on disk. From then on the first
signal sets a flag and nothing else. The ranks agree on it (`lockstep.py`), so that all of them stop after the same step
although only one of them may have been signalled, and the state is saved once.
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
# Sent by the kernel alone, and so never somebody's second signal. Not everywhere, but where a launcher can be known.
LAUNCHER_HAS_ENDED = getattr(signal, "SIGRTMIN", None)
# Ignored where whoever started the run ignores them: nohup does the one, a shell's background job the other.
MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
# Not 0: a script that runs stage 2 after stage 1 must not go on.
EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
# Slurm signals the launcher and the ranks, and the launcher passes its own signal on to the ranks: one request.
SECONDS_OF_ONE_REQUEST = 2
# A launcher may pass on what the terminal has sent to the ranks too, but a person who presses twice means it.
SECONDS_OF_ONE_PRESS = 0.5


class Preemption:
    """Whether this process was asked to stop.

    asked: it has had a signal since `heed`; interrupted: that was SIGINT, from a person, who need not be told by a
    `preempted` file and whose run nothing shall start again.
    output_dir: where a run that ends before the loop leaves its `preempted` file; None as long as it owns none.
    """

    def __init__(self) -> None:
        self.asked = self.interrupted = False
        self.output_dir: Path | None = None
        self._heeded, self._lock = False, threading.Lock()
        self._watched: list[int] = []

    def watch(self) -> None:
        """Take the signals from here on, in a thread: the main thread may wait outside of Python, where no handler
        runs, or be in a callback that swallows what a handler raises."""
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
            # accelerate's dies of the SIGTERM that a scheduler sends to it alone, and the run would go on as an orphan.
            signal.signal(LAUNCHER_HAS_ENDED, _do_nothing)
            self._watched.append(LAUNCHER_HAS_ENDED)
            end_with_parent(LAUNCHER_HAS_ENDED, parent)

    def forget_earlier(self) -> None:
        """Remove the `preempted` file of an earlier run. For one rank, long before any of them heeds: what another one
        leaves that is signalled at the same moment must stay."""
        with self._lock:  # which a thread that is ending this process keeps
            marker(self.output_dir).unlink(missing_ok=True)

    def heed(self) -> None:
        """Let the run itself answer from here on."""
        with self._lock:
            self._heeded = True

    def exit_code(self) -> int:
        """Return how this process ends with another rank: as it was asked to, if it was. One that is signalled in the
        moment before it heeds ends at once, and the others, which are asked to stop by the same signal, with it."""
        return (INTERRUPTED if self.interrupted else EXIT_CODE) if self.asked else 1

    def _listen(self) -> None:
        asked_at = 0.0
        while received := self._reader.recv(1):  # the number of a signal as one byte, from Python's handler in C
            number = received[0]
            if number not in self._watched:
                continue
            with self._lock:
                if not self._heeded:
                    self._end_at_once(number)
            if not self.asked:
                self.interrupted = number == signal.SIGINT
                self.asked, asked_at = True, time.monotonic()
                why = "The launcher of this run has ended" if number == LAUNCHER_HAS_ENDED else _name(number)
                second = "Ctrl-C" if self.interrupted else "signal"
                say_before_the_end(
                    f"{why}: once this step or the next, this save or this batch of an evaluation is done, the run "
                    f"saves its state and ends; a second {second} ends it at once."
                )
            elif number == LAUNCHER_HAS_ENDED:
                pass  # of Ctrl-C, a moment after that has asked this process
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
        # Of several ranks that a launcher has signalled, one is enough to say so.
        if os.environ.get("RANK", "0") == "0":
            what = "ended with its launcher" if number == LAUNCHER_HAS_ENDED else f"ended by {_name(number)}"
            what = "interrupted" if by_a_person else what
            say_before_the_end(
                f"train.py: {what} before the first step; --resume_from_checkpoint latest goes on from what is saved."
            )
        end_workers()
        flush_before_the_end()
        os._exit(INTERRUPTED if by_a_person else EXIT_CODE)

    def _leave_to_parent(self) -> None:
        """In a forked child, which would write to the parent's socket: a signal to the whole job is the parent's."""
        if self._watched:
            signal.set_wakeup_fd(-1)
            ignore_signals()


def _do_nothing(*_) -> None:
    pass


def _name(number: int) -> str:
    return signal.Signals(number).name


def end_workers() -> None:
    """Kill the child processes. At exit Python asks them to end by the SIGTERM that they ignore, and waits."""
    with contextlib.suppress(ValueError):  # of another thread than the main one, which ends the process anyway
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a worker was killed
    for worker in multiprocessing.active_children():
        worker.kill()


def marker(output_dir: Path) -> Path:
    """Return the file by which a job script knows that the run wants to be started again; launchers hide exit codes."""
    return output_dir / "preempted"


def write_marker(output_dir: Path, step: int | None = None, total_steps: int | None = None) -> None:
    """step: after which the run has stopped; None before the loop."""
    marker(output_dir).write_text(json.dumps({"step": step, "total_steps": total_steps}) + "\n", encoding="utf-8")


def remove_marker(output_dir: Path) -> None:
    """Of an earlier run that was started again for it: where this one ends for good before its loop, it would be so
    for ever."""
    with contextlib.suppress(OSError):
        marker(output_dir).unlink(missing_ok=True)


def start_worker(_worker: int) -> None:
    """Make the loader's worker one that ends with its rank and by nothing else."""
    ignore_signals()
    end_worker_with_parent()


def ignore_signals() -> None:
    """Ignore the signals, in a child: one to the whole job must not kill it while its rank finishes the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
