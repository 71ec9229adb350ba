"""Nothing outlives what started it: workers end with a killed run, and a run saves and ends when its launcher dies."""

import contextlib
import json
import os
import signal
import time

import psutil
import pytest

from mini_llava import processes
from mini_llava.data import lengths
from mini_llava.guards import preemption
from mini_llava.processes import WorkerKilled, map_ranges
from mini_llava.training.checkpoint import read_manifest
from tests.end_to_end import runs
from tests.forked_runs import start
from tests.launching import CONFIGS

pytestmark = pytest.mark.slow

SETTINGS = {"max_steps": 5000, "save_steps": 5000, "global_batch_size": 4, "dataloader_num_workers": 2}


def below(run) -> list[psutil.Process]:
    return psutil.Process(run.process.pid).children(recursive=True)


def wait_for_all(run, ended: list[psutil.Process], seconds: float = 30) -> None:
    """Until they have ended; a process that holds the run's output is one of it, too."""
    _, alive = psutil.wait_procs(ended, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive, f"still there: {alive}\n{run.text}"


def measure_slowly() -> None:
    """In the rank."""
    scan = lengths._scan_part
    lengths._scan_part = lambda *arguments: time.sleep(60) or scan(*arguments)


def test_a_run_that_is_killed_while_it_measures_records_leaves_no_process_and_no_lock(tmp_path):
    many = json.loads((runs.FIXTURES / "data" / "train_stage2.json").read_text())
    (tmp_path / "many.json").write_text(json.dumps(many * (2000 // len(many) + 1)))
    flags = runs.flags_of(2, tmp_path / "run", SETTINGS | {"data_path": tmp_path / "many.json"})
    run = start(flags, tmp_path / "printed.txt", inside=measure_slowly)
    run.wait_until(lambda: len(below(run)) == 3)  # the rank and two that measure
    rank, *others = below(run)
    rank.kill()
    wait_for_all(run, others)


def test_a_run_that_is_killed_while_it_trains_leaves_no_process(tmp_path):
    run = start(runs.flags_of(2, tmp_path / "run", SETTINGS), tmp_path / "printed.txt")
    run.wait_until((tmp_path / "run" / "log.jsonl").exists)
    rank, *workers = below(run)
    assert len(workers) == 2
    rank.suspend()
    rank.kill()
    wait_for_all(run, workers, seconds=3)


def kill_itself(part: range) -> range:
    if part.start == 512:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_process_of_a_pool_that_the_system_kills_is_a_sentence():
    said = r"was killed while measuring records, after 512 of 1,500; .*out of memory.* Fewer --num_workers need"
    with pytest.raises(WorkerKilled, match=said):
        list(map_ranges(kill_itself, 1500, 2, "measuring records"))


def trained_by_a_launcher(folder, config, count):
    run = start(runs.flags_of(2, folder / "run", SETTINGS), folder / "printed.txt", config, count, launched=True)
    run.wait_until((folder / "run" / "log.jsonl").exists)
    return run


def test_a_run_whose_launcher_alone_is_signalled_saves_and_ends(tmp_path):
    """accelerate's, which waits for the one process and passes nothing on."""
    run = trained_by_a_launcher(tmp_path, CONFIGS / "cpu.yaml", 1)
    everything = below(run)
    os.kill(run.process.pid, signal.SIGTERM)
    wait_for_all(run, everything)
    assert_it_has_saved(tmp_path / "run", run)


def test_the_ranks_of_a_killed_torchrun_save_and_end(tmp_path):
    run = trained_by_a_launcher(tmp_path, runs.config_file("zero3", tmp_path), 2)
    everything = below(run)
    os.kill(run.process.pid, signal.SIGKILL)
    wait_for_all(run, everything, seconds=60)
    assert_it_has_saved(tmp_path / "run", run)


def assert_it_has_saved(output, run) -> None:
    step = json.loads((output / "preempted").read_text())["step"]
    assert read_manifest(output / f"checkpoint-{step}")["step"] == step >= 1
    assert "The launcher of this run has ended" in run.text and "Traceback" not in run.text


def take_the_parent_for_a_launcher() -> None:
    """In the rank."""
    preemption.launcher = os.getppid


def test_after_ctrl_c_the_end_of_the_launcher_is_no_second_signal(tmp_path):
    flags = runs.flags_of(2, tmp_path / "run", SETTINGS)
    run = start(flags, tmp_path / "printed.txt", inside=take_the_parent_for_a_launcher)
    run.wait_until((tmp_path / "run" / "log.jsonl").exists)
    rank, *workers = below(run)
    rank.send_signal(signal.SIGINT)
    run.wait_until(lambda: "SIGINT: the run" in run.text)
    rank.suspend()
    time.sleep(preemption.SECONDS_OF_ONE_PRESS + 0.2)
    os.kill(run.process.pid, signal.SIGKILL)
    rank.resume()
    wait_for_all(run, [rank, *workers])
    assert list((tmp_path / "run").glob("checkpoint-*/manifest.json")) and not (tmp_path / "run" / "preempted").exists()


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        (["python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "-u", "/venv/bin/torchrun", "--nproc_per_node", "2", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["python", "-m", "mini_llava.launch", "train.py"], True),
        (["bash"], False),
        (["bash", "-c", "accelerate launch train.py; python train.py"], False),
        (["python", "sweep.py", "accelerate"], False),
        (["python", "-m", "sweep", "torchrun"], False),
    ],
)
def test_a_launcher_is_known_by_its_command_line_and_a_shell_is_none(command, is_one, monkeypatch):
    monkeypatch.setattr(processes.Path, "read_bytes", lambda path: "\0".join([*command, ""]).encode())
    assert (processes.launcher() == os.getppid()) == is_one
