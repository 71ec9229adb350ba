"""The output directory: before the first step one for all machines, free of leftovers, with room; and a failed result.

What is found out here in a second costs hours if it is found out at the first save.
"""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from ..model.freeze import numel
from ..words import counted
from .checkpoint import KINDS, CheckpointError, agreement, complete_checkpoints, remove_oldest
from .distributed import compute_dtype, gather_from_ranks
from .ownership import check_still_owned

SEEN_BY_ALL = ".seen-by-all-"


def remove_leftovers(output_dir: Path, step: int, keep: int | None) -> list[str]:
    """Removes what a killed run had not finished writing or removing; returns a sentence for each. For one rank.

    Args:
        step: of the checkpoint that the run goes on from. Of those up to it, the oldest beyond `keep` go: a run killed
            between its last save and the removal of an old one would else leave one too many for good.
    """
    sentences = remove_oldest(output_dir, step, keep)
    for path in output_dir.glob(f"{SEEN_BY_ALL}*"):
        path.unlink(missing_ok=True)
    for path in sorted(output_dir.glob(".checkpoint-*")):
        if path.name.endswith((".incomplete", ".removed")):
            shutil.rmtree(path, ignore_errors=True)
            state = "could not be removed; remove it yourself" if path.exists() else "is removed"
            sentences.append(f"{path}, left behind by a run that was killed while it saved, {state}.")
    return sentences


def check_place(output_dir: Path, flag: str = "--output_dir") -> None:
    """Raises OSError unless the directory is there, or can be made, and can be written to. Leaves nothing behind."""
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


def check_shared(accelerator: Accelerator, output_dir: Path) -> None:
    """Raises CheckpointError on all ranks unless all see the same output directory, and can save there.

    Each rank does with a small file what a save does with large ones: writes, flushes, renames and removes it.
    """
    name = f"{SEEN_BY_ALL}{uuid.uuid4().hex}"
    with agreement(accelerator, f"{output_dir} (--output_dir) cannot be written"):
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / name).touch()
    name, host = gather_from_ranks(accelerator, (name, socket.gethostname()))[0]
    try:
        with agreement(accelerator, f"{output_dir} (--output_dir) must be one folder that all machines share"):
            if not (output_dir / name).exists():
                raise CheckpointError(f"{socket.gethostname()} does not see what rank 0 wrote there on {host}.")
        with agreement(accelerator, f"{output_dir} (--output_dir) cannot hold what this run will save"):
            _write_and_remove(output_dir / f"{name}-{accelerator.process_index}")
    finally:
        if accelerator.is_main_process:
            (output_dir / name).unlink(missing_ok=True)


def _write_and_remove(file: Path) -> None:
    renamed = file.with_name(f"{file.name}-renamed")
    try:
        with open(file, "wb") as opened:
            opened.write(bytes(2**16))
            opened.flush()
            os.fsync(opened.fileno())
        os.rename(file, renamed)
    finally:
        for path in (file, renamed):
            path.unlink(missing_ok=True)


def disk_note(
    accelerator: Accelerator, model: nn.Module, output_dir: Path, saves: int, keep: int | None, whole_model: bool
) -> str | None:
    """A sentence if the disk has no room for the states and the result of this run; None if it has.

    Args:
        saves: how many states the run will write.
        keep: how many of them stay; one more is there while the newest is written.
        whole_model: the result is the whole model and not the projector alone.
    """
    itemsize = compute_dtype(accelerator).itemsize
    needs = disk_needs(accelerator.unwrap_model(model), itemsize, output_dir, saves, keep, whole_model)
    free = shutil.disk_usage(output_dir).free
    if needs.bytes <= free:
        return None
    return (
        f"Warning: {output_dir} has {free / 1e9:,.3f} GB free, and this run needs {needs}. Make room, or keep fewer "
        "with --save_total_limit."
    )


class DiskNeeds(NamedTuple):
    """What a run writes to its output directory, as the sizes of its parameters say."""

    states: int
    present: int
    bytes_of_state: int
    bytes_of_result: int

    @property
    def bytes(self) -> int:
        return max(0, self.states - self.present) * self.bytes_of_state + self.bytes_of_result

    def __str__(self) -> str:
        there = f" ({self.present} there already)" if self.present else ""
        states = f"{counted(self.states, 'training state')} of {self.bytes_of_state / 1e9:,.3f} GB{there}"
        return f"{self.bytes / 1e9:,.3f} GB: {states} and {self.bytes_of_result / 1e9:,.3f} GB for the result"


def disk_needs(
    model: nn.Module, itemsize: int, output_dir: Path, saves: int, keep: int | None, whole_model: bool
) -> DiskNeeds:
    """Arguments as `disk_note` has them; itemsize: bytes of a number in the result."""
    sizes = {name: numel(parameter) for name, parameter in model.named_parameters()}
    trained = sum(sizes[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    result = sum(size for name, size in sizes.items() if whole_model or name.startswith("projector."))
    count = saves if keep is None else min(saves, keep + 1)
    return DiskNeeds(count, len(complete_checkpoints(output_dir)), 4 * len(KINDS) * trained, itemsize * result)


@contextmanager
def writing_the_result(output_dir: Path) -> Iterator[None]:
    """Raises OSError with what to do, if files written inside fail; the training states are as they were."""
    try:
        check_still_owned()
        yield
    except (OSError, SafetensorError) as error:
        present = complete_checkpoints(output_dir)
        since = f"goes on from {present[-1].name}" if present else "starts anew, for there is no training state"
        raise OSError(
            f"The result could not be written to {output_dir}: {error}. Make room, or give permission; "
            f"--resume_from_checkpoint latest then {since}."
        ) from error
