"""Runs of `train.py` in two processes on the CPU, in turn, as forks."""

import contextlib
import functools
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked_runs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"


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
