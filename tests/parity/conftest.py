"""What the parity tests share: the figures they record, which tests/conftest.py prints, and the runs of `train.py`.

Comparisons go through the fixture `agree`, so that no test passes without its largest difference being shown.
"""

import pytest

from tests.parity import runs
from tests.parity.golden import write_projector


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The recordings were made there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def agree(record_property):
    """`agree(what, reference, difference, limit)` notes the difference for the table, then demands that it be small."""

    def note(what: str, reference: str, difference: float, limit: float) -> None:
        record_property("parity", (what, reference, float(difference), float(limit)))
        assert difference <= limit, f"{what}: {difference:.3g} from {reference}, allowed is {limit:.3g}"

    return note


@pytest.fixture(scope="session")
def golden_projector(tmp_path_factory):
    """The projector that the recordings start from, as a file of its own."""
    return write_projector(tmp_path_factory.mktemp("start") / "projector.safetensors")


@pytest.fixture(scope="session")
def one_process(tmp_path_factory, golden_projector):
    """`one_process(name)`: the `Run` of that name, trained in this process when first asked for."""
    folder, done = tmp_path_factory.mktemp("one_process"), {}

    def get(name: str) -> runs.Run:
        if name not in done:
            done[name] = runs.train_here(name, folder, golden_projector)
        return done[name]

    return get


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory, golden_projector):
    """`two_processes(backend, name)`: the same in two processes."""
    folder, done = tmp_path_factory.mktemp("two_processes"), {}

    def get(backend: str, name: str) -> runs.Run:
        if (backend, name) not in done:
            (folder / backend).mkdir(exist_ok=True)
            done[backend, name] = runs.train_on_two(backend, name, folder / backend, golden_projector)
        return done[backend, name]

    return get
