"""The runs that several test files here compare, each trained when it is first asked for."""

import pytest

from tests.end_to_end import runs


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """`one_process(name)`: the output directory of that run on one process."""
    folder = tmp_path_factory.mktemp("one_process")

    def get(name: str):
        if not (folder / name).exists():
            runs.train_here(runs.command_line(name, folder))
        return folder / name

    return get


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """`two_processes(backend, name)`: the same on two, where the first call makes all runs of that backend."""
    folders = {}

    def get(backend: str, name: str):
        if backend not in folders:
            folders[backend] = tmp_path_factory.mktemp(backend)
            runs.launch_all(backend, folders[backend])
        return folders[backend] / name

    return get
