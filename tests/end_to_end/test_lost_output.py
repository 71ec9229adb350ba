"""A run whose output goes nowhere any more is the same run: all steps, the result, exit code 0."""

import functools
import os
import pty
import subprocess
import sys

import pytest

from tests.end_to_end import runs
from tests.forked_runs import ROOT, start
from tests.launching import small_disk

pytestmark = pytest.mark.slow

STEPS = 4
SETTINGS = {"max_steps": STEPS, "save_steps": 2, "global_batch_size": 4, "dataloader_num_workers": 1, "eval_steps": 2}


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def pipe_whose_reader_has_ended() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def terminal_that_is_gone() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


def full_pipe() -> int:
    """Nobody reads it, and whoever shares it has made it non-blocking, as ssh and node do."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            return writer


def print_to(lost) -> None:
    """In the rank."""
    descriptor = lost()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


@pytest.mark.parametrize("lost", [full_disk, pipe_whose_reader_has_ended, terminal_that_is_gone, full_pipe])
def test_no_step_is_lost_with_the_output(lost, tmp_path):
    run = start(flags(tmp_path), tmp_path / "printed.txt", inside=functools.partial(print_to, lost))
    assert run.wait() == 0
    assert_it_is_whole(tmp_path / "run")


def flags(folder, **more) -> list[str]:
    return runs.flags_of(2, folder / "run", SETTINGS | runs.held_out_flags(folder) | more)


def assert_it_is_whole(run) -> None:
    steps = [entry["step"] for entry in runs.log(run) if "loss" in entry]
    assert steps == list(range(1, STEPS + 1)) and (run / "model.safetensors").exists()


def test_a_python_of_its_own_ends_with_exit_code_0(tmp_path):
    """The last flush of all, which a fork of the test server leaves out, is Python's own."""
    command = ["bash", "-c", 'exec "$@" > /dev/full 2>&-', "bash", sys.executable, "train.py", *flags(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == 0
    assert_it_is_whole(tmp_path / "run")


def test_a_full_disk_under_tensorboard_ends_no_run_and_holds_none_up(tmp_path):
    with small_disk(tmp_path / "run" / "runs", "4k"):  # less than the arguments take as text
        run = start(flags(tmp_path, report_to="tensorboard"), tmp_path / "printed.txt")
        assert run.wait(120) == 0 and "which log.jsonl has" in run.text, run.text
        assert_it_is_whole(tmp_path / "run")


def print_in_ascii() -> None:
    """In the rank."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_what_the_terminals_encoding_lacks_is_spelled_out(tmp_path):
    (tmp_path / "größe").mkdir()
    run = start(flags(tmp_path / "größe"), tmp_path / "printed.txt", inside=print_in_ascii)
    assert run.wait() == 0 and r"gr\xf6\xdfe" in run.text
