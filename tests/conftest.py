"""What holds for all tests."""

import math
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # see `one_thread`; for the processes that tests start, too

import torch

from tests.packages_read_once import read_packages_once
from tests.undrawn import write_undrawn

# As in an activated environment: DeepSpeed's operators are compiled by the ninja that is found first, and each version
# compiles anew what another one did.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

read_packages_once()

# The files that take more than ten CPU seconds, longest first; the first compiles an operator of DeepSpeed.
LONGEST = (
    *("test_five_steps.py", "test_two_machines.py", "test_resume.py", "test_demo.py", "test_launcher.py"),
    *("test_families.py", "test_preemption.py", "test_crashes.py", "test_evaluation.py", "test_curves.py"),
    *("test_lora.py", "test_one_global_batch.py", "test_speed_and_loss.py", "test_other_settings.py"),
    *("test_against_llama_factory.py", "test_world_size.py", "test_any_layout.py", "test_evaluation_speed.py"),
    *("test_anyres.py", "test_exported_prompts.py", "test_memory.py", "test_checkpoint_faults.py", "test_readme.py"),
    *("test_adapters_elsewhere.py", "test_hub_names.py", "test_copy_alone.py", "test_readme_commands.py"),
    *("test_planning.py", "test_preflight.py", "test_recipes.py"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole folders are tested by a process for each core, file by file, where pytest-xdist is installed."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if config.option.numprocesses is None and all(Path(name).is_dir() for name in config.args):
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), 4)  # each takes 1.5 GB, and as much for its runs
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_configure(config):
    """GPUs are hidden from all tests but those that need one, `-m gpu`.

    Liger's kernels change transformers' classes for the whole process, what is compared to the last bit was recorded on
    CPUs, and the ranks of a test cannot share a GPU.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """For several processes the long files come first, so that none is left for the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places) + (item.path not in slow)))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models are tiny: a second thread costs more than it computes, and other processes need the core.

    Before any other fixture: runs that are compared to the last bit need the same number of threads.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def undrawn_curves():
    """Runs in this process draw no curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_llava.watch.summary.draw_curves", write_undrawn)
        yield


@pytest.fixture(autouse=True)
def environment_put_back():
    """Accelerate and some tests set variables that every process started later would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if (
        "accelerate.state" in sys.modules
    ):  # a run that ended between two micro-batches leaves optimizers that do not step
        sys.modules["accelerate.state"].GradientState._reset_state()


def pytest_terminal_summary(terminalreporter):
    """The largest differences that the parity tests noted, as one table. They come with the tests' reports, since the
    tests run in other processes than this; that is also why it is not in tests/parity/conftest.py, unread here."""
    figures: dict[tuple[str, str], tuple[float, float]] = {}
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    noted = [value for report in reports for name, value in report.user_properties if name == "parity"]
    for what, reference, difference, limit in noted:
        largest, _ = figures.get((what, reference), (0.0, 0.0))
        figures[what, reference] = (difference if math.isnan(difference) else max(largest, difference), limit)
    if not figures:
        return
    show = lambda value: f"{value:.1e}" if value else "equal"  # noqa: E731
    rows = [("what", "reference", "largest difference", "allowed")]
    rows += [(*key, show(largest), show(limit)) for key, (largest, limit) in figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    terminalreporter.section("parity with LLaVA")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
