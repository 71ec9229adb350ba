"""Training states: written whole or not at all, read back to the last bit, by any number of processes.

Each trained parameter has an fp32 master and AdamW's two moments. Whoever holds them (one process, DDP replicas, ZeRO-2
or ZeRO-3 partitions), they are flat pieces of named parameters, and that is what is written: each rank writes its
pieces to safetensors files of its own, without gathering anything, and a loading rank copies the ranges it holds out of
them. So there is one format, no pickle, no dependence on the number of processes, and all ranks write in parallel.
Frozen weights are not in it: they come from the model the run was started from.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import flush, flush_file
from ..words import counted
from .backend import (
    create_moments,
    gather_from_ranks,
    held_pieces,
    loss_scaler_state,
    own_range,
    refresh_working_weights,
    restore_loss_scaler,
    steps_taken,
    trained_shapes,
    versions,
)

FORMAT = 2
BYTES_PER_FILE = 2 * 2**30  # what a rank holds in CPU memory at most while it writes


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the sentence names the file and says what to do."""


# What files can fail with. Anything else is a bug, which must not pass for a full disk.
FAILURES = (OSError, SafetensorError, CheckpointError)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """What a finished save tells the person who watches."""

    path: Path
    bytes: int
    seconds: float
    warnings: list[str] = field(default_factory=list)  # on rank 0: what else went wrong, though the state is whole

    def __str__(self) -> str:
        rate = self.bytes / self.seconds / 1e9
        return f"{self.path} is written: {self.bytes / 1e9:,.3f} GB in {self.seconds:.1f} s ({rate:.2f} GB/s)."


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    output_dir: Path,
    step: int,
    description: dict,
    keep: int | None,
    write_weights: Callable[[Path], None] | None = None,
    check_owner: Callable[[], None] | None = None,
) -> Saved:
    """Writes `output_dir/checkpoint-<step>` and removes the oldest beyond `keep`. All ranks must call it.

    Everything is written under another name, flushed to disk, listed in `manifest.json` and renamed last, so that a
    kill at any instant leaves either the whole checkpoint or none.

    Args:
        description: JSON values put into the manifest (sampler cursor, arguments, identity of the run).
        write_weights: called as `write_weights(directory)` on all ranks; writes loadable weights beside the state. Its
            collectives must come before its first write, for a rank that fails enters none.
        check_owner: called on the main process first; raises OSError if another run has taken the directory.

    Raises:
        CheckpointError: on all ranks, with the reasons of those that failed; nothing is left behind and older
            checkpoints are untouched.
    """
    started = time.perf_counter()
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.incomplete"
    failure = f"{final} could not be written"
    digests: dict[str, dict] = {}
    warnings: list[str] = []
    try:
        with agreement(accelerator, failure):
            if accelerator.is_main_process:
                if check_owner is not None:
                    check_owner()
                _refuse_to_replace(final)
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
        with agreement(accelerator, failure):
            digests = _write_pieces(accelerator, model, optimizer, temporary)
        with agreement(accelerator, failure):
            if write_weights is not None:
                write_weights(temporary)
        files = {
            name: digest for of_rank in gather_from_ranks(accelerator, digests) for name, digest in of_rank.items()
        }
        with agreement(accelerator, failure):
            if accelerator.is_main_process:
                manifest = {
                    "format": FORMAT,
                    "kind": "training state",
                    "step": step,
                    "optimizer_steps": steps_taken(accelerator, optimizer),
                    "world_size": accelerator.num_processes,
                    "versions": versions(),
                    "parameters": trained_shapes(accelerator, model),
                    "loss_scaler": loss_scaler_state(accelerator, optimizer),
                    **description,
                    "files": files | _flush_weights(temporary, besides=files),
                }
                manifest["sha256"] = _manifest_checksum(manifest)
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                flush_file(temporary / "manifest.json")
                flush_file(temporary)
                _rename_into_place(temporary, final)
                warnings = remove_oldest(output_dir, step, keep)
    except CheckpointError:
        if accelerator.is_main_process:  # after all ranks have agreed, so nobody writes there any more
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    total = sum(digest["bytes"] for digest in files.values())
    return Saved(final, total, time.perf_counter() - started, warnings)


