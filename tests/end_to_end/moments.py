"""What a run that is signalled leaves, at every moment and for every signal, as a table in Markdown.

    python tests/end_to_end/moments.py

Each row is a run of train.py itself on a tiny model, held in that moment (`signal_points.py`) while the signal is sent
to one of its ranks. The seconds are those from the signal to the end of the last process; where the run finishes what
it is at, one of them is that in which it is held. `--processes 2` is ZeRO-3.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import signal_points  # noqa: E402  known only from here on when this file is the program
from tests.end_to_end.crash_loop import Crashes, Kind, complete_checkpoints  # noqa: E402
from tests.signal_points import BEHIND, EVALUATION, SAVE, STEP, Signal  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
MOMENTS = {
    signal_points.FIRST_LINE: "first line, imports",
    signal_points.LENGTHS: "length pass",
    signal_points.TRIAL: "trial of the longest micro-batch",
    signal_points.FIRST_EVALUATION: "evaluation before training",
    STEP: "step 1",
    SAVE: "save after step 2",
    BEHIND: "the state of step 2 written",
    EVALUATION: "evaluation after step 3",
    signal_points.HUNG_WORKER: f"wait for a hung worker, step {signal_points.STEP_OF_THE_HUNG_WORKER}",
    signal_points.RESULT: "result, after step 6",
    signal_points.LAST_EVALUATION: "evaluation after training",
}


@dataclass(frozen=True)
class End:
    """How a run ended after a signal.

    marked_step: that of the file `preempted`, "-" before the loop, None without the file.
    newest: the step of the newest whole state, 0 without any.
    saves, steps: that began after the signal.
    """

    code: int
    marked_step: int | str | None
    newest: int
    saves: int
    steps: int
    seconds: float
    printed: str

    def in_words(self) -> list[str]:
        """All but the seconds."""
        marker = "no" if self.marked_step is None else f"step {self.marked_step}" if self.marked_step != "-" else "yes"
        return [
            str(self.code),
            marker,
            f"step {self.newest}" if self.newest else "none",
            str(self.steps),
            str(self.saves),
        ]


def kind_of(moment: str, processes: int) -> Kind:
    """With held-out records, which a worker that hangs would be asked for too."""
    kind = Kind(
        "zero3" if processes > 1 else None, processes, save_steps=2, save_total_limit=1, workers=1, evaluated=True
    )
    return replace(kind, evaluated=False) if moment == signal_points.HUNG_WORKER else kind


def signalled_rank(moment: str, processes: int) -> int | None:
    """The last one; the lengths are measured by the one that is there first."""
    return None if moment == signal_points.LENGTHS else processes - 1


def end_in(crashes: Crashes, kind: Kind, signalled: Signal) -> End:
    """Holds a run in the moment of the signal and sends it."""
    output_dir = crashes.folder / f"run {next(crashes.numbers)}"
    attempt = crashes.train(kind, output_dir, signalled, hold=signalled.mark)
    if attempt.sent is None:
        raise RuntimeError(f"{signalled} came too late; the run ended with {attempt.code}:\n{attempt.printed}")
    ended, marker = time.monotonic(), output_dir / "preempted"
    marked = json.loads(marker.read_text())["step"] if marker.exists() else None
    marks, since = attempt.marks[attempt.sent.ranks[0]], attempt.sent.seconds
    return End(
        attempt.code,
        "-" if marker.exists() and marked is None else marked,
        max(complete_checkpoints(output_dir), default=0),
        marks.count(SAVE, since),
        marks.count(STEP, since),
        ended - since,
        attempt.printed,
    )


def table(crashes: Crashes, processes: int, at_once: int, moments=tuple(MOMENTS), signals=SIGNALS) -> str:
    """Signals that end the same way share a row."""
    cases = list(itertools.product(moments, signals))
    with ThreadPoolExecutor(at_once) as pool:
        ends = pool.map(
            lambda case: end_in(
                crashes, kind_of(case[0], processes), Signal(case[1], case[0], rank=signalled_rank(case[0], processes))
            ),
            cases,
        )
        alike: dict[tuple, list[tuple[str, float]]] = {}
        for (moment, number), end in zip(cases, ends, strict=True):
            alike.setdefault((MOMENTS[moment], *end.in_words()), []).append((number.name[3:], end.seconds))
    lines = [
        "| moment | signal | exit code | `preempted` | newest state | steps after the signal | saves | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (moment, *words), signals in alike.items():
        least, most = (f"{choose(seconds for _, seconds in signals):.1f}" for choose in (min, max))
        names = ", ".join(name for name, _ in signals)
        lines.append(f"| {' | '.join([moment, names, *words, least if least == most else f'{least} to {most}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--at_once", type=int, default=2, help="how many runs at a time")
    options = parser.parse_args()
    os.chdir(ROOT)  # where the server of the forks looks for the project
    folder = Path(tempfile.mkdtemp(prefix="moments_"))
    print(table(Crashes(folder, random.Random(0)), options.processes, options.at_once))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
