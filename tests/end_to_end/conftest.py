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
    """`two_processes(backend, name)`: the same on two."""
    folder = tmp_path_factory.mktemp("two_processes")

    def get(backend: str, name: str):
        if not (folder / backend / name).exists():
            (folder / backend).mkdir(exist_ok=True)
            runs.train_on_two(backend, name, folder / backend)
        return folder / backend / name

    return get
