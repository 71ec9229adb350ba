"""The projector between vision tower and language model: built, gathered, saved and loaded.

Replaces LLaVA's `multimodal_projector/builder.py` and the projector parts of `train.py` and `llava_arch.py`. The file
is LLaVA's own `mm_projector.bin`, so that weights travel both ways; no pickle in it is run and it is never half-loaded.
This module stands alone: it needs torch and safetensors, and DeepSpeed only where parameters are partitioned.
"""

import errno
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

PROJECTOR_FILE = "mm_projector.bin"


def build_projector(kind: str, vision_width: int, text_width: int) -> nn.Module:
    """The projector that LLaVA's `--mm_projector_type` names: features [..., vision_width] to [..., text_width].

    `linear` is one layer; `mlpNx_gelu` is N linear layers with a GELU before each but the first; `identity` passes the
    features on. The submodules are numbered as LLaVA's are, so that its weight files fit.

    Raises:
        ValueError: the kind is unknown, or `identity` stands between different widths.
    """
    if kind == "linear":
        return nn.Linear(vision_width, text_width)
    if kind == "identity":
        if vision_width != text_width:
            raise ValueError(
                f"--mm_projector_type identity needs a vision tower as wide as the language model, but the tower gives "
                f"{vision_width} features and the language model takes {text_width}; use mlp2x_gelu or linear."
            )
        return nn.Identity()
    if match := re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        return nn.Sequential(*layers)
    raise ValueError(
        f"--mm_projector_type {kind!r} is unknown. Known are linear, identity and mlpNx_gelu with N linear layers "
        f"(mlp2x_gelu is LLaVA-1.5's)."
    )


def whole(parameter: torch.Tensor, modified: bool = False):
    """A block inside which a parameter that ZeRO-3 has divided is whole; all ranks must enter it.

    Args:
        modified: what rank 0 has written to it when the block ends is kept, on all ranks.
    """
    # DeepSpeed marks what it has partitioned with ds_id. The import stands here because it need not be installed.
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)


def is_main_process() -> bool:
    """Return whether this rank writes files: the first one, or the only process."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def gathered_state_dict(
    named_parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor on the CPU) one after the other, on the main process only.

    Under ZeRO-3 a rank holds a slice of each parameter, and putting one together takes all ranks: every rank must run
    this generator to its end, although only the main process receives anything. One parameter at a time is whole, so
    that a model larger than a GPU can be saved; `dict(...)`, called on every rank, collects a small one.

    Args:
        named_parameters: names with parameters or buffers, in the same order on every rank.
        dtype: floating-point tensors are cast to it; None keeps them as they are.
    """
    for name, parameter in named_parameters:
        tensor = None
        with whole(parameter):
            if is_main_process():
                target = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                # copy=True: on a CPU the tensor would otherwise share memory that DeepSpeed frees on leaving the block.
                tensor = parameter.detach().to(device="cpu", dtype=target, copy=True).contiguous()
        if tensor is not None:
            yield name, tensor


