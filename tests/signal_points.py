"""Marks the moments of a run of train.py while it runs, holds it in one of them, and sends it a signal there.

`mark` is called in each rank before train.py starts (`inside` of `forked_runs.start`), so that the trainer has no code
for it: the functions that a moment consists of are wrapped. Between two marks lies a part of the run, and all of them
together are the run from the first line of train.py, behind which signals are taken, to its exit.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.forked_runs import Run

FIRST_LINE, OWNS_ITS_FOLDER, LOOP = "first line", "after checks", "loop"  # it is there; it answers by itself from here
LENGTHS, TRIAL, FIRST_EVALUATION, STEP, SAVE = "length pass", "trial", "evaluation before training", "step", "save"
BEHIND = "state written behind the steps"
EVALUATION, HUNG_WORKER, RESULT, LAST_EVALUATION = "evaluation", "hung worker", "result", "evaluation after training"
TO = ("one rank", "all ranks", "all processes")
SECONDS_HELD = 1.0
STEP_OF_THE_HUNG_WORKER = 4


@dataclass(frozen=True)
class Signal:
    """Where in a run a signal is sent."""

    number: signal.Signals
    mark: str
    occurrence: int = 1
    delay: float = 0  # seconds after the mark
    rank: int | None = 0  # whose mark it is, and who gets it if only one does; None: the first that gets there
    to: str = "one rank"  # or another of `TO`

    def __str__(self) -> str:
        to = f"rank {self.rank}" if self.to == "one rank" else self.to
        return f"{self.number.name} {self.delay:.3f} s after {self.mark!r} ({self.occurrence}) to {to}"


@dataclass(frozen=True)
class Sent:
    """A signal that was sent: when, and to which ranks that had not ended."""

    seconds: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Marks:
    """What `mark` has listed of one rank: (seconds, name) each."""

    process: int
    listed: tuple[tuple[float, str], ...]

    @property
    def exit_code(self) -> int | None:
        """None if the rank runs, or was killed."""
        return next((int(name.split()[1]) for _, name in self.listed if name.startswith("exit ")), None)

    def count(self, name: str, since: float = 0, until: float = float("inf")) -> int:
        return sum(listed == name and since <= seconds <= until for seconds, listed in self.listed)

    def parts(self) -> dict[str, list[tuple[int, float]]]:
        """Of each part of the run, named by the mark that it begins with: occurrence and seconds, each time."""
        found: dict[str, list[tuple[int, float]]] = {}
        for (begins, name), (ends, _) in zip(self.listed, self.listed[1:], strict=False):
            times = found.setdefault(name, [])
            times.append((len(times) + 1, ends - begins))
        return found


def read_marks(folder: Path) -> dict[int, Marks]:
    """Of each rank that has begun."""
    found = {}
    for file in sorted(folder.glob("marks.*")):
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            process, *listed = (line.strip() for line in lines)
            pairs = (line.split(" ", 1) for line in listed)
            found[int(file.suffix[1:])] = Marks(int(process), tuple((float(seconds), name) for seconds, name in pairs))
    return found


def send(run: Run, folder: Path, where: Signal) -> Sent | None:
    """Waits for the moment and sends the signal; None if the run was over before."""
    while True:
        reached = {
            times[where.occurrence - 1]: rank
            for rank, marks in read_marks(folder).items()
            if where.rank in (rank, None)
            and len(times := [seconds for seconds, name in marks.listed if name == where.mark]) >= where.occurrence
        }
        if reached:
            break
        if run.process.exitcode is not None:
            return None
        time.sleep(0.005)
    began = min(reached)
    time.sleep(max(0.0, began + where.delay - time.monotonic()))
    processes = {rank: marks.process for rank, marks in read_marks(folder).items() if marks.exit_code is None}
    if where.to == "one rank":
        processes = {rank: process for rank, process in processes.items() if rank == reached[began]}
    others = []
    if where.to == "all processes":
        for process in processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                others += [child.pid for child in psutil.Process(process).children(recursive=True)]
    sent = Sent(time.monotonic(), tuple(processes))
    for process in (*processes.values(), *others):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, where.number)
    return sent if sent.ranks else None


def mark(folder: Path, hold: str | None = None) -> None:
    """Lists the marks of this rank in the file `marks.RANK`, and its exit code.

    hold: a mark behind which every rank waits `SECONDS_HELD` the first time. `HUNG_WORKER`: a worker of the last rank
        hangs.
    """
    _Marker(folder / f"marks.{os.environ.get('RANK', 0)}", hold).begin()


class _Marker:
    def __init__(self, listing: Path, hold: str | None):
        self.process, self.hold = os.getpid(), hold
        self.listing = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.listing, f"{self.process}\n".encode())

    def write(self, name: str) -> None:
        os.write(self.listing, f"{time.monotonic():.4f} {name}\n".encode())
        if name == self.hold:
            self.hold = None
            time.sleep(SECONDS_HELD)

    def begin(self) -> None:
        from mini_llava.data import lengths, loader
        from mini_llava.evaluation import evaluate
        from mini_llava.formats import write
        from mini_llava.guards import early, longest
        from mini_llava.guards.preemption import Preemption
        from mini_llava.saving import Saving
        from mini_llava.training import checkpoint, lockstep

        self.after(Preemption, "watch", FIRST_LINE)
        self.after(early, "check_output", OWNS_ITS_FOLDER)
        self.around(lengths, "_scan", LENGTHS)
        self.around(longest, "try_longest", TRIAL)
        self.after(Preemption, "heed", LOOP)
        self.around_steps(lockstep.Lockstep)
        self.around(Saving, "save", SAVE)
        self.around_the_thread(checkpoint.Begun)
        self.around(write, "save_whole_model", RESULT)

        original = evaluate.Evaluation.evaluate

        def marked(held_out, step, *rest):
            name = {0: FIRST_EVALUATION, held_out.total_steps: LAST_EVALUATION}.get(step, EVALUATION)
            return self.calls(original, name if held_out.questions else None, held_out, step, *rest)

        evaluate.Evaluation.evaluate = marked
        if self.hold == HUNG_WORKER and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            self.hang(loader.RankSteps, lockstep.Lockstep)

        leave = os._exit

        def leaves(code):
            if os.getpid() == self.process:
                self.write(f"exit {code}")
            leave(code)

        os._exit = leaves

    def calls(self, function, name: str | None, *arguments, **others):
        if name is None:
            return function(*arguments, **others)
        self.write(name)
        result = function(*arguments, **others)
        self.write(f"after {name}")
        return result

    def around(self, owner, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def marked(*arguments, **others):
            return self.calls(function, name, *arguments, **others)

        setattr(owner, attribute, marked)

    def after(self, owner, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def marked(*arguments):
            function(*arguments)
            self.write(name)

        setattr(owner, attribute, marked)

    def around_the_thread(self, begun: type) -> None:
        write = begun.write

        def marked(state, *arguments):
            name = None if threading.current_thread() is threading.main_thread() else BEHIND
            return self.calls(write, name, state, *arguments)

        begun.write = marked

    def around_steps(self, lockstep: type) -> None:
        """A step is what the loop does between a yield and asking whether the run ends after it."""
        steps, read, in_a_step = lockstep.steps, lockstep.read, []

        def marked_steps(agreed, loader):
            for work in steps(agreed, loader):
                in_a_step.append(True)
                self.write(STEP)
                yield work

        def marked_read(agreed):
            if in_a_step:
                in_a_step.clear()
                self.write(f"after {STEP}")
            return read(agreed)

        lockstep.steps, lockstep.read = marked_steps, marked_read

    def hang(self, rank_steps: type, lockstep: type) -> None:
        """The loader's only worker hangs in this step, having read those before; marked when the rank waits for it."""
        get, look_ahead, of_worker, of_rank = rank_steps.__getitem__, lockstep._look_ahead, [], []

        def hanging(steps, micro_batches):
            if os.getpid() != self.process:
                of_worker.append(1)
                if len(of_worker) == STEP_OF_THE_HUNG_WORKER:
                    time.sleep(3600)
            return get(steps, micro_batches)

        def waiting(*arguments):
            of_rank.append(1)
            if len(of_rank) == STEP_OF_THE_HUNG_WORKER:
                self.write(HUNG_WORKER)
            look_ahead(*arguments)

        rank_steps.__getitem__, lockstep._look_ahead = hanging, waiting
