"""What the flags name is there: files, folders, packages, a place to write. Looked at before anything is loaded.

A run that lacks one of them would find out by itself, some after hours of reading and measuring. Each sentence is the
one of the function that needs the thing, which looks for it again when it does. Neither torch nor transformers is
imported for it: that takes several seconds, and what is wrong with the flags is said in less than one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml

from .. import demo
from ..arguments import Arguments
from ..data_file import check_data_files
from ..errors import UserError
from ..files import STAGING
from ..formats.layouts import MODEL_FILES, find_adapter, find_projector
from ..options.packages import check_bitsandbytes, check_flash_attention, check_liger_kernel, check_tracker
from ..processes import launched_rank
from ..training.manifest import is_ours
from . import ownership
from .checkpoints import check_resume, complete_checkpoints, foreign_checkpoints
from .preemption import Preemption, remove_marker

# What a run overwrites or removes: its result, its reports, and where the result is prepared. Without what it writes
# before arguments.yaml, and a killed run leaves without that file: `cache`, `preempted`, `.owner`.
REPLACED = (
    *MODEL_FILES,
    *("arguments.yaml", "log.jsonl", "eval_samples.jsonl", "skipped.jsonl", "summary.json", "curves.png"),
    *(STAGING, "mm_projector.bin.unfinished"),
)


def look(arguments: Arguments, preemption: Preemption) -> None:
    """Check what a run needs before what it imports; end the program with a sentence if it cannot run."""
    try:
        check_run(demo.prepare_run(arguments)[0] if arguments.is_demo else arguments, preemption)
    except (UserError, OSError) as error:
        ownership.release()
        end_refused(error, Path(arguments.training.output_dir))


def end_refused(error: Exception, output_dir: Path) -> NoReturn:
    """End the program with a sentence, and no `preempted` file: started again, it would end like this again."""
    rank, _ = launched_rank()
    if not isinstance(error, BlockingIOError):  # of another run, which owns the directory
        remove_marker(output_dir)
    if rank > 0:
        time.sleep(5)  # mostly rank 0 has said the same by then, and the launcher has ended this process
    sys.exit(f"train.py: error{f' on rank {rank}' if rank else ''}: {error}")


def check_run(arguments: Arguments, preemption: Preemption) -> None:
    """Check all that a run needs and become the owner of its output directory, where signals leave their file from now.

    Raises OSError or UserError.
    """
    output_dir = Path(arguments.training.output_dir)
    check_what_a_run_needs(arguments)
    if launched_rank()[0] == 0:
        ownership.own(output_dir)
    preemption.output_dir = output_dir
    check_output(output_dir, arguments.training.resume_from_checkpoint)


def refuse_at_once(tool: str, exit_code: int, check: Callable, *values) -> None:
    """End a tool with a sentence if `check(*values)` fails, before it imports what takes seconds."""
    try:
        check(*values)
    except (UserError, OSError) as error:
        print(f"{tool}: error: {error}", file=sys.stderr)
        sys.exit(exit_code)


def check_files(arguments: Arguments, weights: bool = True) -> None:
    """Raise OSError or UserError, a sentence that names the flag, for a file or folder to read that is not there.

    weights: whether those of an earlier stage are looked for too; a plan may be made before that stage has run.
    """
    data, training = arguments.data, arguments.training
    if arguments.is_demo:  # which makes them
        return
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
        import torch  # which takes seconds, and a launcher has taken them too

        here = "it does so with use_cpu: true, and where no config names a kind of distribution"
        here += "" if torch.cuda.is_available() else "; there is no GPU here"
        raise UserError(
            f"The launcher was asked for several processes or machines and has started one process alone ({here}). "
            "Several on CPUs: torchrun --nproc_per_node 2 train.py ..., or a config of DeepSpeed; else leave "
            "--num_processes out. If one is meant, and MASTER_ADDR is your own: unset it."
        )


def check_place(output_dir: Path, flag: str = "--output_dir") -> None:
    """Raise OSError unless the directory exists or can be made, and is writable."""
    what = f"{output_dir} ({flag})"
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link that leads nowhere"
        inside = "is" if there == output_dir else f"cannot be made: {there} is"
        raise NotADirectoryError(f"{what} {inside} {kind}. Choose another, or move it away.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{what} cannot be written: {there}: {error.strerror or error}. Choose another.") from error


def check_nothing_is_replaced(output_dir: Path) -> None:
    """Raise FileExistsError if a run would remove or overwrite files of another program.

    A run writes `arguments.yaml` first, after this check: with it or a training state, results and reports are a run's
    own. Checkpoints are checked one by one, because LLaVA's have the same names.
    """
    foreign = foreign_checkpoints(output_dir)
    if not _is_ours(output_dir):
        there = sorted(path for pattern in REPLACED for path in output_dir.glob(pattern))
        foreign += [path for path in there if path.is_file() or path.name == STAGING]
    if foreign:
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        names = ", ".join(path.name for path in foreign[:3])
        raise FileExistsError(
            f"{output_dir} (--output_dir) holds {names}{more}, which no run of this program wrote and this one would "
            f"overwrite. Move {'them' if len(foreign) > 1 else 'it'} away, or choose another --output_dir."
        )


def _is_ours(output_dir: Path) -> bool:
    if any(map(is_ours, complete_checkpoints(output_dir))):
        return True
    try:
        arguments = yaml.safe_load((output_dir / "arguments.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(arguments, dict) and {"stage", "output_dir", "run"} <= arguments.keys()