def save_projector(
    projector: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    beside: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write LLaVA's `mm_projector.bin`: a dict of `model.mm_projector.0.weight` and so on, in `dtype` or as trained.

    Every rank calls it (ZeRO-3 gathers), the main process writes. The file appears whole or not at all.

    Args:
        path: the file, or a directory that gets `mm_projector.bin`.
        beside: what else was trained with it and belongs into the file, by its name there.
    """
    named = [(f"model.mm_projector.{name}", tensor) for name, tensor in projector.state_dict(keep_vars=True).items()]
    weights = dict(gathered_state_dict([*named, *(beside or {}).items()], dtype))
    if not is_main_process():
        return
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    content = io.BytesIO()  # writing to the file itself torch would make a RuntimeError of a full disk
    torch.save(weights, content)
    with open(unfinished, "wb") as file:  # what files.py does, once more: this module stands alone
        file.write(content.getbuffer())
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that has no fsync
                raise
    os.replace(unfinished, path)


def find_projector(path: str | Path) -> Path:
    """The file of a projector, itself or the directory that holds it. Raises FileNotFoundError: there is none."""
    path = Path(path)
    if path.is_dir():
        path = path / PROJECTOR_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no projector at {path}. --pretrain_mm_mlp_adapter takes the {PROJECTOR_FILE} that stage 1 "
            f"wrote, or the directory that holds it."
        )
    return path


def load_projector(projector: nn.Module, path: str | Path, beside: tuple[str, ...] = ()) -> None:
    """Copy the weights in `path` into `projector`, in place and in the projector's own dtype; all of them or none.

    Reads LLaVA's `mm_projector.bin`, a `.safetensors` file with the same names, or a directory that holds the former.
    The names count from after `mm_projector.`, so that files written by way of PEFT or a wrapper fit too. Call it
    before the model is handed to DeepSpeed, which leaves only slices to write to.

    Args:
        beside: endings of names that may stand in the file too and are left to the caller; others are an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no table of tensors, or its names or shapes are not the projector's. Nothing is changed.
        RuntimeError: the projector is partitioned already.
    """
    if any(hasattr(parameter, "ds_id") for parameter in projector.parameters()):
        raise RuntimeError("load_projector must be called before the projector is partitioned by DeepSpeed ZeRO-3.")
    path = find_projector(path)
    found: dict[str, torch.Tensor] = {}
    foreign = []
    for key, tensor in read_tensors(path).items():
        prefix, mark, name = key.rpartition("mm_projector.")
        if beside and key.endswith(beside):
            continue
        if not mark or (prefix and not prefix.endswith(".")):
            foreign.append(key)
        elif name in found:
            raise ValueError(f"{path} holds two tensors for the projector's {name!r}; the second is {key!r}.")
        else:
            found[name] = tensor
    if foreign:
        raise ValueError(f"{path} holds more than a projector: {list_some(foreign)}. {_what_they_are(foreign)}")

    expected = projector.state_dict()
    fitting = f"The file holds a projector of type {_kind_of(found)}: check --mm_projector_type."
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{path} lacks {list_some(missing)}, which this projector has. {fitting}")
    if extra := [name for name in found if name not in expected]:
        raise ValueError(f"{path} also holds {list_some(extra)}, which this projector does not have. {fitting}")
    for name, parameter in expected.items():
        if found[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} is {list(found[name].shape)}, but this model needs {list(parameter.shape)}. "
                f"{_fitting_widths(found, expected)}"
            )
        if not found[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} has dtype {found[name].dtype}, which is no floating-point weight. Save the projector "
                f"without quantisation."
            )
    projector.load_state_dict(found, strict=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin or .safetensors file by name; in a .bin, a pickle, anything but tensors is refused unrun."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}). Fetch or write it again.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds something other than tensors, which could run code when read. It was not "
            f"loaded; take a {PROJECTOR_FILE} that holds tensors only."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole torch file ({error}). Fetch or write it again.") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{path} does not hold a table of tensors by name, as LLaVA's {PROJECTOR_FILE} does.")
    return content


def list_some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _what_they_are(foreign: list[str]) -> str:
    if any("embed_tokens" in key or "embed_in" in key for key in foreign):
        return (
            "LLaVA adds the token embeddings when stage 1 ran with --mm_use_im_start_end; without the new tokens the "
            "projector would not do what it was trained for. Use --mm_use_im_start_end True, or another projector."
        )
    if any("image_newline" in key for key in foreign):
        return (
            "It was trained on images in tiles: use --image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad, "
            "or another projector."
        )
    if any("vision_resampler" in key for key in foreign):
        return "The resampler in it is a part that LLaVA-1.5 models do not have; its projector was trained behind it."
    return "A projector's names contain 'mm_projector.'; this may be the file of a whole model or of something else."


def _kind_of(weights: dict[str, torch.Tensor]) -> str:
    """The value of --mm_projector_type whose parameter names these are, as far as it can be told."""
    names = set(weights)
    if not names:
        return "identity (no weights)"
    if names == {"weight", "bias"}:
        return "linear"
    for depth in range(1, len(names) // 2 + 1):
        if names == {f"{2 * layer}.{part}" for layer in range(depth) for part in ("weight", "bias")}:
            return f"mlp{depth}x_gelu"
    return f"unknown here (with {list_some(sorted(names))})"


def _fitting_widths(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """Which flag to look at: the first weight of a projector is [text_width, vision_width]."""
    first = next(iter(name for name in expected if name.endswith("weight")))
    if found[first].dim() != 2:
        return "Its first weight is not a matrix: a quantised projector cannot be loaded."
    (text, vision), (text_here, vision_here) = found[first].shape, expected[first].shape
    hints = []
    if vision != vision_here:
        hints.append(f"It belongs to a tower with {vision} features, this one has {vision_here}: check --vision_tower.")
    if text != text_here:
        hints.append(
            f"It belongs to a language model of width {text}, this one has {text_here}: check --model_name_or_path."
        )
    return " ".join(hints) or "It comes from a projector of another shape: check --mm_projector_type."
