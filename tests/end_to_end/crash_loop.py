"""Training runs that are killed again and again, and must end as if they had not been.

    python tests/end_to_end/crash_loop.py --kills 100

Every run is train.py itself on tiny models with dropout, on one process or on two under ZeRO-3, ended by SIGKILL at
random instants and at every file operation of a save in turn, in the middle of the writing too, and each time started
again with the same command line, `--resume_from_checkpoint latest`. Losses and gradient norms (as hex), final weights,
and the newest checkpoint must be those of a run that nobody killed, to the last bit. One line for each run, then a
summary; ends with 1 if a run differs.
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
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.forked_runs import start  # noqa: E402  known only from here on when this file is the program
from tests.kill_points import Kill, operations, watch  # noqa: E402

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
STEPS = 6
LOST_RANK_GRACE = 2.0  # seconds that the ranks around a killed one get; launchers give 30


@dataclass(frozen=True)
class Kind:
    """Where a run trains, and how it saves."""

    config: str | None
    processes: int
    save_steps: int
    save_total_limit: int | None
    workers: int = 0

    def __str__(self) -> str:
        kept = "all" if self.save_total_limit is None else self.save_total_limit
        return f"{self.where()}, a save every {self.save_steps}, {kept} kept"

    def where(self) -> str:
        return "one process" if self.config is None else f"{self.config} on {self.processes}"

    def flags(self, language_model: Path, output_dir: Path) -> list[str]:
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
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]


GROUPS = {
    "one": (Kind(None, 1, 1, 1), Kind(None, 1, 1, 2, workers=2), Kind(None, 1, 2, None)),
    "two": (Kind("zero3", 2, 1, 1), Kind("zero3", 2, 2, None)),
}


def language_model_with_dropout(folder: Path) -> Path:
    """The golden language model; with dropout the random states have to be restored as well."""
    copy = Path(shutil.copytree(FIXTURES / "llm", folder / "language_model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return copy


# --- what a run leaves -----------------------------------------------------------------------------------------------


def losses(output_dir: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm as hex, of every line of the log."""
    file = output_dir / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off by a kill
    return [(entry["step"], entry["loss"].hex(), entry["gradient_norm"].hex()) for entry in entries]


def complete_checkpoints(output_dir: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in output_dir.glob("checkpoint-*/manifest.json"))


