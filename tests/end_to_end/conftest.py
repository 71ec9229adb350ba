"""The runs that several test files here compare, each trained once, when it is first asked for."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end import runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`trained(place, run, train)`: its output directory, by `train(folder)` unless it is there.

    The processes of pytest-xdist share them: whoever comes second waits.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"

    def get(place: str, run: str, train: Callable[[Path], None]) -> Path:
        own = folder / place / run
        own.mkdir(parents=True, exist_ok=True)
        with open(own / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (own / run).exists():
                train(own)
        return own / run

    return get


@pytest.fixture(scope="session")
def one_process(trained):
    """`one_process(name)`: the output directory of that run on one process."""
    return lambda name: trained("one", name, lambda folder: runs.train_here(runs.command_line(name, folder)))


@pytest.fixture(scope="session")
def two_processes(trained):
    """`two_processes(backend, name)`: the same on two."""
    return lambda backend, name: trained(backend, name, lambda folder: runs.train_on_two(backend, name, folder))
