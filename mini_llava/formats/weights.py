"""Read weights as tensors that are mapped to their files, and write them one shard at a time.

Replaces `load_state_dict(..., strict=False)` and `safe_save_model_for_hf_trainer` in LLaVA, which hold the whole model
in memory. No pickle is executed.
"""

import json
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..files import staged
from ..hub import find_file
from ..model.projector import PROJECTOR_FILE, gathered_state_dict, is_main_process, list_some
from .layouts import WEIGHT_FILES

SHARD_BYTES = 5_000_000_000

# Buffers that older versions of transformers saved, and the head of Apple's tower, which LLaVA does not use.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|vision_tower\.model\.head\.proj)$")
OPTIONAL_PARTS = ("vision_tower", "image_newline")


class Stored(NamedTuple):
    """A tensor mapped to its file."""

    tensor: torch.Tensor
    file: Path
    key: str


def open_weights(name: str, config: dict) -> dict[str, Stored]:
    """Return all tensors of a directory or hub name, mapped and not read, by their names in the files."""
    found = next(((kind, file) for kind in WEIGHT_FILES if (file := find_file(name, kind))), None)
    if found is None:
        raise FileNotFoundError(f"{name} is of type {config['model_type']}, but has no weights. {what_else(name)}")
    kind, first = found
    stored: dict[str, Stored] = {}
    if not kind.endswith(".index.json"):
        return _map_file(Path(first))
    weight_map = json.loads(Path(first).read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(weight_map.values())):
        file = find_file(name, shard)
        if file is None:
            raise FileNotFoundError(f"{first} names {shard}, which is not beside it: the model is not whole.")
        stored |= _map_file(Path(file))
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise UserError(f"{first} names {list_some(absent)}, in {weight_map[absent[0]]}, but that is not in the file.")
    return stored


def _map_file(file: Path) -> dict[str, Stored]:
    """Return the tensors of a .safetensors or .bin file; a pickle of anything but tensors is refused, not executed."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        else:
            with open(file, "rb") as opened:
                is_zip = opened.read(4) == b"PK\x03\x04"  # files of before torch 1.6 are not, and cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is damaged, or holds something other than tensors, which could run code when read. It was not "
            f"loaded; take the model's safetensors files."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{file} is not a whole file of weights ({error}). Fetch or write it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} does not hold a table of tensors by name.")
    return {key: Stored(tensor, file, key) for key, tensor in tensors.items()}


def assign_parts(weights: dict[str, Stored], names: tuple, source: str) -> dict[str, dict[str, Stored]]:
    """Return the tensors of each part of the model by their names in it."""
    parts: dict[str, dict[str, Stored]] = {part: {} for part in ("language_model", "projector", *OPTIONAL_PARTS)}
    for key, stored in weights.items():
        if COMPUTED.search(key):
            continue
        rule = next((rule for rule in names if key.startswith(rule[0])), None)
        if rule is None:
            raise UserError(f"{stored.file} holds {key}, which is no part of a LLaVA model that {source} would be.")
        there, part, here = rule
        name = here + key.removeprefix(there)
        if name in parts[part]:
            raise UserError(f"{source} holds the {part}'s {name} twice, as {parts[part][name].key} and as {key}.")
        parts[part][name] = stored
    return {part: tensors for part, tensors in parts.items() if tensors or part not in OPTIONAL_PARTS}


def what_else(name: str) -> str:
    """Return a sentence about what a directory holds instead of a model."""
    if find_file(name, "adapter_config.json"):
        return (
            f"It holds adapters of a language model: python -m mini_llava.tools.export {name} OUT --merge makes a "
            f"whole model of both, which can be started from; --lora_weight_path goes on from the adapters themselves."
        )
    if (manifest := Path(name) / "manifest.json").is_file():
        trained = json.loads(manifest.read_text(encoding="utf-8")).get("parameters", [])
        if any(parameter.startswith(("language_model.", "vision_tower.")) for parameter in trained):
            return (
                f"It is a training state. --resume_from_checkpoint {name} goes on with its run; to start a new one "
                f"from what it has learned, python -m mini_llava.tools.export {name} OUT makes a model of it: give OUT "
                f"instead. Started from its base, all that was trained would be lost."
            )
    if find_file(name, PROJECTOR_FILE):
        return (
            f"It holds a projector ({PROJECTOR_FILE}) and no language model, as stage 1 writes it: give the language "
            f"model as --model_name_or_path, and this as --pretrain_mm_mlp_adapter."
        )
    return f"Expected one of {', '.join(WEIGHT_FILES)}."


def write_weights(
    directory: Path,
    weights: list[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
    rows: dict[str, int] | None = None,
) -> None:
    """Write safetensors files of about `shard_bytes` each, with their index; matrices in `rows` grow to that size."""
    rows, tensors, sizes = rows or {}, dict(weights), {}
    for name, tensor in weights:
        shape = whole_shape(tensor)
        sizes[name] = math.prod((rows.get(name, shape[0]), *shape[1:]) if shape else ()) * dtype.itemsize
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        content = {
            name: _grown(tensor, rows[name]) if name in rows else tensor
            for name, tensor in gathered_state_dict([(name, tensors[name]) for name in names], dtype)
        }
        if is_main_process():
            with staged(directory) as staging:
                save_file(content, staging / file, metadata={"format": "pt"})
    if is_main_process() and shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(directory, "model.safetensors.index.json", index)


def _grown(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Extend [old, width] to [rows, width] by the mean of the old rows."""
    if rows == len(matrix):
        return matrix
    mean = matrix.mean(dim=0, dtype=torch.float32).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of a tensor, or the full shape of one that ZeRO-3 has partitioned."""
    return getattr(tensor, "ds_shape", tensor.shape)


def write_json(directory: Path, name: str, content: dict) -> None:
    """Write a configuration atomically."""
    with staged(directory) as staging:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (staging / name).write_text(text + "\n", encoding="utf-8")
