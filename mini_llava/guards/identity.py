"""What decides the numbers of a run: written into its checkpoints and compared when one is resumed.

LLaVA resumes with whatever flags, data and models it is given, so that half of a run may be trained on other data than
the other half, silently. Here everything that decides the numbers must be equal or be named in `--resume_ignore`.
Data, pictures and models are compared by their content, not by their names or times, so that what was moved, copied or
unpacked again can be resumed. What differs by no more than rounding is said and not refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from ..arguments import ROUNDING, Arguments, compared_as, decides, flag_fields
from ..data.records import RecordStore
from ..data.templates import CHAT_TEMPLATE
from ..data.tokenization import shorten
from ..evaluation.questions import Question
from ..image_files import BadImage, image_path
from ..read_data import Data
from ..training.backend import backend, gather_from_ranks, is_offloaded, versions, zero_stage
from ..training.order import Order
from ..words import counted

# Elements looked at in one go: int64 copies of a 7B model's weights would not fit beside it.
ELEMENTS_AT_ONCE = 2**24
# Of all pictures so many are looked at: if 1 in 100 was replaced, that is noticed 92 times in 100.
PICTURES = 256
PIECE = 64 * 2**10  # bytes; a picture of up to three pieces, as most are, is read whole
# What a configuration holds besides the model: where it came from, in which precision and by which kernels it runs.
NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "output_hidden_states")


def run_identity(accelerator: Accelerator, model: nn.Module, arguments: Arguments, data: Data, order: Order) -> dict:
    """Return JSON values that are equal for two runs if and only if their numbers should be. All ranks must call it.

    Two entries are never refused: `computation`, by which the numbers differ in their last digits, and `held out`, by
    which scores do that are drawn as one curve.

    Args:
        model: the prepared `LlavaModel`.
    """
    values, of_sampler, store = arguments.as_dict(), order.sampler.state_dict(), data.samples.store
    flags = {name: value for name, value in values.items() if compared_as(name) == name}
    flags |= {
        "max_steps": order.total_steps,
        "global_batch_size": of_sampler["batch"],
        "bf16": accelerator.mixed_precision.replace("no", "fp32"),
    }
    if values["sample_order"]:
        flags["sample_order"] = _digest(Path(values["sample_order"]).read_bytes())
    if values["loss_normalization"] == "micro_batch":
        flags["per_device_train_batch_size"] = f"{order.sampler.slots} micro-batches a step"
    llava = accelerator.unwrap_model(model)
    tokenizer, held_out = data.samples.tokenizer, data.held_out and (data.held_out.store, data.questions)
    texts_to_ids = tokenizer.backend_tokenizer.to_str()
    if values["version"] == CHAT_TEMPLATE:
        texts_to_ids += str(tokenizer.chat_template)
    seen = _pictures_seen(store, data.lengths.has_image, held_out) if accelerator.is_main_process else None
    pictures, held_out_pictures = gather_from_ranks(accelerator, seen)[0]  # one rank asks the file system
    return {
        "flags": flags,
        "data": {
            "files": [[Path(path).name, digest] for path, digest in zip(store.data_path, store.digests(), strict=True)],
            "all": store.digest(),
            "lengths": of_sampler["lengths"],
        },
        "images": pictures,
        "model": {
            "frozen": frozen_fingerprints(accelerator, llava),
            "tokenizer": _digest(texts_to_ids.encode()),
            "image processor": _settings(data.samples.image_reader.processor.to_dict()),
            "language model": _settings(llava.language_model.config),
            "vision tower": _settings(llava.vision_tower.model.config),
        },
        "computation": _computation(accelerator, values),
        "held out": held_out and {"questions": question_digest(held_out[1]), "images": held_out_pictures},
    }


def differences(theirs: dict, mine: dict, may_differ: list[str]) -> tuple[list[str], list[str]]:
    """Return (a line for each difference, the names by which `--resume_ignore` would let them pass)."""
    ignored = {compared_as(name) or name for name in may_differ}
    found = [(name, f"{_label(name)}: {line}") for name, line in _flag_lines(theirs["flags"], mine["flags"])]
    found += [("data", f"data: {line}") for line in _data_lines(theirs["data"], mine["data"])]
    # Checkpoints of before have no entry.
    found += [("images", f"images: {line}") for line in _image_lines(theirs.get("images", []), mine["images"])]
    found += [("model", f"model: {line}") for line in _model_lines(theirs["model"], mine["model"])]
    found = [(name, line) for name, line in found if name not in ignored]
    return [line for _, line in found], list(dict.fromkeys(name for name, _ in found))


def _label(name: str) -> str:
    others = [f.name for f in flag_fields() if f.name != name and compared_as(f.name) == name]
    return ", ".join(f"--{flag}" for flag in (name, *others))


def _flag_lines(theirs: dict, mine: dict) -> list[tuple[str, str]]:
    # A flag that came later had no effect before, as by its default.
    pairs = {name: (theirs.get(name, _default_of(name)), mine.get(name, "no such flag")) for name in theirs | mine}
    return [(name, f"{was} in the checkpoint, {now} now") for name, (was, now) in pairs.items() if was != now]


def _default_of(name: str) -> object:
    return next((field.default for field in flag_fields() if field.name == name), "no such flag")


def _data_lines(theirs: dict, mine: dict) -> list[str]:
    if len(theirs["files"]) != len(mine["files"]):
        return [f"{counted(len(theirs['files']), 'file')} in the checkpoint, {len(mine['files'])} now"]
    pairs = zip(theirs["files"], mine["files"], strict=True)
    changed = [(was, now) for (was, old), (now, new) in pairs if old != new]
    lines = [f"file {now} has changed" + (f" (was {was})" if was != now else "") for was, now in changed]
    if not lines and theirs["all"] != mine["all"]:
        lines.append("--exclude leaves out other records")
    if not lines and theirs["lengths"] != mine["lengths"]:
        lines.append("the samples have different lengths, because of other flags, another tokenizer or missing images")
    return lines


def _image_lines(theirs: list[dict], mine: list[dict]) -> list[str]:
    """Of the pictures that both have looked at; with other data these may be few."""
    both = [(name, was[name], now[name]) for was, now in zip(theirs, mine) for name in was if name in now]  # noqa: B905
    gone = [name for name, was, now in both if was and not now]
    changed = [(name, was[0], now[0]) for name, was, now in both if was and now and was != now]
    lines = []
    if changed:
        name, was, now = changed[0]
        sizes = f"{counted(was, 'byte')} in the checkpoint, {now:,} now" if was != now else "of the same size"
        verb = "has" if len(changed) == 1 else "have"
        lines.append(f"{len(changed)} of {len(both)} compared {verb} changed, first {shorten(name)} ({sizes})")
    if gone:
        lines.append(f"{len(gone)} of {len(both)} compared cannot be read now, first {shorten(gone[0])}")
    return lines


def _model_lines(theirs: dict, mine: dict) -> list[str]:
    lines = []
    for part, was in theirs["frozen"].items():
        now = mine["frozen"].get(part, was)
        # In another precision the same weights are other numbers; the precision itself is among the flags.
        if was != now and was.split()[0] == now.split()[0]:
            lines.append(f"the weights of the frozen {part} are different")
    if theirs["tokenizer"] != mine["tokenizer"]:
        lines.append("the tokenizer is a different one")
    for part in ("image processor", "language model", "vision tower"):
        was, now = theirs[part], mine[part]
        # Settings that only one of the two knows came or went with a version of transformers.
        lines += [
            f"{key} of the {part} is {was[key]} in the checkpoint, {now[key]} now"
            for key in was.keys() & now.keys()
            if was[key] != now[key]
        ]
    return sorted(lines)


def resume_notes(manifest: dict, identity: dict) -> list[str]:
    """Return what a resumed run has to say though it is not refused, a sentence or two for each.

    Args:
        manifest: of the checkpoint that was loaded.
        identity: of this run.
    """
    known = manifest["identity"]
    mine = versions() | identity["computation"]
    theirs = manifest["versions"] | {"processes": manifest["world_size"]} | known.get("computation", {})
    differing = [name for name in mine if name in theirs and theirs[name] != mine[name]]
    notes = []
    if differing:
        listed = "; ".join(f"{name}: {theirs[name]} then, {mine[name]} now" for name in differing)
        dropout = " Dropout, if there is any, draws different masks." if "processes" in differing else ""
        notes.append(
            f"Resumed, but not to the last bit, because it is computed differently ({listed}): the numbers may "
            f"differ from an uninterrupted run's by rounding.{dropout}"
        )
    was, now = known.get("held out"), identity["held out"]
    if was and now:
        changed = _image_lines(was["images"], now["images"])
        if was["questions"] != now["questions"]:
            changed = ["the questions are different"]
        if changed:
            notes.append(
                f"Held-out scores from here on do not measure the same as those up to step {manifest['step']:,}, "
                f"though log.jsonl and the curves show them as one series ({'; '.join(changed)})."
            )
    return notes


def _computation(accelerator: Accelerator, arguments: dict) -> dict:
    """What the last digits of the numbers depend on, besides versions; of all ranks together. A collective."""
    on_cpu = accelerator.device.type == "cpu"
    own = {"device": _cpu_name() if on_cpu else torch.cuda.get_device_name(accelerator.device)}
    if on_cpu:  # sums are divided among them
        own["CPU threads"] = torch.get_num_threads()
    ranks = gather_from_ranks(accelerator, own)
    together = {name: " and ".join(sorted({str(rank[name]) for rank in ranks})) for name in own}
    flags = {f"--{name}": arguments[name] for name in sorted(arguments) if decides(name) == ROUNDING}
    kind = backend(accelerator) + (", offloaded" if is_offloaded(accelerator) else "")
    return {"processes": accelerator.num_processes, "backend": kind} | together | flags


def _cpu_name() -> str:
    """`AMD EPYC 7B13, AVX2`: kernels are chosen by both."""
    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures_seen(
    store: RecordStore, has_image: np.ndarray, held_out: tuple[RecordStore, Sequence[Question]] | None
) -> tuple[list[dict], list[dict]]:
    """`picture_fingerprints` of a sample of the records and of the held-out questions."""
    names = [(index, name) for index in store.sample(has_image, PICTURES) for name in store.image_names(index)]
    held_out_pictures = [image for question in held_out[1] for image in question.images] if held_out else []
    return picture_fingerprints(store, names), picture_fingerprints(held_out[0], held_out_pictures) if held_out else []


def picture_fingerprints(store: RecordStore, images: Iterable[tuple[int, str]]) -> list[dict[str, list | None]]:
    """Return for each data file: image name to bytes and digest, or None if it cannot be read, of the first `PICTURES`.

    Times say nothing: a copy, a checkout or an archive unpacked again has others. At most 48 MB are read, by several
    threads, because a network file system is slow to answer.
    """
    chosen = list(dict.fromkeys((store.source(index), store.image_folder(index), name) for index, name in images))
    chosen = chosen[:PICTURES]
    found: list[dict] = [{} for _ in store.data_path]
    with ThreadPoolExecutor(16) as pool:
        fingerprints = pool.map(lambda picture: _picture_fingerprint(*picture[1:]), chosen)
        for (source, _, name), fingerprint in zip(chosen, fingerprints, strict=True):
            found[source][name] = fingerprint
    return found


def _picture_fingerprint(folder: str | None, name: str) -> list | None:
    """Size in bytes and digest of the content: all of a small one, else its beginning, middle and end."""
    if folder is None:
        return None
    try:
        with open(image_path(folder, name), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            places = (0, (size - PIECE) // 2, size - PIECE) if size > 3 * PIECE else (0, PIECE, 2 * PIECE)
            return [size, _digest(b"".join(os.pread(file.fileno(), PIECE, place) for place in places))]
    except (OSError, BadImage):
        return None


def question_digest(questions: Sequence[Question]) -> str:
    """Return a digest of all that a held-out score depends on, besides pictures."""
    texts = [[q.input_ids.tolist(), q.tokens, q.answer, q.metric, [name for _, name in q.images]] for q in questions]
    return _digest(json.dumps(texts).encode())


# --- model -----------------------------------------------------------------------------------------------------------


def _settings(config: PretrainedConfig | dict) -> dict:
    values = json.loads(json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str))  # no tuples
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in NOT_THE_MODEL}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@torch.no_grad()
def frozen_fingerprints(accelerator: Accelerator, model: nn.Module) -> dict[str, str]:
    """Return part of the model to `dtype fingerprint` of its frozen weights. A collective: all ranks must call it.

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
