"""A run ends with a sentence when a process of its pool dies, and goes on when a parent that is no launcher does."""

import json
import os
import signal
import time

import psutil
import pytest

from mini_llava.data import lengths
from tests.end_to_end import runs
from tests.forked_runs import start

pytestmark = pytest.mark.slow


def wait_long_in_each_part() -> None:
    lengths._scan_part = lambda *_: time.sleep(600)


def test_a_process_that_the_system_kills_in_the_length_pass_ends_the_run_with_a_sentence(tmp_path):
    """The others ignore the SIGTERM by which the pool ends them, since a signal to the whole job is their run's."""
    text = json.dumps(runs.RECORDS[runs.TEXTS[0]])
    (tmp_path / "many.json").write_text(f"[{','.join([text] * 1024)}]")  # two parts
    values = {"data_path": tmp_path / "many.json", "dataloader_num_workers": 2}
    flags = runs.flags_of(2, tmp_path / "run", values)
    run = start(flags, tmp_path / "printed.txt", inside=wait_long_in_each_part)
    leader = psutil.Process(run.process.pid)
    run.wait_until(lambda: len(leader.children(recursive=True)) == 3)
    _, killed, other = leader.children(recursive=True)
    time.sleep(0.5)  # for both to take their part
    killed.kill()
    assert run.wait(60) == 1 and not other.is_running()
    assert "train.py: error: A process was killed while measuring records, after 0 of 1,024;" in run.text
    assert "Traceback" not in run.text, run.text


def test_a_run_outlives_a_parent_that_is_no_launcher(tmp_path):
    """As the shell of `nohup python train.py &` is, which ends with its terminal."""
    values = {"max_steps": 5000, "global_batch_size": 4, "save_strategy": "no", "dataloader_num_workers": 1}
    run = start(runs.flags_of(2, tmp_path / "run", values), tmp_path / "printed.txt", "cpu")
    log = tmp_path / "run" / "log.jsonl"
    run.wait_until(log.exists)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    time.sleep(2)
    logged = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size > logged and "ends after this step" not in run.text, run.text
    run.wait_until_all_have_ended(grace=0)
