"""Training runs that are killed and signalled again and again, and must end as if they had not been.

    python tests/end_to_end/crash_loop.py --kills 100 --signals 100

Every run is train.py itself on tiny models with dropout, on one process or on two under ZeRO-3, with and without
held-out records. It is ended by SIGKILL at random instants and at every file operation of a save in turn, those of the
thread that writes behind the steps included, in the middle of the writing too; and by SIGTERM, SIGUSR1, SIGHUP, SIGINT
and SIGKILL, to one rank, to all, or to all processes with the loader's workers, at instants spread over all parts of a
run from its first line to its last. Each time it is started again with the same command line,
`--resume_from_checkpoint latest`. Losses and gradient norms (as hex), what evaluations found, final weights, and the
newest checkpoint must be those of a run that nobody killed, to the last bit; exit codes, the file `preempted` and the
state that a signal leaves are checked, too. One line for each run, then a summary; ends with 1 if a run differs.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.end_to_end.runs import FIXTURES, held_out_flags  # noqa: E402  known from here on when this is the program
from tests.forked_runs import start  # noqa: E402
from tests.kill_points import IN_A_STATE, Kill, operations, watch  # noqa: E402
from tests.signal_points import LOOP, OWNS_ITS_FOLDER, STEP, TO, Marks, Sent, Signal, mark, read_marks, send  # noqa: E402

STEPS = 6
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
LOST_RANK_GRACE = 2.0  # seconds that the ranks around a killed one get; launchers give 30


@dataclass(frozen=True)
class Kind:
    """Where a run trains, and how it saves."""

    config: str | None
    processes: int
    save_steps: int
    save_total_limit: int | None
    workers: int = 0
    evaluated: bool = False  # before, in the middle and after

    def __str__(self) -> str:
        kept = "all" if self.save_total_limit is None else self.save_total_limit
        return f"{self.where()}, a save every {self.save_steps}, {kept} kept{', evaluated' * self.evaluated}"

    def where(self) -> str:
        return "one process" if self.config is None else f"{self.config} on {self.processes}"

    def flags(self, language_model: Path, held_out: dict, output_dir: Path) -> list[str]:
        values = {
            "stage": 2,
            "model_name_or_path": language_model,
            "vision_tower": FIXTURES / "clip",
            "data_path": FIXTURES / "data" / "train_stage2.json",
            "image_folder": FIXTURES / "data" / "images",
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "save_steps": self.save_steps,
            "dataloader_num_workers": self.workers,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
            "output_dir": output_dir,
        }
        if self.save_total_limit is not None:
            values["save_total_limit"] = self.save_total_limit
        if self.evaluated:
            values |= held_out | {"eval_steps": 3}
        lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        return [str(text) for name, value in lists.items() for text in (f"--{name}", *value)]


GROUPS = {
    "one": (Kind(None, 1, 1, 1), Kind(None, 1, 1, 2, workers=2), Kind(None, 1, 2, None)),
    "two": (Kind("zero3", 2, 1, 1), Kind("zero3", 2, 2, None)),
}
SIGNALLED = {
    "one": (Kind(None, 1, 2, 1, workers=2, evaluated=True), Kind(None, 1, 2, None)),
    "two": (Kind("zero3", 2, 2, 1, workers=1, evaluated=True), Kind("zero3", 2, 2, None)),
}


def language_model_with_dropout(folder: Path) -> Path:
    """The golden language model; with dropout the random states have to be restored as well."""
    copy = Path(shutil.copytree(FIXTURES / "llm", folder / "language_model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return copy


# --- what a run leaves -----------------------------------------------------------------------------------------------


def log(output_dir: Path) -> list[dict]:
    file = output_dir / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off by a kill


def losses(output_dir: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm as hex, of every line of the log."""
    entries = [entry for entry in log(output_dir) if "loss" in entry]
    return [(entry["step"], entry["loss"].hex(), entry["gradient_norm"].hex()) for entry in entries]


