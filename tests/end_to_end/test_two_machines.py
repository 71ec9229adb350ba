"""The README's commands for several machines, with one rank on each of two, train one run as a single launcher does.

Both "machines" are this one, each with a launcher of its own. One run goes through all three commands: it is stopped as
Slurm stops it, goes on under plain launchers until a rank is killed, and ends under torchrun. Slurm itself is not here:
two small scripts stand for `srun` and `scontrol`.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end import runs
from tests.forked_runs import start
from tests.launching import ROOT
from tests.readme import block_with

STEPS = 14
SETTINGS = runs.MODEL_AND_DATA | {
    "data_path": runs.FIXTURES / "data" / "train_stage2.json",
    "max_steps": STEPS,
    "save_steps": 4,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 1,
    "learning_rate": 1e-3,
}
# What a Slurm job script calls: a task on each machine, the names of the machines, and the queue.
SRUN = """
for SLURM_PROCID in 0 1; do SLURM_PROCID=$SLURM_PROCID "$@" & done
wait
"""
SCONTROL = """
if [ $1 = show ]; then echo 127.0.0.1; else echo "$@" > requeued; fi
"""

pytestmark = pytest.mark.slow


def commands() -> list[str]:
    return [block_with(text) for text in ("--num_machines 2", "torchrun --nnodes 2", "#SBATCH")]


def on_this_machine(command: str, folder: Path) -> str:
    """The command for one process a machine, in a folder of the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {
        "10.0.0.1": "127.0.0.1",
        "29500": str(port),
        "accelerate_configs/": f"{ROOT}/accelerate_configs/",
        "train.py": f"{ROOT}/train.py",
        "--num_processes 16": "--num_processes 2",
        "8 * SLURM_NNODES": "1 * SLURM_NNODES",
        "--nproc_per_node 8": "--nproc_per_node 1",
        "outputs/my-run": str(folder / "run"),
    }
    for old, new in changes.items():
        command = command.replace(old, new)
    return command


@dataclass
class Started:
    """A shell that runs commands, and what it has printed."""

    process: psutil.Popen
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def launchers(self) -> list[psutil.Process]:
        """The processes that have started ranks: those whose child has a rank and that have none themselves."""
        found = []
        for process in [self.process, *self.process.children(recursive=True)]:
            children = process.children()
            if children and "RANK" not in process.environ() and "RANK" in children[0].environ():
                found.append(process)
        return found

    def rank(self, rank: int) -> psutil.Process:
        processes = (launcher.children()[0] for launcher in self.launchers())
        return next(process for process in processes if process.environ()["RANK"] == str(rank))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """`shell(name, script)`: starts it as a process group of its own, in the folder that all of the test share."""
    folder = tmp_path_factory.mktemp("two_machines")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    environment |= {"SLURM_JOB_NODELIST": "this[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "17"}
    started = []

    def run(name: str, script: str) -> Started:
        output = folder / f"{name}.txt"
        with output.open("wb") as file:
            process = psutil.Popen(
                ["bash", "-c", script], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)
        return Started(process, output)

    run.folder = folder
    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def log(folder: Path) -> list[dict]:
    file = folder / "run" / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition, *shells: Started) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        ended = [s.text for s in shells if s.process.poll() is not None]
        assert not ended and time.monotonic() < deadline, "\n\n".join(s.text for s in shells)
        time.sleep(0.01)


def end(*shells: Started, within: float) -> list[int]:
    _, alive = psutil.wait_procs([s.process for s in shells], timeout=within)
    assert not alive, "\n\n".join(s.text for s in shells)
    return [s.process.returncode for s in shells]


@pytest.fixture(scope="module")
def story(shell):
    """The run and all that was seen on the way, by name; and beside it the same run in two ranks of one launcher."""
    folder, seen = shell.folder, {}
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!/bin/bash{content}")
        (folder / name).chmod(0o755)
    language_model = shutil.copytree(runs.FIXTURES / "llm", folder / "llm")
    config = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    settings = SETTINGS | {"model_name_or_path": language_model}
    own = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    (folder / "my_run.yaml").write_text(yaml.safe_dump(own | {"output_dir": str(folder / "run")}))
    plain, torchrun, slurm = commands()

    whole = start(runs.flags_of(2, folder / "whole", settings), folder / "whole.txt", "zero3", 2)

    job = shell("slurm", on_this_machine(slurm, folder))
    wait_for(lambda: log(folder), job)
    for launcher in job.launchers():
        launcher.send_signal(signal.SIGUSR1)  # as Slurm signals the tasks of a job
    end(job, within=60)
    seen["slurm"] = job.text
    seen["marker"] = json.loads((folder / "run" / "preempted").read_text())
    seen["requeued"] = (folder / "requeued").read_text()
    assert whole.wait() == 0, whole.text

    command = on_this_machine(plain, folder)
    machines = [shell(f"plain{n}", command.replace("--machine_rank 0", f"--machine_rank {n}")) for n in (0, 1)]
    beyond = folder / "run" / "checkpoint-8" / "manifest.json"
    wait_for(lambda: beyond.exists() and log(folder)[-1]["step"] > 8, *machines)
    victim = machines[1].rank(1)
    seen["pid"] = victim.pid
    victim.kill()
    killed = time.monotonic()
    seen["codes"] = end(*machines, within=60)
    seen["seconds"] = time.monotonic() - killed
    seen["machine 0"], seen["machine 1"] = (machine.text for machine in machines)
    seen["steps before the kill"] = log(folder)[-1]["step"]

    command = on_this_machine(torchrun, folder)
    machines = [shell(f"torchrun{n}", command.replace("--node_rank 0", f"--node_rank {n}")) for n in (0, 1)]
    seen["last codes"] = end(*machines, within=300)
    seen["torchrun"] = machines[0].text
    return seen


def test_a_slurm_job_that_is_stopped_saves_and_is_queued_again(story):
    assert "SIGUSR1: the run saves its state" in story["slurm"]
    assert 1 <= story["marker"]["step"] < STEPS and story["requeued"] == "requeue 17\n"


def test_a_rank_killed_on_one_machine_is_named_on_the_other_and_ends_both_launchers(story):
    assert story["codes"] == [1, 128 + signal.SIGKILL] and story["steps before the kill"] < STEPS
    assert f"error: Rank 1 (pid {story['pid']} on {socket.gethostname()}) has ended" in story["machine 0"]
    assert f"launch: rank 1 (pid {story['pid']}) was ended by SIGKILL" in story["machine 1"].splitlines()[-1]
    print(f"both launchers had ended {story['seconds']:.1f} s after the kill")
    assert story["seconds"] < 15  # the launchers look at their processes now and then


def test_the_run_on_two_machines_has_the_bits_of_the_run_on_one(story, shell):
    assert story["last codes"] == [0, 0], story["torchrun"]
    assert "2 processes, DeepSpeed ZeRO-3" in story["torchrun"] and "at step 8." in story["torchrun"]

    def losses(run):
        return {entry["step"]: (entry["loss"].hex(), entry["gradient_norm"].hex()) for entry in runs.log(run)}

    def weights(run):
        return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}

    assert losses(shell.folder / "run") == losses(shell.folder / "whole")
    assert weights(shell.folder / "run") == weights(shell.folder / "whole") != {}
