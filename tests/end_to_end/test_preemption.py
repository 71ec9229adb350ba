"""A run that is told to stop finishes its step, saves, says so in a file, and goes on later as if nothing had been."""

import contextlib
import functools
import itertools
import json
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mini_llava.guards.preemption import SECONDS_OF_ONE_PRESS, SECONDS_OF_ONE_REQUEST
from tests import signal_points
from tests.end_to_end import runs
from tests.end_to_end.crash_loop import Crashes
from tests.end_to_end.moments import MOMENTS, SIGNALS, end_in, kind_of, table
from tests.forked_runs import ROOT, start
from tests.signal_points import Signal

pytestmark = pytest.mark.slow

ANSWER = (
    "the run saves its state and ends after this step or the next, this save or this batch of an evaluation; a second "
)
STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 100,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 1,
    "learning_rate": 1e-3,
    "resume_from_checkpoint": "latest",
}


def weights(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def losses(directory):
    return {entry["step"]: entry["loss"].hex() for entry in runs.log(directory)}


def ranks(run) -> list[psutil.Process]:
    """The processes of the ranks, without their loader workers."""
    leader = psutil.Process(run.process.pid)
    return leader.children() or [leader]


def started(folder, config, processes, **more):
    flags = runs.flags_of(2, folder / "run", SETTINGS | more)
    return start(flags, folder / "printed.txt", config, processes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(config, processes)`: the output directory of the uninterrupted run."""
    made = {}

    def get(config, processes):
        if config not in made:
            folder = made[config] = tmp_path_factory.mktemp("whole")
            assert started(folder, config, processes).wait() == 0
        return made[config] / "run"

    return get


@pytest.mark.parametrize(
    ("config", "processes", "number"),
    [("cpu", 1, signal.SIGUSR1), ("zero3", 2, signal.SIGTERM)],
    ids=["one process", "ZeRO-3 on two"],
)
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_and_the_resumed_run_is_exact(
    config, processes, number, whole, tmp_path
):
    run, output = started(tmp_path, config, processes), tmp_path / "run"
    run.wait_until(lambda: (output / "log.jsonl").exists())
    signalled = time.monotonic()
    ranks(run)[-1].send_signal(number)
    assert run.wait(60) == 128 + signal.SIGTERM, run.text
    print(f"ended {time.monotonic() - signalled:.1f} s after the signal")
    assert "Traceback" not in run.text and f"{number.name}: {ANSWER}" in run.text

    stopped = json.loads((output / "preempted").read_text())
    assert 1 <= stopped["step"] < STEPS == stopped["total_steps"]
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{stopped['step']}"]
    assert not weights(output), "a run that was stopped has no result"

    run = started(tmp_path, config, processes)
    assert run.wait() == 0, run.text
    assert f"at step {stopped['step']}" in run.text and not (output / "preempted").exists()
    assert losses(output) == losses(whole(config, processes))
    assert weights(output) == weights(whole(config, processes))


def test_all_processes_signalled_twice_at_once_as_a_scheduler_and_a_launcher_do_is_one_request(tmp_path):
    run = started(tmp_path, "cpu", 2, max_steps=500)
    run.wait_until(lambda: (tmp_path / "run" / "log.jsonl").exists())
    for _ in range(2):
        for rank in ranks(run):
            for process in (rank, *rank.children()):  # the loader's workers too
                process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.text
    assert (tmp_path / "run" / "preempted").exists() and "Traceback" not in run.text


@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("zero3", 2)], ids=["one process", "ZeRO-3 on two"])
def test_ctrl_c_saves_and_asks_nobody_to_start_the_run_again(config, processes, tmp_path):
    run, output = started(tmp_path, config, processes, max_steps=500), tmp_path / "run"
    run.wait_until(lambda: (output / "log.jsonl").exists())
    for _ in range(2):  # of the terminal, and of a launcher that passes it on
        for rank in ranks(run):
            for process in (rank, *rank.children()):
                process.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT, run.text
    assert f"SIGINT: {ANSWER}" in run.text and "Traceback" not in run.text
    [state] = output.glob("checkpoint-*")
    assert f"Stopped after step {state.name.split('-')[1]} as asked" in run.text
    assert (state / "manifest.json").is_file() and not (output / "preempted").exists() and not weights(output)


def test_a_second_ctrl_c_ends_a_rank_at_once_even_if_it_waits_for_another_for_ever(tmp_path):
    run = started(tmp_path, "cpu", 2, max_steps=500)
    run.wait_until(lambda: (tmp_path / "run" / "log.jsonl").exists())
    waiting, stopped = ranks(run)
    stopped.suspend()
    time.sleep(1)
    pressed = time.monotonic()
    waiting.send_signal(signal.SIGINT)
    time.sleep(SECONDS_OF_ONE_PRESS + 0.2)
    assert waiting.is_running() and waiting.status() != psutil.STATUS_ZOMBIE
    waiting.send_signal(signal.SIGINT)
    psutil.wait_procs([waiting], timeout=10)
    ended, seconds = not waiting.is_running(), time.monotonic() - pressed
    with contextlib.suppress(psutil.NoSuchProcess):
        stopped.kill()
    assert ended and seconds < SECONDS_OF_ONE_REQUEST and not list((tmp_path / "run").glob("checkpoint-*"))


def test_ctrl_c_before_the_first_step_ends_with_a_sentence_and_nothing_starts_the_run_again(tmp_path):
    earlier = tmp_path / "run" / "preempted"  # for which this run was started
    earlier.parent.mkdir()
    earlier.write_text("{}\n")
    run = started(tmp_path, "cpu", 1)
    run.wait_until(lambda: "is a language model" in run.text)
    ranks(run)[0].send_signal(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT
    assert run.text.rstrip().endswith(
        "train.py: interrupted before the first step; --resume_from_checkpoint latest goes on from what is saved."
    )
    assert not earlier.exists()


def test_a_run_that_was_started_again_and_ends_with_an_error_does_not_want_to_be_started_again(tmp_path):
    earlier = tmp_path / "run" / "preempted"
    earlier.parent.mkdir()
    earlier.write_text("{}\n")
    run = started(tmp_path, "cpu", 1, image_folder=tmp_path)  # no picture is there
    assert run.wait() == 1 and "cannot be trained on" in run.text, run.text
    assert not earlier.exists()


def test_a_second_signal_ends_a_rank_at_once_even_if_it_waits_for_another_for_ever(tmp_path):
    run = started(tmp_path, "cpu", 2, max_steps=500)
    run.wait_until(lambda: (tmp_path / "run" / "log.jsonl").exists())
    waiting, stopped = ranks(run)
    stopped.suspend()
    time.sleep(1)  # the step that the first is in cannot end from here on
    for _ in range(2):
        waiting.send_signal(signal.SIGTERM)
        time.sleep(SECONDS_OF_ONE_REQUEST + 0.5)
    psutil.wait_procs([waiting], timeout=10)
    ended = not waiting.is_running()
    with contextlib.suppress(psutil.NoSuchProcess):
        stopped.kill()
    assert ended and f"SIGTERM: {ANSWER}" in run.text and not (tmp_path / "run" / "preempted").exists()


# --- every moment ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> Crashes:
    return Crashes(tmp_path_factory.mktemp("moments"), random.Random(0))


BY_TURNS = dict(zip(MOMENTS, itertools.cycle(SIGNALS), strict=False))  # the signal of each moment
# (file `preempted`, if the signal asks for one; newest state; steps and saves after the signal)
LEFT = {
    signal_points.FIRST_LINE: (None, 0, 0, 0),
    signal_points.LENGTHS: ("-", 0, 0, 0),
    signal_points.TRIAL: ("-", 0, 0, 0),
    signal_points.FIRST_EVALUATION: ("-", 0, 0, 0),
    signal_points.STEP: (2, 2, 1, 1),
    signal_points.SAVE: (2, 2, 0, 0),
    signal_points.EVALUATION: (3, 3, 0, 1),
    signal_points.HUNG_WORKER: (3, 3, 1, 1),
    signal_points.RESULT: (6, 6, 0, 0),
    signal_points.LAST_EVALUATION: (6, 6, 0, 0),
}


@pytest.mark.parametrize("moment", LEFT)
def test_at_every_moment_a_signal_is_answered_once_and_what_a_later_start_needs_is_there(moment, crashes):
    number = BY_TURNS[moment]
    end = end_in(crashes, kind_of(moment, 1), Signal(number, moment))
    marked, *others = LEFT[moment]
    assert [end.newest, end.steps, end.saves] == others, end.printed
    assert end.code == 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    assert end.marked_step == (None if number == signal.SIGINT else marked)
    assert end.seconds < signal_points.SECONDS_HELD + 5 and "Traceback" not in end.printed


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_a_state_is_written_behind_the_steps_ends_the_run_with_that_state_and_its_last(
    processes, crashes
):
    kind = kind_of(signal_points.BEHIND, processes)
    end = end_in(crashes, kind, Signal(signal.SIGTERM, signal_points.BEHIND, rank=processes - 1))
    # It is held while the main threads come as far as the next save, which waits for it; or no further than the step of
    # that state, where they are asked before they have begun another.
    assert end.code == 143 and end.marked_step == end.newest in (2, 3, 4), end.printed
    assert "checkpoint-2 is written: " in end.printed and "Traceback" not in end.printed
    assert end.printed.count("is written: ") == (1 if end.newest == 2 else 2)


@pytest.mark.parametrize("moment", [signal_points.SAVE, signal_points.EVALUATION])
def test_of_two_ranks_the_signal_to_one_during_a_save_or_an_evaluation_ends_both_with_one_save(moment, crashes):
    end = end_in(crashes, kind_of(moment, 2), Signal(signal.SIGUSR1, moment, rank=1))
    assert (end.code, end.marked_step, end.newest, end.steps, end.saves) == (143, *LEFT[moment]), end.printed


def test_the_table_of_moments_has_a_row_for_signals_that_end_alike(crashes):
    rows = table(crashes, 1, 2, [signal_points.FIRST_LINE, signal_points.LENGTHS], SIGNALS[2:]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")][:-1] for row in rows[2:]]
    assert cells == [
        ["first line, imports", "HUP", "143", "no", "none", "0", "0"],
        ["first line, imports", "INT", "130", "no", "none", "0", "0"],
        ["length pass", "HUP", "143", "yes", "none", "0", "0"],
        ["length pass", "INT", "130", "no", "none", "0", "0"],
    ]


SIGNALLED_IN_AN_IMPORT = """
import os, runpy, signal, sys, time

class AtTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), number)
            time.sleep(60)

number = int(sys.argv.pop(1))
sys.meta_path.insert(0, AtTorch())
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_answered_before_torch_is_imported(number, tmp_path):
    """In a Python of its own: the server of the forks has imported all."""
    default = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # not as a background job
    command = [sys.executable, "-c", SIGNALLED_IN_AN_IMPORT, str(int(number)), *runs.flags_of(2, tmp_path, SETTINGS)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, preexec_fn=default)
    assert ended.returncode == 128 + (number if number == signal.SIGINT else signal.SIGTERM), ended.stderr
    assert "before the first step" in ended.stderr and "Traceback" not in ended.stderr
    assert (tmp_path / "preempted").exists() == (number != signal.SIGINT)


FAIL_IN_STEP_2 = """
import runpy
from mini_llava.training import backend

def optimizer_step(*arguments, calls=[], step=backend.optimizer_step):
    calls.append(1)
    return step(*arguments) if len(calls) < 2 else 1 / 0

backend.optimizer_step = optimizer_step
runpy.run_path("train.py", run_name="__main__")
"""


def test_after_an_exception_the_workers_that_ignore_signals_do_not_hold_the_process_up(tmp_path):
    """In a Python of its own: a fork of the test server leaves out what Python does at exit."""
    flags = runs.flags_of(2, tmp_path / "run", SETTINGS | {"dataloader_num_workers": 2})
    command = [sys.executable, "-c", FAIL_IN_STEP_2, *map(str, flags)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if "Error" in line] == ["ZeroDivisionError: division by zero"]
