"""What the parity tests share: the figures they record, printed as one table at the end, and the runs of `train.py`.

Comparisons go through the fixture `agree`, so that no test passes without its largest difference being shown.
"""

import math
import os

import pytest
import torch

from tests.parity import runs
from tests.parity.golden import write_projector

FIGURES = pytest.StashKey[dict[tuple[str, str], tuple[float, float]]]()


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu_with_one_thread():
    """The recordings were made so: sums in another order differ in their last digits."""
    threads, before = torch.get_num_threads(), os.environ.get("ACCELERATE_USE_CPU")
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("ACCELERATE_USE_CPU")
    if before is not None:
        os.environ["ACCELERATE_USE_CPU"] = before


@pytest.fixture(scope="session")
def agree(pytestconfig):
    """`agree(what, reference, difference, limit)` notes the difference for the table, then demands that it be small."""
    figures = pytestconfig.stash.setdefault(FIGURES, {})

    def note(what: str, reference: str, difference: float, limit: float) -> None:
        largest, _ = figures.get((what, reference), (0.0, 0.0))
        figures[what, reference] = (difference if math.isnan(difference) else max(largest, difference), limit)
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
    """`two_processes(backend, name)`: the same, by all runs of a backend in one launch, since launching takes long."""
    launched = {}

    def get(backend: str, name: str) -> runs.Run:
        if backend not in launched:
            folder = tmp_path_factory.mktemp(backend)
            launched[backend] = runs.launch(backend, folder, golden_projector)
        return launched[backend][name]

    return get


def pytest_terminal_summary(terminalreporter, config):
    figures = config.stash.get(FIGURES, {})
    if not figures:
        return
    show = lambda value: f"{value:.1e}" if value else "equal"  # noqa: E731
    rows = [("what", "reference", "largest difference", "allowed")]
    rows += [(*key, show(largest), show(limit)) for key, (largest, limit) in figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    terminalreporter.section("parity with LLaVA")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
