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
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .distributed import all_agree, is_deepspeed, zero_stage

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
BYTES_PER_FILE = 2 * 2**30  # what a rank holds in CPU memory at most while it writes


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the sentence names the file and says what to do."""


@dataclass
class Piece:
    """A flat range of one parameter: views of its master and moments that this rank holds."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]  # kind -> flat view

    @property
    def numel(self) -> int:
        return self.tensors["master"].numel()


# --- what this rank holds --------------------------------------------------------------------------------------------


def held_pieces(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """The pieces of the trained parameters on this rank; without DeepSpeed, all of every parameter.

    The moments must exist: take a step or call `create_moments` before.
    """
    named = [(name, p) for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
    if not is_deepspeed(accelerator):
        for name, parameter in named:
            state = optimizer.state[parameter]
            yield Piece(name, 0, {"master": parameter.data.view(-1)} | {k: state[k].view(-1) for k in KINDS[1:]})
        return
    zero = optimizer.optimizer
    if zero_stage(accelerator) == 3:
        rank = accelerator.process_index
        for name, parameter in named:
            views = {kind: _zero3_view(zero, parameter, kind) for kind in KINDS}
            start = rank * views["master"].numel()  # the last partitions are padded, or nothing but padding
            real = max(0, min(views["master"].numel(), parameter.ds_numel - start))
            yield Piece(name, start, {kind: view[:real] for kind, view in views.items()})
        return
    names = {id(parameter): name for name, parameter in named}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is None:  # all of it lies on other ranks
                continue
            # Not `safe_get_full_optimizer_state`: DeepSpeed 0.19 links the moments of the first parameter group only.
            address = mapping.hp_fragment_address
            moments = {k: zero.optimizer.state[flat][k].narrow(0, address.start, address.numel) for k in KINDS[1:]}
            start = mapping.lp_fragment_address.start
            yield Piece(names[id(parameter)], start, {"master": mapping.hp_fragment} | moments)


def _zero3_view(zero, parameter: nn.Parameter, kind: str) -> torch.Tensor:
    # The public `safe_get_local_*` return copies when the optimizer is offloaded; a view can be written to as well.
    key = None if kind == "master" else kind
    return zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)[0]


def create_moments(accelerator: Accelerator, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Creates AdamW's moments as zeros, with `step` steps taken, as they would be after a first step."""
    inner, parameters = optimizer.optimizer, [p for group in optimizer.param_groups for p in group["params"]]
    if is_deepspeed(accelerator):
        zero, inner = optimizer.optimizer, optimizer.optimizer.optimizer
        flat = "fp32_partitioned_groups_flat" if zero_stage(accelerator) == 3 else "single_partition_of_fp32_groups"
        parameters = getattr(zero, flat)
    on_cpu = type(inner).__name__ == "DeepSpeedCPUAdam"
    for parameter in parameters:
        # torch's fused AdamW wants the count beside the parameter, the plain one on the CPU, DeepSpeed's a number.
        device = parameter.device if inner.defaults.get("fused") else "cpu"
        inner.state[parameter] = {
            "step": step if on_cpu else torch.tensor(float(step), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }


def steps_taken(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> int:
    """AdamW's own count, which lags behind the optimizer steps where fp16 skipped some."""
    inner = optimizer.optimizer.optimizer if is_deepspeed(accelerator) else optimizer.optimizer
    return max((int(state["step"]) for state in inner.state.values()), default=0)


# --- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    output_dir: Path,
    step: int,
    description: dict,
    keep: int | None,
    write_weights=None,
) -> Path:
    """Writes `output_dir/checkpoint-<step>` and removes the oldest beyond `keep`. All ranks must call it.

    Everything is written under another name, flushed to disk, listed in `manifest.json` and renamed last, so that a
    kill at any instant leaves either the whole checkpoint or none.

    Args:
        description: JSON values put into the manifest (sampler cursor, arguments, versions).
        write_weights: called as `write_weights(directory)` on all ranks; writes loadable weights beside the state.

    Raises:
        CheckpointError: on all ranks, if it failed on any; nothing is left behind and older checkpoints are untouched.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.incomplete"
    with agreement(accelerator, f"{final} could not be written"):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    digests: dict[str, dict] = {}
    with agreement(accelerator, f"{final} could not be written"):
        digests = _write_pieces(accelerator, model, optimizer, temporary)
    with agreement(accelerator, f"{final} could not be written"):
        if write_weights is not None:
            write_weights(temporary)
    all_digests = _gather_dictionaries(accelerator, digests)
    with agreement(accelerator, f"{final} could not be written"):
        if accelerator.is_main_process:
            weights = {p.name: digest(p) for p in sorted(temporary.iterdir()) if p.name not in all_digests}
            manifest = {
                "format": FORMAT,
                "kind": "training state",
                "step": step,
                "optimizer_steps": steps_taken(accelerator, optimizer),
                "world_size": accelerator.num_processes,
                "parameters": trained_shapes(accelerator, model),
                "loss_scaler": _loss_scaler_state(accelerator, optimizer),
                **description,
                "files": all_digests | weights,
            }
            _write_flushed(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            _flush_directory(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _flush_directory(output_dir)
            _remove_oldest(output_dir, keep)
    return final


def _write_pieces(accelerator: Accelerator, model: nn.Module, optimizer, directory: Path) -> dict[str, dict]:
    """This rank's files; returns their names, sizes and checksums."""
    rank, world = accelerator.process_index, accelerator.num_processes
    replicated = not is_deepspeed(accelerator)
    digests: dict[str, dict] = {}
    pending = {f"rng|{device}|0": state for device, state in _rng_states().items()}

    def flush() -> None:
        path = directory / f"state-rank{rank:05d}-{len(digests):04d}.safetensors"
        save_file(pending, path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        digests[path.name] = digest(path)
        pending.clear()

    for piece in held_pieces(accelerator, model, optimizer):
        start, stop = 0, piece.numel
        if replicated:  # every rank holds everything: each writes an equal share
            share = -(-piece.numel // world)
            start, stop = min(rank * share, piece.numel), min((rank + 1) * share, piece.numel)
        if start == stop:
            continue
        for kind, tensor in piece.tensors.items():
            pending[f"{piece.name}|{kind}|{piece.start + start}"] = tensor[start:stop].to("cpu", copy=True)
        if sum(tensor.nbytes for tensor in pending.values()) >= BYTES_PER_FILE:
            flush()
    if pending:
        flush()
    return digests


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _loss_scaler_state(accelerator: Accelerator, optimizer) -> dict:
    if is_deepspeed(accelerator):
        scaler = optimizer.optimizer.loss_scaler
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)}
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else {}


def trained_shapes(accelerator: Accelerator, model: nn.Module) -> dict[str, list[int]]:
    """Name and full shape of every trained parameter."""
    named = accelerator.unwrap_model(model).named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def digest(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_flushed(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    """Makes renames and new entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_oldest(output_dir: Path, keep: int | None) -> None:
    if keep is not None:
        for path in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(path)


# --- agreement of the ranks ------------------------------------------------------------------------------------------


@contextmanager
def agreement(accelerator: Accelerator, what: str) -> Iterator[None]:
    """A failure inside the block on any rank raises CheckpointError on all of them.

    Without it one rank raises and the others wait in their next collective until a timeout ends them.
    """
    error = None
    try:
        yield
    except (OSError, ValueError, CheckpointError) as caught:
        error = caught
    if not all_agree(accelerator, error is None):
        raise CheckpointError(f"{what}: {error or 'another rank failed, see its message'}") from error


def _gather_dictionaries(accelerator: Accelerator, mine: dict) -> dict:
    """The union of all ranks' dictionaries, on every rank."""
    if accelerator.num_processes == 1:
        return mine
    gathered: list = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, mine)
    return {key: value for dictionary in gathered for key, value in dictionary.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of an output directory, oldest first. A manifest is written last, so its presence means whole."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / "manifest.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(output_dir: Path, requested: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names: `latest` (None if there is none yet) or a directory.

    Raises:
        CheckpointError: the directory is none, or nothing was requested although an earlier run's checkpoints are
            there, which the new run's would mix with.
    """
    present = complete_checkpoints(output_dir)
    if requested == "latest":
        return present[-1] if present else None
    if requested is not None:
        return Path(requested)
    if present:
        raise CheckpointError(
            f"{present[-1]} is there from an earlier run. Use --resume_from_checkpoint latest to go on from it, "
            "another --output_dir to start anew, or delete it."
        )
    return None


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint whose files are all there and unchanged. Raises CheckpointError naming the file."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no manifest.json.") from None
    except ValueError:
        raise CheckpointError(f"{directory / 'manifest.json'} is not readable; use an older checkpoint.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "training state" or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory} does not hold a training state of this program (format {FORMAT}).")
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file() or digest(path) != expected:
            raise CheckpointError(f"{path} is missing or damaged; use an older checkpoint.")
    return manifest


@torch.no_grad()
def load_checkpoint(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path
) -> dict:
    """Restores masters, moments, weights and random states in place; returns the manifest. All ranks must call it."""
    manifest: dict = {}
    with agreement(accelerator, f"{directory} was not loaded"):
        manifest = read_manifest(directory)
        mine, theirs = trained_shapes(accelerator, model), manifest["parameters"]
        if differing := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
            example = differing[0]
            raise CheckpointError(
                f"it trained other parameters than this run ({len(differing)} differ, first {example}: "
                f"{theirs.get(example, 'not trained')} there, {mine.get(example, 'not trained')} here)."
            )
    reader = _PieceReader(directory, manifest)
    create_moments(accelerator, optimizer, manifest["optimizer_steps"])
    for piece in held_pieces(accelerator, model, optimizer):
        for kind, tensor in piece.tensors.items():
            reader.copy_into(tensor, piece.name, kind, piece.start)
    _refresh_working_weights(accelerator, model, optimizer, reader)
    _restore_loss_scaler(accelerator, optimizer, manifest["loss_scaler"])
    if manifest["world_size"] == accelerator.num_processes:
        rng = reader.rng_states(accelerator.process_index)
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    return manifest


def _refresh_working_weights(accelerator: Accelerator, model: nn.Module, optimizer, reader: "_PieceReader") -> None:
    """Under ZeRO the weights the model computes with are a second copy, which the masters must be copied to."""
    if not is_deepspeed(accelerator):
        return
    if zero_stage(accelerator) != 3:
        optimizer.optimizer.update_lp_params()
        return
    import deepspeed

    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            # Through the gathering context, because small parameters are also kept whole on every rank.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if accelerator.is_main_process:
                    master = torch.empty(parameter.numel(), dtype=torch.float32)
                    reader.copy_into(master, name, "master", 0)
                    parameter.data.copy_(master.view_as(parameter))


def _restore_loss_scaler(accelerator: Accelerator, optimizer, state: dict) -> None:
    if not state:
        return
    if is_deepspeed(accelerator):
        vars(optimizer.optimizer.loss_scaler).update(state)
    elif accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state)


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
            raise CheckpointError(f"The checkpoint lacks {target.numel() - filled} values of {name} ({kind}).")

    def rng_states(self, rank: int) -> dict[str, torch.Tensor]:
        return self.rng[rank]