def _write_pieces(accelerator: Accelerator, model: nn.Module, optimizer, directory: Path) -> dict[str, dict]:
    """This rank's files; returns their names, sizes and checksums."""
    rank = accelerator.process_index
    digests: dict[str, dict] = {}
    pending = {f"rng|{device}|0": state for device, state in _rng_states().items()}

    def write() -> None:
        path = directory / f"state-rank{rank:05d}-{len(digests):04d}.safetensors"
        digests[path.name] = _write_tensors(path, pending)
        pending.clear()

    for piece in held_pieces(accelerator, model, optimizer):
        start, stop = own_range(accelerator, piece)
        if start == stop:
            continue
        for kind, tensor in piece.tensors.items():
            pending[f"{piece.name}|{kind}|{piece.start + start}"] = tensor[start:stop].detach().to("cpu", copy=True)
        if sum(tensor.nbytes for tensor in pending.values()) >= BYTES_PER_FILE:
            write()
    if pending:
        write()
    return digests


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """Writes flat fp32 or uint8 CPU tensors as a safetensors file, flushed; returns its size and checksum.

    Not by the library's `save_file`, so that the checksum is taken of what is written, without reading it back, and
    so that a full disk is an OSError. The format: length of the header in eight bytes, header in JSON, tensors.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    checksum = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(tensor.numpy() for tensor in tensors.values())):
            file.write(part)
            checksum.update(part)
        file.flush()
        flush(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": checksum.hexdigest()}


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def digest(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_checksum(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _flush_weights(directory: Path, besides: dict[str, dict]) -> dict[str, dict]:
    """Flushes the files that `write_weights` made; returns their names, sizes and checksums."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in besides:
            flush_file(path)
            if path.is_file():
                digests[name] = digest(path)
    return digests


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Gives a whole checkpoint its name; one of ours that has it already (torn, or of a run that went back) makes way.

    Raises CheckpointError: what has the name is not ours.
    """
    _refuse_to_replace(final)
    replaced = _out_of_sight(final) if final.exists() else None
    try:
        os.rename(temporary, final)
    except OSError as error:
        if replaced:
            os.rename(replaced, final)
        raise OSError(f"the directory {temporary.name} cannot be renamed: {error.strerror}") from error
    flush_file(final.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)  # what is left is removed by the next run


def _out_of_sight(checkpoint: Path) -> Path:
    """Renames a checkpoint that is to be deleted, because deleting takes a while and half of one must not be seen."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    os.rename(checkpoint, removed)
    flush_file(checkpoint.parent)
    return removed


def is_ours(checkpoint: Path) -> bool:
    """Whether this program wrote a directory, whole or torn: it has our manifest, or files that nothing else writes."""
    if any(checkpoint.glob("state-rank*.safetensors")):
        return True
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "training state"


def foreign_checkpoints(output_dir: Path) -> list[Path]:
    """What has the name of a checkpoint and is none of ours, such as those of LLaVA's own trainer; oldest first."""
    return [path for path in _checkpoints(output_dir) if not is_ours(path)]


def _refuse_to_replace(final: Path) -> None:
    if os.path.lexists(final) and not is_ours(final):
        raise CheckpointError(f"{final} is there, which this program did not write. Move it away.")


def remove_oldest(output_dir: Path, newest: int, keep: int | None) -> list[str]:
    """Removes what `keep` leaves no room for; returns a sentence for each checkpoint that could not be removed."""
    if keep is None:
        return []
    warnings = []
    ours = [path for path in complete_checkpoints(output_dir) if is_ours(path) and _step_of(path) <= newest]
    for path in ours[:-keep]:
        try:
            shutil.rmtree(_out_of_sight(path))
        except OSError as error:
            warnings.append(
                f"Warning: the old {path} could not be removed ({error}); it takes space until you remove it."
            )
    return warnings


def try_a_save(output_dir: Path, name: str) -> str | None:
    """Does with a small directory what a save does with a large one; returns a sentence if it cannot be flushed.

    Raises:
        OSError: it cannot be written, or not renamed. Nothing is left behind.
    """
    temporary, final = output_dir / f"{name}.incomplete", output_dir / name
    try:
        temporary.mkdir()
        (temporary / "file").write_bytes(bytes(2**16))
        no_flush = flush_file(temporary / "file")
        no_flush = flush_file(temporary) or no_flush
        _rename_into_place(temporary, final)
    finally:
        for path in (temporary, final):
            shutil.rmtree(path, ignore_errors=True)
    if no_flush is None:
        return None
    return (
        f"Warning: {output_dir} is on a file system that does not flush files and directories when it is told to "
        f"({no_flush}). The run goes on without: a training state is whole after a crash of the run, but perhaps not "
        "after one of the machine."
    )


