"""Check the output directory before the first step: shared by all machines, without leftovers, with room.

What would fail at the first save, hours later, fails here within a second.
"""

import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from ..files import flush_file
from ..model.trained import numel
from ..training.backend import gather_from_ranks
from ..training.checkpoint import agreement, rename_into_place
from ..training.manifest import CheckpointError
from ..training.sharded_state import KINDS
from ..words import counted
from .checkpoints import complete_checkpoints, remove_oldest
from .ownership import check_still_owned

SEEN_BY_ALL = ".seen-by-all-"
# Names of a run's unfinished files; nothing else may be removed as a leftover.
UNFINISHED_CHECK = re.compile(rf"{re.escape(SEEN_BY_ALL)}[0-9a-f]{{32}}(-\d+(\.incomplete)?)?")
UNFINISHED_FILE = re.compile(r"\..+\.[0-9a-f]{32}\.incomplete")
UNFINISHED_SAVE = re.compile(r"\.checkpoint-\d+\.(incomplete|removed)")


def remove_leftovers(output_dir: Path, step: int, keep: int | None) -> list[str]:
    """Remove what a killed run left unfinished; return a sentence for each. For one rank.

    Args:
        step: of the checkpoint that is resumed. Of the checkpoints up to it only the newest `keep` stay: a run killed
            between its last save and the removal of an old one has left one too many.
    """
    sentences = remove_oldest(output_dir, step, keep)
    for path in sorted(output_dir.glob(".*")):
        if UNFINISHED_CHECK.fullmatch(path.name) or UNFINISHED_FILE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        elif UNFINISHED_SAVE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
            state = "could not be removed; remove it yourself" if path.exists() else "is removed"
            sentences.append(f"{path}, left behind by a run that was killed while it saved, {state}.")
    return sentences


def check_shared(accelerator: Accelerator, output_dir: Path) -> str | None:
    """Raise CheckpointError on all ranks unless all see the same output directory and can save there.

    Returns a sentence if they can, but the file system cannot flush.
    """
    name = f"{SEEN_BY_ALL}{uuid.uuid4().hex}"
    with agreement(accelerator, f"{output_dir} (--output_dir) cannot be written"):
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / name).touch()
    name, host = gather_from_ranks(accelerator, (name, socket.gethostname()))[0]
    note = None
    try:
        with agreement(accelerator, f"{output_dir} (--output_dir) must be one folder that all machines share"):
            if not (output_dir / name).exists():
                raise CheckpointError(f"{socket.gethostname()} does not see what rank 0 wrote there on {host}.")
        with agreement(accelerator, f"{output_dir} (--output_dir) cannot hold what this run will save; choose another"):
            note = _try_a_save(output_dir, f"{name}-{accelerator.process_index}")
    finally:
        if accelerator.is_main_process:
            (output_dir / name).unlink(missing_ok=True)
    return next(filter(None, gather_from_ranks(accelerator, note)), None)


def _try_a_save(output_dir: Path, name: str) -> str | None:
    """Do with a small directory what a save does with a large one; return a sentence if it cannot be flushed.

    Raises:
        OSError: it cannot be written, or not renamed. Nothing is left behind.
    """
    temporary, final = output_dir / f"{name}.incomplete", output_dir / name
    try:
        temporary.mkdir()
        (temporary / "file").write_bytes(bytes(2**16))
        no_flush = flush_file(temporary / "file")
        no_flush = flush_file(temporary) or no_flush
        rename_into_place(temporary, final)
    finally:
        for path in (temporary, final):
            shutil.rmtree(path, ignore_errors=True)
    if no_flush is None:
        return None
    return (
        f"Warning: {output_dir} is on a file system that does not flush files and directories when asked to "
        f"({no_flush}). The run goes on: its training states survive a crash of the run, but perhaps not one of the "
        "machine."
    )


class DiskNeeds(NamedTuple):
    """What a run writes to its output directory."""

    states: int
    present: int
    bytes_of_state: int
    bytes_of_result: int

    @property
    def bytes(self) -> int:
        """Return the bytes that are still to be written."""
        return max(0, self.states - self.present) * self.bytes_of_state + self.bytes_of_result

    def warning(self, output_dir: Path) -> str | None:
        """Return a warning if the disk has less room than this; None if it has enough."""
        free = shutil.disk_usage(output_dir).free
        if self.bytes <= free:
            return None
        return (
            f"Warning: {output_dir} has {free / 1e9:,.3f} GB free, and this run needs {self}. Make room, or keep fewer "
            "with --save_total_limit."
        )

    def __str__(self) -> str:
        there = f" ({self.present} there already)" if self.present else ""
        states = f"{counted(self.states, 'training state')} of {self.bytes_of_state / 1e9:,.3f} GB{there}"
        return f"{self.bytes / 1e9:,.3f} GB: {states} and {self.bytes_of_result / 1e9:,.3f} GB for the result"


def disk_needs(
    model: nn.Module, itemsize: int, output_dir: Path, saves: int, keep: int | None, whole_model: bool
) -> DiskNeeds:
    """Return what the states and the result of a run need.

    Args:
        itemsize: bytes of a number in the result.
        saves: how many states the run will write.
        keep: how many of them stay; while the newest is written there is one more.
        whole_model: the result is the whole model, not the projector alone.
    """
    sizes = {name: numel(parameter) for name, parameter in model.named_parameters()}
    trained = sum(sizes[name] for name, parameter in model.named_parameters() if parameter.requires_grad)
    result = sum(size for name, size in sizes.items() if whole_model or name.startswith("projector."))
    count = saves if keep is None else min(saves, keep + 1)
    return DiskNeeds(count, len(complete_checkpoints(output_dir)), 4 * len(KINDS) * trained, itemsize * result)


@contextmanager
def writing_the_result(output_dir: Path) -> Iterator[None]:
    """Turn a failure to write the result into an OSError that says what to do; the training states are unchanged."""
    try:
        check_still_owned()
        yield
    except (OSError, SafetensorError) as error:
        present = complete_checkpoints(output_dir)
        since = f"goes on from {present[-1].name}" if present else "starts anew, as there is no training state"
        raise OSError(
            f"The result could not be written to {output_dir}: {error}. Make room, or give permission; "
            f"--resume_from_checkpoint latest then {since}."
        ) from error