def result(output_dir: Path) -> dict:
    """All that must not depend on kills."""
    files = [path for path in output_dir.iterdir() if path.suffix in (".safetensors", ".bin")]
    newest = complete_checkpoints(output_dir)[-1]
    files += (output_dir / f"checkpoint-{newest}").glob("*.safetensors")
    names = sorted(path.name for path in output_dir.iterdir() if path.name not in ("log.jsonl", "arguments.yaml"))
    return {
        "losses": losses(output_dir),  # also none twice, though steps were taken again after a kill
        "weights": {str(file.relative_to(output_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "names": names,  # nothing half-written is left over, and as many checkpoints as were asked for
    }


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    kind: Kind
    kills: list[Kill] = field(default_factory=list)  # those that happened
    resumed_from: list[int | None] = field(default_factory=list)  # after each kill; None: killed before it said so
    fault: str = ""

    def __str__(self) -> str:
        ends = [f"{kill}; resumed from {step}" for kill, step in zip(self.kills, self.resumed_from, strict=True)]
        return f"{self.kind}: {'killed ' * bool(ends)}{', '.join(ends) or 'not killed'}: {self.fault or 'ok'}"


@dataclass
class Crashes:
    """A folder of runs, and what uninterrupted ones give."""

    folder: Path
    random: random.Random
    uninterrupted: dict[Kind, dict] = field(default_factory=dict)
    operations: dict[Kind, dict[int, list[str]]] = field(default_factory=dict)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.language_model = language_model_with_dropout(self.folder)
        self.numbers = itertools.count(1)

    def train(self, kind: Kind, output_dir: Path, kill: Kill | None) -> tuple[str, dict[int, list[str]]]:
        """Starts train.py and waits until nothing of it runs any more; what it printed, and each rank's operations.

        Raises:
            AssertionError: it failed by itself.
            TimeoutError: it hung.
        """
        attempt = self.folder / f"attempt {next(self.numbers)}"
        attempt.mkdir()
        run = start(
            kind.flags(self.language_model, output_dir),
            attempt / "printed.txt",
            kind.config,
            kind.processes,
            inside=functools.partial(watch, output_dir, attempt / "operations", kill),
        )
        code = run.wait()
        run.wait_until_all_have_ended(LOST_RANK_GRACE)
        seen = operations(attempt / "operations")
        text = run.text
        assert code == 0 or was_killed(seen), f"it ended with {code} and was not killed:\n{text[-5000:]}"
        shutil.rmtree(attempt)
        return text, seen

    def train_uninterrupted(self, kind: Kind) -> None:
        """Before the others of its kind, which choose among its operations and are compared with its result."""
        output_dir = self.folder / f"uninterrupted {next(self.numbers)}"
        _, self.operations[kind] = self.train(kind, output_dir, None)
        self.uninterrupted[kind] = result(output_dir)

    def crash(self, kind: Kind, kills: list[Kill]) -> Outcome:
        """Trains with these kills, one after the other, then to the end, and compares."""
        output_dir, outcome = self.folder / f"run {next(self.numbers)}", Outcome(kind)
        try:
            for kill in [*kills, None]:
                newest = max(complete_checkpoints(output_dir), default=0)
                text, seen = self.train(kind, output_dir, kill)
                if outcome.kills:
                    outcome.resumed_from.append(went_on_from(text))
                    assert outcome.resumed_from[-1] in (None, newest), (
                        f"the newest checkpoint was that of step {newest}"
                    )
                if not was_killed(seen):
                    break
                outcome.kills.append(kill)
                check_little_is_lost(kind, output_dir)
            found, expected = result(output_dir), self.uninterrupted[kind]
            for what in found:
                assert found[what] == expected[what], f"other {what}: {found[what]} instead of {expected[what]}"
            shutil.rmtree(output_dir)
        except (AssertionError, TimeoutError) as error:
            outcome.fault = str(error)
        return outcome


def went_on_from(printed: str) -> int | None:
    """The step, 0 if the run began anew, None if it did not come as far as to say so."""
    if "steps of" not in printed:
        return None
    found = re.search(r"Resumed from .* at step (\d+)", printed)
    return int(found[1]) if found else 0


def was_killed(seen: dict[int, list[str]]) -> bool:
    return any("killed" in names for names in seen.values())


def check_little_is_lost(kind: Kind, output_dir: Path) -> None:
    """A step is logged before the save that follows it: all saves before that one must be there."""
    done = max((step for step, *_ in losses(output_dir)), default=0)
    saved = max(0, done - 1) // kind.save_steps * kind.save_steps
    newest = max(complete_checkpoints(output_dir), default=0)
    assert newest >= saved, f"killed after step {done}, but the newest checkpoint is that of step {newest}"


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


class Plan:
    """Deals kills to runs, one to three each. Of five kills four are at operations in turn, those of a save first, then
    those of the start and of the result; the fifth is at a random instant.
    """

    def __init__(self, crashes: Crashes, kinds: tuple[Kind, ...]):
        self.crashes, self.kinds = crashes, kinds
        self.in_a_save = kills_at_every_operation(crashes, kinds, "save")
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
            (kill.rank, kill.operation, kill.written is not None) for kill in outcome.kills if kill.delay is None
        }
        self.waiting.extendleft((outcome.kind, kill) for kill in kills[len(outcome.kills) :] if kill.delay is None)

    def summary(self) -> str:
        places = {(kill.rank, kill.operation, kill.written is not None) for _, kill in self.in_a_save}
        return f"{len(places & self.reached)} of {len(places)} places in a save"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how often to kill in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=2, help="how many runs at a time")
    parser.add_argument("--only", choices=GROUPS, help="both if left out")
    options = parser.parse_args()
    os.chdir(ROOT)  # where the server of the forks looks for the project
    began, runs, differing = time.monotonic(), 0, 0
    groups = [kinds for name, kinds in GROUPS.items() if options.only in (None, name)]
    crashes = Crashes(Path(tempfile.mkdtemp(prefix="crash_loop_")), random.Random(options.seed))
    summaries = []
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(crashes.train_uninterrupted, itertools.chain(*groups)))
        for number, kinds in enumerate(groups):
            plan = Plan(crashes, kinds)
            wanted, killed = options.kills * (number + 1) // len(groups) - options.kills * number // len(groups), 0
            while killed < wanted:
                planned = plan.runs(wanted - killed)
                for (_, kills), outcome in zip(
                    planned, pool.map(lambda run: crashes.crash(*run), planned), strict=True
                ):
                    runs, differing = runs + 1, differing + bool(outcome.fault)
                    killed += len(outcome.kills)
                    plan.learn(kills, outcome)
                    print(f"{runs}. {outcome}", flush=True)
            summaries.append(f"{kinds[0].where()}: {killed} kills, at {plan.summary()}.")
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
