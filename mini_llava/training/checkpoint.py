"""Training states: written whole or not at all, read back bit for bit, by any number of processes.

Each trained parameter has an fp32 master and AdamW's two moments. However they are distributed, each rank holds flat
pieces of named parameters (`sharded_state.py`). It writes them to its own safetensors files, without gathering
anything, and a loading rank copies the ranges it holds out of all files. So there is one format, no pickle, no
dependence on the number of processes, and all ranks write in parallel. Frozen weights are not in it: they come from the
model the run was started from.
"""

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from ..files import flush, flush_file
from ..words import counted
from .backend import create_moments, gather_from_ranks, versions
from .manifest import FORMAT, CheckpointError, digest, hide, is_ours, manifest_checksum, read_manifest
from .sharded_state import ShardedState

BYTES_PER_FILE = 2**30  # a rank with a GPU holds as much in CPU memory while it writes


# What files can fail with. Anything else is a bug, which must not pass for a full disk.
FAILURES = (OSError, SafetensorError, CheckpointError)


Gather = Callable[[Accelerator, object], list]  # JSON values of all ranks, as `gather_from_ranks` does it
Tensors = dict[str, torch.Tensor]


@contextmanager
def agreement(accelerator: Accelerator, what: str, gather: Gather = gather_from_ranks) -> Iterator[None]:
    """Raise CheckpointError on all ranks if the block fails on any, with the reasons and the ranks.

    Without it one rank raises and the others wait in their next collective until a timeout ends them. So the block must
    not hold a collective after something that may fail.
    """
    error = None
    try:
        yield
    except FAILURES as caught:
        error = caught
    reasons = gather(accelerator, None if error is None else str(error) or type(error).__name__)
    if failed := {rank: reason for rank, reason in enumerate(reasons) if reason is not None}:
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
        if len(failed) == len(reasons) and len(set(reasons)) == 1:
            text = reasons[0]
        text = text if "\n" in text else text.removesuffix(".") + "."  # an OSError has no full stop
        raise CheckpointError(f"{what}: {text}") from error


# --- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(*arguments, **others) -> str:
    """Begin a checkpoint, see `begin_checkpoint`, and write it while all ranks wait; return a sentence about it."""
    begun = begin_checkpoint(*arguments, **others)
    return begun.write(begun.tensors())


def begin_checkpoint(
    state: ShardedState,
    output_dir: Path,
    step: int,
    description: dict,
    write_weights: Callable[[Path], None] | None = None,
    check_owner: Callable[[], None] | None = None,
) -> "Begun":
    """Begin `output_dir/checkpoint-<step>`: its folder and the loadable weights. All ranks must call it.

    Everything is written under another name, flushed to disk, listed in `manifest.json` and renamed last, so that a
    kill at any instant leaves either the whole checkpoint or none.

    Args:
        description: JSON values for the manifest (sampler cursor, arguments, identity of the run).
        write_weights: called as `write_weights(directory)` on all ranks; writes loadable weights next to the state. Its
            collectives must come before its first write, because a rank that fails enters none.
        check_owner: called on the main process first; raises OSError if another run has taken the directory.

    Raises:
        CheckpointError: on all ranks, with the reasons of those that failed; nothing is left behind and older
            checkpoints are untouched.
    """
    accelerator, started = state.accelerator, time.perf_counter()
    manifest = {
        "format": FORMAT,
        "kind": "training state",
        "optimizer_steps": state.steps_taken(),
        "world_size": accelerator.num_processes,
        "versions": versions(),
        "parameters": state.shapes(),
        "loss_scaler": state.loss_scale(),
        "step": step,
        **description,
    }
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.incomplete"
    begun = Begun(state, final, temporary, manifest, started)
    with begun.removed_if_it_fails():
        with agreement(accelerator, begun.failure):
            if accelerator.is_main_process:
                if check_owner is not None:
                    check_owner()
                _refuse_to_replace(final)
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
        with agreement(accelerator, begun.failure):
            if write_weights is not None:
                write_weights(temporary)
    return begun


