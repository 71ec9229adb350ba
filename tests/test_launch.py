"""Behind the sentence in which a run ends nothing is printed, and its exit code is the launcher's."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.end_to_end import runs
from tests.forked_runs import ROOT

TWO = ["--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2", "--main_process_port", "0"]
ONE = ["--config_file", "accelerate_configs/cpu.yaml"]
FAIL_IN_STEP_2 = """
import train
from mini_llava.training import distributed, not_finite

def backward_and_step(*arguments, calls=[], step=distributed.backward_and_step):
    calls.append(1)
    if len(calls) == 2:
        raise ValueError("no flag is to blame")
    return step(*arguments)

distributed.backward_and_step = backward_and_step
train.main()
"""

pytestmark = pytest.mark.slow


def launched(launcher: list, words: list, program="train.py") -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch.py", *launcher, str(program), *words]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return run.returncode, run.stderr.strip().splitlines()


@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one process", "ZeRO-3 on two"])
@pytest.mark.parametrize(
    ("values", "code", "sentence"),
    [
        ({"learning_rte": 1}, 2, "train.py: error: unknown flag --learning_rte, did you mean --learning_rate?"),
        ({"data_path": "none.json"}, 1, "train.py: error: The data file none.json (--data_path) does not exist."),
    ],
    ids=["flag", "file"],
)
def test_a_sentence_is_the_last_thing_printed(values, code, sentence, launcher, tmp_path):
    ended, lines = launched(launcher, runs.flags_of(2, tmp_path / "out", values))
    assert (ended, lines[-1]) == (code, sentence)
    assert "Traceback" not in "\n".join(lines) and lines.count(sentence) == 1


def test_an_error_in_mid_run_keeps_its_own_traceback_and_gets_no_other(tmp_path):
    (tmp_path / "failing.py").write_text(FAIL_IN_STEP_2)
    words = runs.flags_of(2, tmp_path / "out", {"max_steps": 4, "global_batch_size": 4})
    code, lines = launched(TWO, words, tmp_path / "failing.py")
    assert code == 1 and "ValueError: no flag is to blame" in lines
    text = "\n".join(lines)
    assert "ChildFailedError" not in text and "launch.py" not in text and "closing signal" not in text


def test_what_is_wrong_with_the_launchers_own_flags_is_a_sentence():
    code, lines = launched(["--config_file", "none.yaml"], [])
    assert code == 1 and lines[0].startswith("launch.py: error: ") and "none.yaml" in lines[0] and len(lines) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_rank_that_is_killed_is_named_and_ctrl_c_saves(number, tmp_path):
    words = runs.flags_of(2, tmp_path / "out", {"max_steps": 5000, "global_batch_size": 4})
    command = [sys.executable, "launch.py", *TWO, "train.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with psutil.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, stdout=-3) as launcher:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "out" / "log.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            ranks = [child for child in launcher.children() if "RANK" in child.environ()]
            (ranks[1] if number == signal.SIGKILL else launcher).send_signal(number)
            _, text = launcher.communicate(timeout=120)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*launcher.children(recursive=True), launcher]:
                    process.kill()
    assert "Traceback" not in text
    if number == signal.SIGINT:
        assert launcher.returncode == 128 + signal.SIGINT and list((tmp_path / "out").glob("checkpoint-*"))
        assert not (tmp_path / "out" / "preempted").exists()
    else:
        assert launcher.returncode == 128 + signal.SIGKILL
        assert re.search(rf"error: Rank 1 \(pid {ranks[1].pid} on ", text)
        assert f"launch.py: rank 1 (pid {ranks[1].pid}) was ended by SIGKILL" in text.strip().splitlines()[-1]