# --- agreement of the ranks ------------------------------------------------------------------------------------------


@contextmanager
def agreement(accelerator: Accelerator, what: str) -> Iterator[None]:
    """A failure inside the block on any rank raises CheckpointError on all of them, with the reasons and the ranks.

    Without it one rank raises and the others wait in their next collective until a timeout ends them. So the block
    holds no collective behind what may fail.
    """
    error = None
    try:
        yield
    except FAILURES as caught:
        error = caught
    reasons = gather_from_ranks(accelerator, None if error is None else str(error) or type(error).__name__)
    if failed := {rank: reason for rank, reason in enumerate(reasons) if reason is not None}:
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
        if len(failed) == len(reasons) and len(set(reasons)) == 1:
            text = reasons[0]
        text = text if "\n" in text else text.removesuffix(".") + "."  # an OSError has no full stop
        raise CheckpointError(f"{what}: {text}") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Every directory with a checkpoint's name, torn ones included, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of an output directory, oldest first. A manifest is written last, so its presence means whole."""
    return [path for path in _checkpoints(output_dir) if (path / "manifest.json").is_file()]


def find_checkpoint(
    accelerator: Accelerator, output_dir: Path, requested: str | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names: a directory, or `latest`: the newest whole one, if any.

    Its files are verified, each by one of the ranks. All ranks must call it, and get the same answer. With `latest` a
    torn checkpoint is said and passed over.

    Raises:
        CheckpointError: the directory is torn or none; or there are checkpoints for `latest`, but no whole one; or
            checkpoints of an earlier run are there, which those of this run would mix with.
    """
    seen = gather_from_ranks(accelerator, (_checkpoints(output_dir), complete_checkpoints(output_dir)))
    everything, present = seen[0]  # rank 0's view: another machine's may be seconds old
    if requested == "latest":
        for path in reversed(everything):
            try:
                verify(accelerator, path)
                return path
            except CheckpointError as error:
                say(f"Passed over: {error}")
        if everything:
            count = len(everything)
            none = f"None of the {count} checkpoints in {output_dir} is whole" if count > 1 else ""
            raise CheckpointError(
                f"{none or f'The only checkpoint in {output_dir} is not whole'}; what is wrong is said above. Move "
                f"{'them' if none else 'it'} away to start anew."
            )
        return None
    _check_requested(output_dir, requested)
    if requested is not None:
        step = verify(accelerator, path := Path(requested))["step"]
        elsewhere = path.resolve().parent != output_dir.resolve()
        present = [other for other in present if elsewhere or _step_of(other) > step]
        if present:
            raise CheckpointError(
                f"{output_dir} also holds {present[-1].name}, which does not come before {path}: `latest` and "
                "--save_total_limit would mix it with what this run saves. Move it away, or use another --output_dir."
            )
        return path
    _refuse_earlier_run(present)
    return None


def check_resume(output_dir: Path, requested: str | None) -> None:
    """What of `find_checkpoint` can be said by one process before anything is loaded. Raises CheckpointError."""
    if requested is None:
        _refuse_earlier_run(complete_checkpoints(output_dir))
    elif requested != "latest":
        _check_requested(output_dir, requested)
        try:
            read_manifest(Path(requested))
        except CheckpointError as error:
            raise CheckpointError(f"{requested} is torn: {error}") from error


def _refuse_earlier_run(present: list[Path]) -> None:
    if present:
        raise CheckpointError(
            f"{present[-1]} is there from an earlier run. Use --resume_from_checkpoint latest to go on from it, "
            "another --output_dir to start anew, or delete it."
        )


def _check_requested(output_dir: Path, requested: str | None) -> None:
    """Raises CheckpointError unless a directory is there; the sentence lists the checkpoints that are."""
    if requested in (None, "latest") or (path := Path(requested)).is_dir():
        return
    beside = complete_checkpoints(path.parent) or complete_checkpoints(output_dir)
    there = f"There are {', '.join(map(str, beside))}." if beside else f"There is none in {output_dir} either."
    state = "is not a directory" if path.exists() else "does not exist"
    raise CheckpointError(f"--resume_from_checkpoint {path} {state}. {there} `latest` takes the newest one.")


def verify(accelerator: Accelerator, directory: Path) -> dict:
    """The manifest of a whole checkpoint; else CheckpointError on all ranks, naming the file. They share the work."""
    with agreement(accelerator, f"{directory} is torn"):
        manifest = read_manifest(directory)
        files = manifest["files"]
        mine = sorted(files)[accelerator.process_index :: accelerator.num_processes]
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda name: digest(directory / name), mine)
            for name, actual in zip(mine, found, strict=True):
                if actual != files[name]:
                    raise CheckpointError(f"{directory / name} has been altered; use an older checkpoint.")
    return manifest


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint whose files are all there in their sizes. Raises CheckpointError naming the file."""
    file = directory / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no manifest.json.") from None
    except ValueError:
        raise CheckpointError(f"{file} is not readable; use an older checkpoint.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "training state":
        raise CheckpointError(f"{file} does not describe a training state of this program.")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is of format {manifest.get('format')}, and this program reads {FORMAT}.")
    if manifest.get("sha256") != _manifest_checksum(manifest):
        raise CheckpointError(f"{file} has been altered; use an older checkpoint.")
    for name, expected in manifest["files"].items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != expected["bytes"]:
            state = "is missing" if size is None else f"has {counted(size, 'byte')} instead of {expected['bytes']:,}"
            raise CheckpointError(f"{directory / name} {state}; use an older checkpoint.")
    return manifest


@torch.no_grad()
def load_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    directory: Path,
    differences: Callable[[dict], tuple[list[str], list[str]]],
) -> dict:
    """Restores masters, moments, weights and random states in place; returns the manifest. All ranks must call it.

    Args:
        directory: a checkpoint that `find_checkpoint` has verified.
        differences: given the manifest, returns a line for each thing in which this run differs from the one that wrote
            it, and the names by which `--resume_ignore` lets them pass.

    Raises:
        CheckpointError: on all ranks and before anything is changed: the run differs from the one that wrote it, a line
            for each difference.
    """
    manifest: dict = {}
    with agreement(accelerator, f"{directory} was not loaded"):
        manifest = read_manifest(directory)
        mine, theirs = trained_shapes(accelerator, model), manifest["parameters"]
        lines, names = differences(manifest)
        if differing := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
            example = differing[0]
            lines.append(
                f"{counted(len(differing), 'trained parameter')}, first {example}: "
                f"{theirs.get(example, 'not trained')} in the checkpoint, {mine.get(example, 'not trained')} now"
            )
        if lines:
            advice = f"Make them equal, or let them differ: --resume_ignore {' '.join(names)}" if names else ""
            lines = ["this run is not the one that wrote it.", *(f"  {line}" for line in lines), advice]
            raise CheckpointError("\n".join(lines).rstrip())
        reader = _PieceReader(directory, manifest)
    create_moments(accelerator, optimizer, manifest["optimizer_steps"])
    with agreement(accelerator, f"{directory} was not loaded"):
        for piece in held_pieces(accelerator, model, optimizer):
            for kind, tensor in piece.tensors.items():
                reader.copy_into(tensor, piece.name, kind, piece.start)
    refresh_working_weights(
        accelerator, model, optimizer, lambda master, name: reader.copy_into(master, name, "master", 0)
    )
    restore_loss_scaler(accelerator, optimizer, manifest["loss_scaler"])
    if manifest["world_size"] == accelerator.num_processes:
        rng = reader.rng_states(accelerator.process_index)
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    return manifest


@torch.no_grad()
def read_trained(directory: Path, model: nn.Module) -> None:
    """Fills the trained parameters of a bare `LlavaModel`, the base of the run, with a checkpoint's masters.

    For tools: no processes, no optimizer; sizes of the files are compared, checksums are not. Raises CheckpointError.
    """
    manifest = read_manifest(directory)
    reader, parameters = _PieceReader(directory, manifest), dict(model.named_parameters())
    for name, shape in manifest["parameters"].items():
        mine = list(parameters[name].shape) if name in parameters else "not there"
        if mine != shape:
            raise CheckpointError(f"{directory} has trained {name} {shape}, which in its base is {mine}: another base.")
    for name, shape in manifest["parameters"].items():
        master = torch.empty(parameters[name].numel(), dtype=torch.float32)
        reader.copy_into(master, name, "master", 0)
        parameters[name].copy_(master.view(shape))


class _PieceReader:
    """Copies any range of any parameter out of the files of a checkpoint."""

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

    def copy_into(self, target: torch.Tensor, name: str, kind: str, start: int) -> None:
        """Fills the flat `target` with the range of the parameter that begins at `start`."""
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

    def rng_states(self, rank: int) -> dict[str, torch.Tensor]:
        return self.rng[rank]
