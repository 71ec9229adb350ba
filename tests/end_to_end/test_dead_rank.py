"""A rank that is killed in the middle of training ends the run within seconds, with a sentence that names it.

ZeRO-3 on two processes with loader workers, which outlive their rank for a while and must not hold its connections.
"""

import socket
import time

import psutil
import pytest

from tests.end_to_end import runs
from tests.forked_runs import start

AT_ONCE = 5  # seconds; it takes milliseconds, and the machine may be busy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_a_sentence_and_a_stopped_one_does_not(victim, tmp_path):
    settings = {"max_steps": 5000, "global_batch_size": 4, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "no", "dataloader_num_workers": 2}
    run = start(runs.flags_of(2, tmp_path / "run", settings), tmp_path / "printed.txt", "zero3", 2)
    log = tmp_path / "run" / "log.jsonl"
    run.wait_until(log.exists)
    ranks = psutil.Process(run.process.pid).children()
    dies, survives = ranks[victim], ranks[1 - victim]

    dies.suspend()
    time.sleep(2)
    assert survives.is_running() and "error" not in run.text
    dies.resume()
    logged = log.stat().st_size
    run.wait_until(lambda: log.stat().st_size > logged)

    dies.kill()
    ended, _ = psutil.wait_procs([survives], timeout=AT_ONCE)
    run.wait()
    assert ended, run.text
    sentence = f"error: Rank {victim} (pid {dies.pid} on {socket.gethostname()}) has ended without finishing; this run"
    assert run.text.count(sentence) == 1, run.text
    assert f"[rank{1 - victim}]: Traceback" not in run.text  # the workers of the killed rank may print one
