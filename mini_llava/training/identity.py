"""What decides the numbers of a run: written into its checkpoints and compared when one is resumed.

LLaVA resumes with whatever flags, data and models it is given, so that half of a run may be trained on other data than
the other half. Here everything that decides the numbers must be equal or be named in `--resume_ignore`. Data and models
are compared by their content, not by their names or dates, so that what was moved or copied can be resumed.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..arguments import DECIDES_NOTHING, OTHER_NAMES
from ..data.images import BadImage, image_path
from ..data.records import RecordStore
from ..data.templates import CHAT_TEMPLATE
from ..words import counted
from .distributed import gather_from_ranks, zero_stage

# Elements looked at in one go: int64 copies of a 7B model's weights would not fit beside it.
ELEMENTS_AT_ONCE = 2**24
# Of how many records the images are compared, and how much of each end of a file: a few seconds on a slow disk.
RECORDS_LOOKED_AT, BYTES_LOOKED_AT = 256, 4096
# What a configuration holds besides the model: where it came from, in which precision and by which kernels it runs.
NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "output_hidden_states")


def run_identity(
    accelerator: Accelerator,
    model: nn.Module,
    arguments: dict,
    store: RecordStore,
    has_image: np.ndarray,
    order: dict,
    tokenizer: PreTrainedTokenizerBase,
    image_processor,
    total_steps: int,
    slots: int,
) -> dict:
    """JSON values that are equal for two runs if and only if their numbers should be. All ranks must call it.

    Args:
        model: the prepared `LlavaModel`.
        arguments: flag name to value.
        has_image: which records have images, bool [n].
        order: the sampler's `state_dict()`.
        slots: micro-batches of a step on all ranks, which matter to LLaVA's mean of means alone.
    """
    flags = {name: value for name, value in arguments.items() if name not in DECIDES_NOTHING}
    flags |= {
        "max_steps": total_steps,
        "global_batch_size": order["batch"],
        "bf16": accelerator.mixed_precision.replace("no", "fp32"),
    }
    if arguments["sample_order"]:
        flags["sample_order"] = _digest(Path(arguments["sample_order"]).read_bytes())
    if arguments["loss_normalization"] == "micro_batch":
        flags["per_device_train_batch_size"] = f"{slots} micro-batches a step"
    llava = accelerator.unwrap_model(model)
    texts_to_ids = tokenizer.backend_tokenizer.to_str()
    if arguments["version"] == CHAT_TEMPLATE:
        texts_to_ids += str(tokenizer.chat_template)
    return {
        "flags": flags,
        "data": {
            "files": [[Path(path).name, digest] for path, digest in zip(store.data_path, store.digests(), strict=True)],
            "all": store.digest(),
            "lengths": order["lengths"],
        },
        "images": gather_from_ranks(
            accelerator, fingerprints_of_images(store, has_image) if accelerator.is_main_process else None
        )[0],
        "model": {
            "frozen": frozen_fingerprints(accelerator, llava),
            "tokenizer": _digest(texts_to_ids.encode()),
            "image processor": _settings(image_processor.to_dict()),
            "language model": _settings(llava.language_model.config),
            "vision tower": _settings(llava.vision_tower.model.config),
        },
    }


def differences(theirs: dict, mine: dict, may_differ: list[str]) -> tuple[list[str], list[str]]:
    """(a line for each difference, the names by which `--resume_ignore` would let them pass)."""
    ignored = {OTHER_NAMES.get(name, name) for name in may_differ}
    found = [(name, f"{_label(name)}: {line}") for name, line in _flag_lines(theirs["flags"], mine["flags"])]
    found += [("data", f"data: {line}") for line in _data_lines(theirs["data"], mine["data"])]
    found += [("images", f"images: {line}") for line in _image_lines(theirs.get("images", {}), mine["images"])]
    found += [("model", f"model: {line}") for line in _model_lines(theirs["model"], mine["model"])]
    found = [(name, line) for name, line in found if name not in ignored]
    return [line for _, line in found], list(dict.fromkeys(name for name, _ in found))


def _label(name: str) -> str:
    return ", ".join(f"--{flag}" for flag in (name, *(other for other, of in OTHER_NAMES.items() if of == name)))


def _flag_lines(theirs: dict, mine: dict) -> list[tuple[str, str]]:
    absent = "no such flag"
    pairs = {name: (theirs.get(name, absent), mine.get(name, absent)) for name in theirs | mine}
    return [(name, f"{was} in the checkpoint, {now} now") for name, (was, now) in pairs.items() if was != now]


def _data_lines(theirs: dict, mine: dict) -> list[str]:
    if len(theirs["files"]) != len(mine["files"]):
        return [f"{counted(len(theirs['files']), 'file')} in the checkpoint, {len(mine['files'])} now"]
    pairs = zip(theirs["files"], mine["files"], strict=True)
    changed = [(was, now) for (was, old), (now, new) in pairs if old != new]
    lines = [f"file {now} has changed" + (f" (was {was})" if was != now else "") for was, now in changed]
    if not lines and theirs["all"] != mine["all"]:
        lines.append("other records are left out by --exclude")
    if not lines and theirs["lengths"] != mine["lengths"]:
        lines.append("the samples have other lengths: through other flags, another tokenizer or images missing now")
    return lines


def fingerprints_of_images(store: RecordStore, has_image: np.ndarray) -> dict[str, list | None]:
    """Return name to [bytes, digest] of the images of some records, evenly spread; None for one that is not there.

    The digest is of both ends of the file: another picture, or the same one written again by another program, shows in
    them, and a copy with another date does not.
    """
    with_image = np.flatnonzero(has_image)
    places = np.linspace(0, len(with_image) - 1, min(RECORDS_LOOKED_AT, len(with_image))).astype(int)
    found = {}
    for index in with_image[places].tolist():
        names = store[index]["image"]
        for name in [names] if isinstance(names, str) else names:
            try:
                file = _both_ends(image_path(store.image_folder(index), name))
            except (OSError, BadImage):
                file = None
            found[f"{store.source(index)} {name}"] = file
    return found


def _both_ends(path: str) -> list:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(BYTES_LOOKED_AT)
        file.seek(max(0, size - BYTES_LOOKED_AT))
        return [size, _digest(content + file.read(BYTES_LOOKED_AT))]


def _image_lines(theirs: dict, mine: dict) -> list[str]:
    both = [name for name in theirs if name in mine]  # other records, where data may differ, have other images
    if not (changed := [name for name in both if theirs[name] != mine[name]]):
        return []
    was, now = theirs[changed[0]], mine[changed[0]]
    show = lambda file: "not there" if file is None else counted(file[0], "byte")  # noqa: E731
    what = f"{show(was)} in the checkpoint, {show(now)} now" + (", of other content" if was and now else "")
    name = changed[0].split(" ", 1)[1]
    return [f"{len(changed):,} of {counted(len(both), 'file')} looked at have changed, first {name}: {what}"]


def _model_lines(theirs: dict, mine: dict) -> list[str]:
    lines = []
    for part, was in theirs["frozen"].items():
        now = mine["frozen"].get(part, was)
        # In another precision the same weights are other numbers; the precision itself is among the flags.
        if was != now and was.split()[0] == now.split()[0]:
            lines.append(f"the weights of the frozen {part} are others")
    if theirs["tokenizer"] != mine["tokenizer"]:
        lines.append("the tokenizer is another one")
    for part in ("image processor", "language model", "vision tower"):
        was, now = theirs[part], mine[part]
        # Settings that only one of the two knows came or went with a version of transformers.
        lines += [
            f"{key} of the {part} is {was[key]} in the checkpoint, {now[key]} now"
            for key in was.keys() & now.keys()
            if was[key] != now[key]
        ]
    return sorted(lines)


def _settings(config: PretrainedConfig | dict) -> dict:
    values = json.loads(json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str))  # no tuples
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in NOT_THE_MODEL}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@torch.no_grad()
def frozen_fingerprints(accelerator: Accelerator, model: nn.Module) -> dict[str, str]:
    """Part of the model to `dtype fingerprint` of its frozen weights. A collective: all ranks must call it.

    A sum modulo 2^64 over all weights: the bits as an integer times an odd number that depends on the place. Any change
    of one weight changes it, and it does not depend on how ZeRO-3 has divided the weights.
    """
    partitioned = zero_stage(accelerator) == 3
    sums, dtypes = {}, {}
    for part, module in model.named_children():
        frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        for name, parameter in frozen:
            flat, start = parameter.data.reshape(-1), 0
            if partitioned:  # the last partitions are padded with anything
                flat = parameter.ds_tensor.data
                start = accelerator.process_index * flat.numel()
                flat = flat[: max(0, min(flat.numel(), parameter.ds_numel - start))]
            weight = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little") | 1
            total = (_weighted_sum(flat, start) * weight).to(accelerator.device)
            sums[part] = sums.get(part, 0) + total
            dtypes.setdefault(part, set()).add(str(parameter.dtype).removeprefix("torch."))
    if not sums:
        return {}
    totals = torch.stack(list(sums.values()))
    if partitioned and accelerator.num_processes > 1:
        torch.distributed.all_reduce(totals)
    pairs = zip(sums, totals.tolist(), strict=True)
    return {part: f"{'+'.join(sorted(dtypes[part]))} {total % 2**64:016x}" for part, total in pairs}


def _weighted_sum(flat: torch.Tensor, start: int) -> torch.Tensor:
    """Sum of (bits of flat[i]) * (2 * (start + i) + 1) in int64, which wraps around."""
    integers = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), ELEMENTS_AT_ONCE):
        bits = integers[begin : begin + ELEMENTS_AT_ONCE].long()
        places = torch.arange(start + begin, start + begin + len(bits), device=flat.device)
        total += (bits * (2 * places + 1)).sum()
    return total