def evaluations(output_dir: Path) -> list[dict]:
    """What the log has of them but the time that they took."""
    entries = [entry for entry in log(output_dir) if "eval/loss" in entry]
    return [{name: value for name, value in entry.items() if name != "eval/seconds"} for entry in entries]


def complete_checkpoints(output_dir: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in output_dir.glob("checkpoint-*/manifest.json"))


def result(output_dir: Path, asked_for: Collection[int] = ()) -> dict:
    """All that must not depend on kills.

    asked_for: steps whose states signals asked for, which are kept beside the others where all are kept.
    """
    files = [path for path in output_dir.iterdir() if path.suffix in (".safetensors", ".bin")]
    newest = complete_checkpoints(output_dir)[-1]
    files += (output_dir / f"checkpoint-{newest}").glob("*.safetensors")
    others = {"log.jsonl", "arguments.yaml", *(f"checkpoint-{step}" for step in asked_for)}
    names = sorted(path.name for path in output_dir.iterdir() if path.name not in others)
    return {
        "losses": losses(output_dir),  # also none twice, though steps were taken again after a kill
        "evaluations": evaluations(output_dir),
        "weights": {str(file.relative_to(output_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "names": names,  # nothing half-written is left over, and as many checkpoints as were asked for
    }


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One start of a run, until nothing of it runs any more."""

    code: int
    printed: str
    operations: dict[int, list[str]]
    marks: dict[int, Marks]
    sent: Sent | None  # the signal

    @property
    def was_killed(self) -> bool:
        return any("killed" in names for names in self.operations.values())


@dataclass
class Outcome:
    kind: Kind
    stops: list[Kill | Signal] = field(default_factory=list)  # those that happened
    resumed_from: list[int | None] = field(default_factory=list)  # after each stop; None: stopped before it said so
    fault: str = ""

    def __str__(self) -> str:
        ends = [f"{stop}; resumed from {step}" for stop, step in zip(self.stops, self.resumed_from, strict=False)]
        return f"{self.kind}: {'stopped ' * bool(ends)}{', '.join(ends) or 'not stopped'}: {self.fault or 'ok'}"


@dataclass
class Crashes:
    """A folder of runs, and what uninterrupted ones give."""

    folder: Path
    random: random.Random
    uninterrupted: dict[Kind, dict] = field(default_factory=dict)
    operations: dict[Kind, dict[int, list[str]]] = field(default_factory=dict)
    marks: dict[Kind, dict[int, Marks]] = field(default_factory=dict)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.given = language_model_with_dropout(self.folder), held_out_flags(self.folder)
        self.numbers = itertools.count(1)

    def train(self, kind: Kind, output_dir: Path, stop: Kill | Signal | None, hold: str | None = None) -> Attempt:
        """Starts train.py and waits until nothing of it runs any more.

        hold: a mark behind which it waits, see `signal_points.mark`.

        Raises:
            AssertionError: it failed by itself.
            TimeoutError: it hung.
        """
        folder = self.folder / f"attempt {next(self.numbers)}"
        folder.mkdir()
        kill, signalled = (stop, None) if isinstance(stop, Kill) else (None, stop)
        run = start(
            kind.flags(*self.given, output_dir),
            folder / "printed.txt",
            kind.config,
            kind.processes,
            inside=functools.partial(_inside, output_dir, folder, kill, hold),
        )
        sent = signalled and send(run, folder, signalled)
        code = run.wait()
        run.wait_until_all_have_ended(LOST_RANK_GRACE)
        attempt = Attempt(code, run.text, operations(folder / "operations"), read_marks(folder), sent)
        assert code == 0 or attempt.was_killed or sent, f"it ended with {code} by itself:\n{run.text[-5000:]}"
        shutil.rmtree(folder)
        return attempt

    def train_uninterrupted(self, kind: Kind) -> None:
        """Before the others of its kind, which choose among its operations and are compared with its result."""
        output_dir = self.folder / f"uninterrupted {next(self.numbers)}"
        attempt = self.train(kind, output_dir, None)
        self.operations[kind], self.marks[kind] = attempt.operations, attempt.marks
        self.uninterrupted[kind] = result(output_dir)

    def crash(self, kind: Kind, stops: list[Kill | Signal]) -> Outcome:
        """Trains with these kills and signals, one after the other, then to the end, and compares."""
        output_dir, outcome = self.folder / f"run {next(self.numbers)}", Outcome(kind)
        asked_for = set()
        try:
            for stop in [*stops, None]:
                newest = max(complete_checkpoints(output_dir), default=0)
                attempt = self.train(kind, output_dir, stop)
                if outcome.stops:
                    outcome.resumed_from.append(went_on_from(attempt.printed))
                    assert outcome.resumed_from[-1] in (None, newest), (
                        f"the newest checkpoint was that of step {newest}"
                    )
                if not attempt.was_killed and attempt.sent is None:
                    break
                outcome.stops.append(stop)
                check_little_is_lost(kind, output_dir)
                if attempt.sent is not None and stop.number != signal.SIGKILL:
                    check_answer(stop, attempt, output_dir, newest)
                    asked_for.add(max(complete_checkpoints(output_dir), default=0))
            expected = self.uninterrupted[kind]
            of_signals = {step for step in asked_for if f"checkpoint-{step}" not in expected["names"]}
            found = result(output_dir, of_signals if kind.save_total_limit is None else ())
            for what in found:
                assert found[what] == expected[what], f"other {what}: {found[what]} instead of {expected[what]}"
            shutil.rmtree(output_dir)
        except (AssertionError, TimeoutError) as error:
            outcome.fault = f"{stop}: {error}"
        return outcome


def _inside(output_dir: Path, folder: Path, kill: Kill | None, hold: str | None) -> None:
    watch(output_dir, folder / "operations", kill)
    mark(folder, hold)


def went_on_from(printed: str) -> int | None:
    """The step, 0 if the run began anew, None if it did not come as far as to say so."""
    if "steps of" not in printed:
        return None
    found = re.search(r"Resumed from .* at step (\d+)", printed)
    return int(found[1]) if found else 0


def check_little_is_lost(kind: Kind, output_dir: Path) -> None:
    """A step is logged before the save after it, which waits for the state before: all but the last must be there."""
    done = max((step for step, *_ in losses(output_dir)), default=0)
    saved = (max(0, done - 1) // kind.save_steps - 1) * kind.save_steps
    newest = max(complete_checkpoints(output_dir), default=0)
    assert newest >= saved, f"killed after step {done}, but the newest checkpoint is that of step {newest}"


def check_answer(signalled: Signal, attempt: Attempt, output_dir: Path, resumed_from: int) -> None:
    """Exit codes, the file `preempted`, and a state of the last step that was taken."""
    by_a_person, sent = signalled.number == signal.SIGINT, attempt.sent
    code, marker = 128 + (signal.SIGINT if by_a_person else signal.SIGTERM), (output_dir / "preempted").exists()
    first = attempt.marks[sent.ranks[0]]
    explained = f"{sorted(attempt.marks.items())}\n{attempt.printed[-3000:]}"
    if attempt.code == 0:
        assert resumed_from + first.count(STEP, until=sent.seconds) >= STEPS, f"it went on to the end: {explained}"
        assert not marker, "it has ended, but wants to be started again"
        return
    # Python itself ends a rank that has not come to the first line.
    codes = {rank: attempt.marks[rank].exit_code for rank in sent.ranks if attempt.marks[rank].listed}
    if len(codes) < len(sent.ranks):
        return
    assert attempt.code == code and set(codes.values()) == {code}, f"{attempt.code}, {codes}: {explained}"
    # Before the loop, ranks that a person did not reach are ended by the launcher's SIGTERM, and take it for a wish to
    # be started again.
    ended_by_launcher = not first.count(LOOP, until=sent.seconds) and len(sent.ranks) < len(attempt.marks)
    if first.count(OWNS_ITS_FOLDER, until=sent.seconds) and not (by_a_person and ended_by_launcher):
        assert marker != by_a_person, f"preempted is {'' if marker else 'not '}there: {explained}"
    if first.count(LOOP, until=sent.seconds):
        done = max((step for step, *_ in losses(output_dir)), default=0)
        newest = max(complete_checkpoints(output_dir), default=0)
        assert newest == done, f"step {done} was taken, but the newest checkpoint is that of {newest}: {explained}"


# --- which kills -----------------------------------------------------------------------------------------------------


def kills_at_every_operation(crashes: Crashes, kinds: tuple[Kind, ...], moment: str) -> list[tuple[Kind, Kill]]:
    """Before each operation of each rank at this moment, and in the middle of each that writes; of several equal ones
    in a run at any."""
    found: dict[tuple[int, str], list[tuple[Kind, int]]] = {}
    for kind in kinds:
        for rank, names in crashes.operations[kind].items():
            for name, count in Counter(name for name in names if name.startswith(moment)).items():
                found.setdefault((rank, name), []).extend((kind, occurrence) for occurrence in range(1, count + 1))
    kills = []
    for (rank, name), places in found.items():
        for written in (None, crashes.random.random()) if name.startswith(f"{moment}: write ") else (None,):
            kind, occurrence = crashes.random.choice(places)
            kills.append((kind, Kill(rank, name, occurrence, written, alone=crashes.random.random() < 0.5)))
    return kills


def random_kill(crashes: Crashes, kind: Kind) -> Kill:
    """At an instant up to 0.1 s after any operation: a few steps here, or much of a save."""
    rank, names = crashes.random.choice(list(crashes.operations[kind].items()))
    position = crashes.random.randrange(len(names))
    occurrence = names[: position + 1].count(names[position])
    delay, alone = crashes.random.random() / 10, crashes.random.random() < 0.5
    return Kill(rank, names[position], occurrence, delay=delay, alone=alone)


def random_signal(crashes: Crashes, kind: Kind, number: int) -> Signal:
    """Somewhere in one of the parts of a run, each as likely as the others, whatever time it takes.

    number: of the start, from 0; a resumed run has fewer steps, saves and evaluations.
    """
    lot = crashes.random
    rank = lot.randrange(kind.processes)
    parts = crashes.marks[kind][rank].parts()
    name = lot.choice(list(parts))
    occurrence, seconds = lot.choice(parts[name])
    return Signal(
        lot.choice(SIGNALS),
        name,
        occurrence if number == 0 else 1,
        delay=lot.random() * seconds,
        rank=rank,
        to=lot.choice(TO if kind.processes > 1 else (TO[0], TO[2])),
    )


class Plan:
    """Deals kills to runs, one to three each. Of five kills four are at operations in turn, those of a save first, then
    those of the start and of the result; the fifth is at a random instant.
    """

    def __init__(self, crashes: Crashes, kinds: tuple[Kind, ...]):
        self.crashes, self.kinds = crashes, kinds
        self.in_a_save = [k for moment in IN_A_STATE for k in kills_at_every_operation(crashes, kinds, moment)]
        elsewhere = kills_at_every_operation(crashes, kinds, "run")
        crashes.random.shuffle(self.in_a_save)
        crashes.random.shuffle(elsewhere)
        self.waiting, self.reached = deque([*self.in_a_save, *elsewhere]), set()

    def runs(self, count: int) -> list[tuple[Kind, list[Kill]]]:
        """Runs with `count` kills in all."""
        runs = []
        while count > 0:
            length = min(count, self.crashes.random.randint(1, 3))
            kind, kills = self.crashes.random.choice(self.kinds), []
            for number in range(length):
                if self.waiting and self.crashes.random.random() < 4 / 5:
                    of_kind, kill = self.waiting.popleft()
                    # A resumed run has fewer saves, but a first one it nearly always has.
                    kind, kill = (of_kind, kill) if number == 0 else (kind, replace(kill, occurrence=1))
                else:
                    kill = random_kill(self.crashes, kind)
                kills.append(kill)
            runs.append((kind, kills))
            count -= length
        return runs

    def learn(self, kills: list[Kill], outcome: Outcome) -> None:
        """Kills that a run did not come to, because it had ended before, are dealt again."""
        self.reached |= {
            (kill.rank, kill.operation, kill.written is not None) for kill in outcome.stops if kill.delay is None
        }
        self.waiting.extendleft((outcome.kind, kill) for kill in kills[len(outcome.stops) :] if kill.delay is None)

    def summary(self) -> str:
        places = {(kill.rank, kill.operation, kill.written is not None) for _, kill in self.in_a_save}
        return f"at {len(places & self.reached)} of {len(places)} places in a save"


class SignalPlan:
    """Deals one to three signals to each run."""

    def __init__(self, crashes: Crashes, kinds: tuple[Kind, ...]):
        self.crashes, self.kinds, self.parts = crashes, kinds, Counter()

    def runs(self, count: int) -> list[tuple[Kind, list[Signal]]]:
        """Runs with `count` signals in all."""
        runs = []
        while count > 0:
            length, kind = min(count, self.crashes.random.randint(1, 3)), self.crashes.random.choice(self.kinds)
            runs.append((kind, [random_signal(self.crashes, kind, number) for number in range(length)]))
            count -= length
        return runs

    def learn(self, _: list[Signal], outcome: Outcome) -> None:
        self.parts.update(signalled.mark for signalled in outcome.stops)

    def summary(self) -> str:
        parts = {name for kind in self.kinds for name in self.crashes.marks[kind][0].parts()}
        return f"in {len(parts & set(self.parts))} of {len(parts)} parts of a run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how often to kill in all, mostly at file operations")
    parser.add_argument("--signals", type=int, default=100, help="how many signals to send in all, all over the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=2, help="how many runs at a time")
    parser.add_argument("--only", choices=GROUPS, help="both if left out")
    options = parser.parse_args()
    os.chdir(ROOT)  # where the server of the forks looks for the project
    began, runs, differing = time.monotonic(), 0, 0
    crashes = Crashes(Path(tempfile.mkdtemp(prefix="crash_loop_")), random.Random(options.seed))
    work = []
    for what, count, plan, groups in (
        ("kills", options.kills, Plan, GROUPS),
        ("signals", options.signals, SignalPlan, SIGNALLED),
    ):
        groups = [kinds for name, kinds in groups.items() if options.only in (None, name)]
        for number, kinds in enumerate(groups):
            wanted = count * (number + 1) // len(groups) - count * number // len(groups)
            if wanted:
                work.append((what, wanted, plan, kinds))
    summaries = []
    with ThreadPoolExecutor(options.at_once) as pool:
        kinds_of_all = dict.fromkeys(kind for *_, kinds in work for kind in kinds)
        list(pool.map(crashes.train_uninterrupted, kinds_of_all))
        for what, wanted, plan_of, kinds in work:
            plan, stopped = plan_of(crashes, kinds), 0
            while stopped < wanted:
                planned = plan.runs(wanted - stopped)
                for (_, stops), outcome in zip(
                    planned, pool.map(lambda run: crashes.crash(*run), planned), strict=True
                ):
                    runs, differing = runs + 1, differing + bool(outcome.fault)
                    stopped += len(outcome.stops)
                    plan.learn(stops, outcome)
                    print(f"{runs}. {outcome}", flush=True)
            summaries.append(f"{kinds[0].where()}: {stopped} {what}, {plan.summary()}.")
    print(*summaries, sep="\n")
    print(
        f"{runs - differing} of {runs} runs ended as if nobody had killed them; {time.monotonic() - began:.0f} s."
        + (f" What the others left is in {crashes.folder}." if differing else "")
    )
    if not differing:
        shutil.rmtree(crashes.folder)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
