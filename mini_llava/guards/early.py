"""What the flags name is there: files, folders, packages, a place to write. Looked at before anything is loaded.

A run that lacks one of them would find out by itself, some after hours of reading and measuring. Each sentence is the
one of the function that needs the thing, which looks for it again when it does.
"""

import os
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..arguments import Arguments
from ..data.records import check_data_files
from ..errors import UserError
from ..model.projector import find_projector
from ..options.attention import check_flash_attention
from ..options.float8 import check_float8
from ..options.kernels import check_liger_kernel
from ..options.lora import find_adapter
from ..options.quantisation import check_bitsandbytes
from .checkpoints import check_resume
from .output_folder import check_nothing_is_replaced, check_place


def check_files(arguments: Arguments, weights: bool = True) -> None:
    """Raise OSError or UserError, a sentence that names the flag, for a file or folder to read that is not there.

    weights: whether those of an earlier stage are looked for too; a plan may be made before that stage has run.
    """
    data, training = arguments.data, arguments.training
    check_data_files(data.data_path, data.image_folder, data.exclude)
    if data.eval_data_path:
        check_data_files(data.eval_data_path, data.eval_image_folder, flag_prefix="eval_")
    if data.sample_order and not Path(data.sample_order).is_file():
        raise FileNotFoundError(f"The order {data.sample_order} (--sample_order) does not exist.")
    if weights and arguments.model.pretrain_mm_mlp_adapter:
        find_projector(arguments.model.pretrain_mm_mlp_adapter)
    if weights and training.lora_weight_path:
        find_adapter(training.lora_weight_path)


def check_what_a_run_needs(arguments: Arguments) -> None:
    """Check files, and what training needs besides: packages, the processes asked for, a place for what it writes.

    Raises:
        OSError: `--output_dir` cannot be written.
        UserError: a package is missing, or the launcher has started fewer processes than it was asked for.
    """
    training = arguments.training
    check_launch(os.environ)
    check_files(arguments)
    check_tracker(training.report_to)
    check_bitsandbytes(training.bits)
    check_liger_kernel(training.use_liger_kernel)
    check_float8(training.fp8, training.bits)
    check_flash_attention(arguments.model.attn_implementation)
    check_place(Path(training.output_dir))


def check_output(output_dir: Path, resume_from_checkpoint: str | None) -> None:
    """Check what an output directory holds, once this run owns it: before, it may be of a run that is going on.

    Raises:
        CheckpointError: `--resume_from_checkpoint` is not there, or checkpoints of an earlier run are.
        FileExistsError: it holds what is not a run's to replace.
    """
    check_resume(output_dir, resume_from_checkpoint)
    check_nothing_is_replaced(output_dir)


def check_launch(environment) -> None:
    """Raise UserError if `accelerate launch` was asked for several processes and has started one.

    Without GPUs it does so silently, unless told to use MPI: the address for the others is then all that is left.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    of_mpi = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"} & environment.keys()
    if by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment and not of_mpi:
        here = "it does so with use_cpu: true, and where no config names a kind of distribution"
        here += "" if torch.cuda.is_available() else "; there is no GPU here"
        raise UserError(
            f"The launcher was asked for several processes or machines and has started one process alone ({here}). "
            "Several on CPUs: torchrun --nproc_per_node 2 train.py ..., or a config of DeepSpeed; else leave "
            "--num_processes out. If one is meant, and MASTER_ADDR is your own: unset it."
        )


def check_tracker(report_to: str) -> None:
    """Raise UserError if a tracker is not installed or unknown."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("none", "all", *installed):
        # accelerate leaves out a tracker whose package is missing, and logs that at level DEBUG only.
        known = ", ".join(sorted({"none", *LoggerType.list()} - {*installed}))
        raise UserError(
            f"--report_to {report_to}: not installed or unknown. "
            f"Installed: {', '.join(installed)}; also known: {known}."
        )
