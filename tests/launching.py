"""Two processes on the CPU: launched as users launch them, or many runs of `train.py` in turn, as forks."""

import contextlib
import functools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked_runs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"


def launch(config_file: Path | None, script: Path, *arguments: str) -> str:
    """Runs a script in two processes; returns what they print, which is the error if they fail.

    Args:
        config_file: accelerate's, for `accelerate launch`; None starts DDP by `torchrun`, since accelerate starts
            several processes on CPUs through MPI only.
    """
    if config_file is None:
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    else:
        launcher = ["accelerate.commands.launch", "--config_file", str(config_file)]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", *launcher, str(script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            # Long: a launch killed while DeepSpeed compiles leaves a lock behind, for which all later ones wait.
            printed, _ = process.communicate(timeout=1200)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher passes it on to the processes it started
            printed, _ = process.communicate()
    assert process.returncode == 0, printed[-10_000:]
    return printed


def train_in_turn(
    config_file: Path | None, command_lines: list[list[str]], folder: Path, largest_file: dict[int, int] | None = None
) -> str:
    """Trains all of them in two processes each, one after the other; returns what they print.

    They are forks of a server: a launch takes 20 seconds, most of it imports, and training a tiny model two.

    Args:
        config_file: accelerate's; None is DDP.
        largest_file: number of a command line to the bytes beyond which rank 1 can then write no file.
    """
    printed = []
    for number, command_line in enumerate(command_lines):
        limit = (largest_file or {}).get(number)
        inside = functools.partial(limit_files_of_rank_1, limit) if limit else None
        output = folder / f"printed {number}.txt"
        run = forked_runs.start(command_line, output, config_file or "cpu", 2, inside=inside)
        assert run.wait(1200) == 0, f"failed: {' '.join(command_line)}\n{run.text[-10_000:]}"
        printed.append(run.text)
    return "".join(printed)


def limit_files_of_rank_1(largest: int) -> None:
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size (`4m`) in `folder`; where mounting is not permitted the test is skipped."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