class Begun(NamedTuple):
    """A checkpoint that lacks the state itself and its name."""

    state: ShardedState
    final: Path
    temporary: Path
    manifest: dict
    started: float

    @property
    def failure(self) -> str:
        return f"{self.final} could not be written"

    @contextmanager
    def removed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if self.state.accelerator.is_main_process:  # after all ranks have agreed, so nobody writes there any more
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def tensors(self) -> Iterator[Tensors]:
        """Yield what this rank is to write, by name: the states of its random generators, then views of each piece."""
        random = {"rng|cpu|0": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["rng|cuda|0"] = torch.cuda.get_rng_state()
        yield random
        for name, start, tensors, own in self.state.pieces():
            if own.start < own.stop:
                yield {f"{name}|{kind}|{start + own.start}": tensor[own].detach() for kind, tensor in tensors.items()}

    def write(self, tensors: Iterable[Tensors], gather: Gather = gather_from_ranks) -> str:
        """Write the state and give the checkpoint its name; return a sentence about it. All ranks must call it.

        Args:
            tensors: what `tensors` yields, or copies of that.
            gather: how the ranks agree.

        Raises:
            CheckpointError: as `begin_checkpoint`.
        """
        accelerator = self.state.accelerator
        with self.removed_if_it_fails():
            with agreement(accelerator, self.failure, gather):
                written = _write_state(self.temporary, accelerator.process_index, tensors)
            files = {name: digest for rank in gather(accelerator, written) for name, digest in rank.items()}
            with agreement(accelerator, self.failure, gather):
                if accelerator.is_main_process:
                    _write_manifest(self.temporary, self.manifest, files)
                    rename_into_place(self.temporary, self.final)
        size, seconds = sum(digest["bytes"] for digest in files.values()) / 1e9, time.perf_counter() - self.started
        return f"{self.final} is written: {size:,.3f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)."


def _write_state(directory: Path, rank: int, tensors: Iterable[Tensors]) -> dict[str, dict]:
    """Write this rank's files; return their names, sizes and checksums."""
    digests: dict[str, dict] = {}
    pending: Tensors = {}

    def write() -> None:
        path = directory / f"state-rank{rank:05d}-{len(digests):04d}.safetensors"
        digests[path.name] = write_safetensors(path, pending)
        pending.clear()

    for group in tensors:
        pending |= {name: tensor.cpu() for name, tensor in group.items()}
        if sum(tensor.nbytes for tensor in pending.values()) >= BYTES_PER_FILE:
            write()
    if pending:
        write()
    return digests


def write_safetensors(path: Path, tensors: Tensors) -> dict:
    """Write and flush the file that safetensors makes of fp32 and uint8 tensors; return its size and checksum.

    By hand, so that a full disk is an OSError, no byte is copied or read back for the checksum, and other threads of
    Python run meanwhile: `safetensors.torch.save` would keep them waiting for seconds.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].dtype != torch.float32, name))  # larger numbers first
    header, end = {}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum = hashlib.sha256()
    with open(path, "wb") as file:
        for content in (struct.pack("<Q", len(text)), text, *(tensors[name].numpy() for name in names)):
            file.write(content)
            checksum.update(content)
        file.flush()
        flush(file.fileno())
        return {"bytes": file.tell(), "sha256": checksum.hexdigest()}


def _write_manifest(directory: Path, manifest: dict, files: dict[str, dict]) -> None:
    """Flush what `write_weights` wrote, which is not in `files`, and list everything in the manifest."""
    files = dict(files)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            flush_file(path)
            if path.is_file():
                files[name] = digest(path)
    manifest = manifest | {"files": files}
    manifest["sha256"] = manifest_checksum(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush_file(directory / "manifest.json")
    flush_file(directory)


def rename_into_place(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, in place of one of ours that has it already.

    Raises:
        CheckpointError: what has the name is not ours.
    """
    _refuse_to_replace(final)
    replaced = hide(final) if final.exists() else None
    try:
        os.rename(temporary, final)
    except OSError as error:
        if replaced:
            os.rename(replaced, final)
        raise OSError(f"the directory {temporary.name} cannot be renamed: {error.strerror}") from error
    flush_file(final.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)  # what is left is removed by the next run


def _refuse_to_replace(final: Path) -> None:
    if os.path.lexists(final) and not is_ours(final):
        raise CheckpointError(f"{final} exists, and this program did not write it. Move it away.")


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_checkpoint(state: ShardedState, directory: Path, check: Callable[[dict], None]) -> dict:
    """Restore masters, moments, weights and random states in place; return the manifest. All ranks must call it.

    Args:
        directory: a checkpoint whose files are intact.
        check: given the manifest, raises CheckpointError if another run wrote it; nothing has been changed then.

    Raises:
        CheckpointError: on all ranks.
    """
    manifest: dict = {}
    accelerator = state.accelerator
    with agreement(accelerator, f"{directory} was not loaded"):
        manifest = read_manifest(directory)
        check(manifest)
        reader = PieceReader(directory, manifest)
    create_moments(accelerator, state.optimizer, manifest["optimizer_steps"])
    with agreement(accelerator, f"{directory} was not loaded"):
        for piece in state.pieces():
            for kind, tensor in piece.tensors.items():
                reader.copy_into(tensor, piece.name, kind, piece.start)
    state.refresh_working_weights(reader.copy_into)
    state.restore_loss_scale(manifest["loss_scaler"])
    if manifest["world_size"] == accelerator.num_processes:
        rng = reader.rng[accelerator.process_index]
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    return manifest


class PieceReader:
    """Copies any range of any parameter out of the files of a checkpoint.

    Attributes:
        rng: states of the random generators: rank -> `cpu` or `cuda` -> uint8 tensor.
    """

    def __init__(self, directory: Path, manifest: dict):
        self.pieces: dict[tuple[str, str], list[tuple[int, int, object, str]]] = {}
        self.rng: dict[int, dict[str, torch.Tensor]] = {}
        for name in sorted(manifest["files"]):
            if not name.startswith("state-rank"):
                continue
            file = safe_open(directory / name, "pt")
            rank = int(name.removeprefix("state-rank").split("-")[0])
            for key in file.keys():  # noqa: SIM118
                parameter, kind, start = key.rsplit("|", 2)
                if parameter == "rng":
                    self.rng.setdefault(rank, {})[kind] = file.get_tensor(key)
                    continue
                numel = file.get_slice(key).get_shape()[0]
                self.pieces.setdefault((parameter, kind), []).append((int(start), numel, file, key))

    def copy_into(self, target: torch.Tensor, name: str, kind: str = "master", start: int = 0) -> None:
        """Fill the flat `target` with the range of the parameter that begins at `start`."""
        filled, stop = 0, start + target.numel()
        for piece_start, numel, file, key in self.pieces.get((name, kind), []):
            low, high = max(start, piece_start), min(stop, piece_start + numel)
            if low < high:
                target[low - start : high - start].copy_(file.get_slice(key)[low - piece_start : high - piece_start])
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(
                f"The checkpoint lacks {counted(target.numel() - filled, 'value')} of {name} ({kind})."
            )
