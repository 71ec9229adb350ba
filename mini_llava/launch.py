"""Starts the ranks of a run: `python -m mini_llava.launch --config_file accelerate_configs/zero3.yaml train.py ...`.

It is `accelerate launch`, with its flags, but the sentence in which a run says what is wrong is the last thing printed:
accelerate and torchrun add tracebacks and a report of their own behind it. The exit code is the run's, and a run of one
process takes this one's place, so that signals and Ctrl-C reach it.
"""

import argparse
import logging
import os
import signal
import sys

import psutil
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import get_int_from_env
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from .errors import UserError
from .guards.output_streams import drop_what_cannot_be_printed

# How many processes MPI has started on this machine.
MPI_PROCESSES = ["MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]


def give_defaults(given: argparse.Namespace) -> None:
    """Set what neither flags nor a config file say, to what accelerate takes: by itself it warns of each value.

    Without a config these are the processes, one for each GPU, one machine, and no mixed precision (--bf16 and --fp16
    decide that) and no compilation; on CPUs the threads of a process, unless OMP_NUM_THREADS says how many.

    Raises:
        UserError: a config file or an environment variable that accelerate would end over with a traceback.
    """
    on_cpu, gpus = given.cpu, torch.cuda.device_count()
    if given.config_file is not None or (os.path.isfile(default_config_file) and not given.cpu):
        config = _read_config(given.config_file)
        on_cpu = config.use_cpu
        processes = config.num_processes if given.num_processes is None else given.num_processes
        machines = config.num_machines if given.num_machines is None else given.num_machines
    else:
        processes = gpus if given.num_processes is None else given.num_processes
        if not given.multi_gpu:  # with which accelerate takes a single process if nobody names it
            given.num_processes = processes
        given.num_machines = machines = 1 if given.num_machines is None else given.num_machines
        given.mixed_precision = given.mixed_precision or "no"
        given.dynamo_backend = given.dynamo_backend or "no"
        others = given.cpu or given.tpu or given.use_deepspeed or given.use_fsdp or given.use_megatron_lm
        given.multi_gpu = given.multi_gpu or (min(gpus, processes) > 1 and not others)
    if not isinstance(processes, int) or not isinstance(machines, int) or machines < 1:
        given_as = f"num_processes is {processes!r} and num_machines {machines!r}"
        raise UserError(f"{given_as}: both must be whole numbers, with at least one machine.")
    threads_are_named = given.num_cpu_threads_per_process is not None or _number(["OMP_NUM_THREADS"], 0)
    if on_cpu and processes >= 1 and not threads_are_named:
        of_machine = max(1, _number(MPI_PROCESSES, processes // machines))
        given.num_cpu_threads_per_process = max(1, (psutil.cpu_count(logical=False) or 1) // of_machine)


def _read_config(path: str | None):
    """Return accelerate's config of a file, None: of its default one. Raises UserError, which names the file."""
    try:
        return load_config_from_file(path)
    except (yaml.YAMLError, AttributeError, TypeError) as error:  # broken, or not `name: value` lines
        is_yaml = not isinstance(error, yaml.YAMLError)
        reason = "it must hold `name: value` lines" if is_yaml else " ".join(str(error).split())
        raise UserError(f"{path or default_config_file} is not a config of accelerate: {reason}.") from None


def _number(names: list[str], default: int) -> int:
    """Return what accelerate reads from the first of these environment variables that is set. Raises UserError."""
    try:
        return get_int_from_env(names, default)
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise UserError(f"{values}: accelerate takes a whole number; set one, or unset the variable.") from None


def become(given) -> None:
    """Replace accelerate's `simple_launcher`, which starts the one process as a child and passes no signal on."""
    command, environment = prepare_simple_launcher_cmd_env(given)
    if (given.num_processes or 1) == 1 and given.num_machines == 1:
        environment.pop("MASTER_ADDR", None)  # of a job script: `check_launch` would take it for accelerate's
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def first_to_fail(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return the rank that failed by itself: torchrun ends the others by SIGTERM."""
    of_ranks = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    by_themselves = [item for item in of_ranks if item[1].exitcode != -signal.SIGTERM]
    return (by_themselves or of_ranks)[0]


def main() -> None:
    drop_what_cannot_be_printed()
    given = launch.launch_command_parser().parse_args()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # tells which processes it ends, behind the sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
    launch.simple_launcher = become
    try:
        give_defaults(given)
        launch.launch_command(given)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = first_to_fail(error)
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)  # it has said why
        print(
            f"launch: rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}; the system's log "
            "(dmesg: out of memory?) may say why.",
            file=sys.stderr,
        )
        sys.exit(128 - failure.exitcode)
    except (ValueError, OSError, ImportError, AssertionError) as error:  # about the launcher's own flags
        nothing = f"with --num_processes {given.num_processes} there is nothing to start; name how many, or a config."
        sys.exit(f"launch: error: {str(error) or nothing}")


if __name__ == "__main__":
    main()
