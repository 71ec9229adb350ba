"""Runs of train.py as processes of their own that start in a second instead of ten.

A server process imports torch, transformers, DeepSpeed and the project once and does nothing with them. Each run is a
fork of it that executes train.py as `__main__` with the flags of its command line and the environment variables that
`accelerate launch` sets for a config file. With `launched` it is the launcher itself.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parent.parent

_fork_server = multiprocessing.get_context("forkserver")
_fork_server.set_forkserver_preload(["tests.forked_runs_imports"])


class Run:
    """A started run; `text` is what its processes have printed so far."""

    def __init__(self, process: multiprocessing.Process, output: Path):
        self.process, self.output = process, output

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 300) -> int:
        """The exit code; a run that takes longer is killed, and what it has printed is the error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.text}")
        return self.process.exitcode

    def wait_until(self, condition, timeout: float = 300) -> None:
        """Polls `condition` often enough to act between two steps; an error if the run ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.exitcode is None and time.monotonic() < deadline, f"it ended too soon:\n{self.text}"
            time.sleep(0.005)

    def wait_until_all_have_ended(self, grace: float) -> None:
        """For the processes a killed one leaves behind; SIGKILL ends those that take longer than `grace` seconds."""
        self.process.join()
        deadline = time.monotonic() + grace
        with open(self.output) as output:
            while True:
                with contextlib.suppress(BlockingIOError):  # the processes of the run hold it until the last one ends
                    return fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)
                time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to launcher, ranks and loader workers at once."""
        leader = psutil.Process(self.process.pid)
        everything = [leader, *leader.children(recursive=True)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(everything, timeout=60)
        self.process.join()


def start(
    flags: list[str],
    output: Path,
    config: str | Path | None = None,
    processes: int = 1,
    launched: bool = False,
    environment: dict | None = None,
    program: str = "train.py",
    inside: Callable[[], None] | None = None,
) -> Run:
    """Starts `python train.py FLAGS`, or with `config` what `accelerate launch` makes of it.

    Args:
        output: file for all that is printed.
        config: a config file, or the name of one in accelerate_configs; `cpu` with several processes is DDP.
        launched: start by `accelerate launch --config_file` indeed.
        environment: further variables.
        program: another one than train.py, relative to the repository, or a module's name as `python -m` takes it.
        inside: called in every rank before the program begins, not with `launched`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(b"")
    port = _free_port()
    if isinstance(config, str):
        config = ROOT / "accelerate_configs" / f"{config}.yaml"
    if launched:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--config_file", str(config), "--main_process_port", port]
        target, arguments = _execute, ([*command, program, *flags],)
    else:
        target, arguments = _start_ranks, (program, flags, config, processes, port, inside)
    process = _fork_server.Process(target=_prepare, args=(output, environment or {}, target, arguments))
    process.start()
    return Run(process, output)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _prepare(output: Path, environment: dict, target, arguments: tuple) -> None:
    """In the fork."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.setpgrp()  # all processes of the run are one group
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):  # of the test that happened to start the server
            del os.environ[name]
    os.environ.update(environment)
    os.chdir(ROOT)
    # A child of a fork server would start loader workers by a server of its own, unlike the program that is tested.
    multiprocessing.set_start_method("fork", force=True)
    target(*arguments)


def _execute(command: list[str]) -> None:
    os.execv(command[0], command)


def _start_ranks(program: str, flags: list[str], config: Path | None, processes: int, port: str, inside) -> None:
    """Starts the ranks where `accelerate launch` would have torchrun start them, in the environment it has made."""
    fork = functools.partial(_fork_ranks, program, flags, processes, inside)
    if config is None:
        return fork()
    os.environ.update(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if config.stem == "cpu":  # accelerate starts several processes on CPUs through MPI only
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return fork()
    torch.distributed.run.run = lambda options: fork()
    words = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", port, program]
    launch_command(launch_command_parser().parse_args(words))


def _fork_ranks(program: str, flags: list[str], processes: int, inside) -> None:
    """Starts them, waits for them, and like torchrun ends the others when one has failed."""
    ranks = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            if "WORLD_SIZE" in os.environ:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if inside is not None:
                inside()
            _become(program, flags)
        ranks.append(pid)
    for _ in range(processes):
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGTERM)
            sys.exit(os.waitstatus_to_exitcode(status))


def _become(program: str, flags: list[str]) -> None:
    # However the tests were started: a shell's background job ignores the one, and what nohup starts the other.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = [program, *flags]
    code = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:  # as the interpreter treats it
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
