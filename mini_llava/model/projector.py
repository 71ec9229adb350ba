"""The projector between vision tower and language model: built, gathered, saved and loaded.

Replaces LLaVA's `multimodal_projector/builder.py` and the projector parts of `train.py` and `llava_arch.py`. The file
is LLaVA's own `mm_projector.bin`, so that weights can be exchanged both ways; no pickle in it is run and it is never
half-loaded. This file needs torch and safetensors, nothing else of the project, and DeepSpeed only where parameters are
partitioned.
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


class ProjectorError(ValueError):
    """A type of projector is unknown, or a file of weights is damaged or is of another projector."""


def build_projector(kind: str, vision_width: int, text_width: int) -> nn.Module:
    """Return the projector that LLaVA's `--mm_projector_type` names: features [..., vision_width] to [..., text_width].

    `linear` is one layer; `mlpNx_gelu` is N linear layers with a GELU before each but the first; `identity` passes the
    features on. The submodules are numbered as LLaVA's are, so that its weight files fit.

    Raises:
        ValueError: the kind is unknown, or `identity` stands between different widths.
    """
    if kind == "linear":
        return nn.Linear(vision_width, text_width)
    if kind == "identity":
        if vision_width != text_width:
            raise ProjectorError(
                f"--mm_projector_type identity needs a vision tower as wide as the language model, but the tower gives "
                f"{vision_width} features and the language model takes {text_width}; use mlp2x_gelu or linear."
            )
        return nn.Identity()
    if match := re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        return nn.Sequential(*layers)
    raise ProjectorError(
        f"--mm_projector_type {kind!r} is unknown. Known are linear, identity and mlpNx_gelu with N linear layers "
        f"(mlp2x_gelu is LLaVA-1.5's)."
    )


def gathered(parameter: torch.Tensor, modified: bool = False):
    """Return a context in which a parameter that ZeRO-3 has partitioned is gathered; all ranks must enter it.

    modified: what rank 0 writes to it inside is kept, on all ranks.
    """
    # DeepSpeed marks what it has partitioned with ds_id. It is imported here because it need not be installed.
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
    """Yield (name, full tensor on the CPU) one at a time, on the main process only.

    Under ZeRO-3 a rank holds a slice of each parameter, and gathering is a collective: every rank must run this
    generator to its end, although only the main process receives anything. One parameter is gathered at a time, so that
    a model larger than a GPU can be saved; `dict(...)`, called on every rank, collects a small one.

    Args:
        named_parameters: names with parameters or buffers, in the same order on every rank.
        dtype: floating-point tensors are cast to it; None keeps them as they are.
    """
    for name, parameter in named_parameters:
        tensor = None
        with gathered(parameter):
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
    others: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write LLaVA's `mm_projector.bin`: a dict of `model.mm_projector.0.weight` and so on, in `dtype` or as trained.

    Every rank calls it (ZeRO-3 gathers), the main process writes. The file is written atomically.

    Args:
        path: the file, or a directory that gets `mm_projector.bin`.
        others: further parameters for the file, by their names there.
    """
    named = [(f"model.mm_projector.{name}", tensor) for name, tensor in projector.state_dict(keep_vars=True).items()]
    weights = dict(gathered_state_dict([*named, *(others or {}).items()], dtype))
    if not is_main_process():
        return
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    content = io.BytesIO()  # writing to the file itself, torch turns a full disk into a RuntimeError
    torch.save(weights, content)
    with open(unfinished, "wb") as file:  # as files.py does, of which this file must not depend
        file.write(content.getbuffer())
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that has no fsync
                raise
    os.replace(unfinished, path)


def load_projector(projector: nn.Module, path: str | Path, others: tuple[str, ...] = ()) -> None:
    """Copy the weights in `path` into `projector`, in place and in the projector's own dtype; all of them or none.

    Reads LLaVA's `mm_projector.bin`, a `.safetensors` file with the same names, or a directory that holds the former.
    Names are compared from after `mm_projector.` on, so that files written by way of PEFT or a wrapper fit too. Call it
    before the model is handed to DeepSpeed, which leaves only slices to write to.

    Args:
        others: endings of names that may be in the file too and are left to the caller; any more are an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a table of tensors, or its names or shapes are not the projector's.
        RuntimeError: the projector is partitioned already.
    """
    if any(hasattr(parameter, "ds_id") for parameter in projector.parameters()):
        raise RuntimeError("load_projector must be called before the projector is partitioned by DeepSpeed ZeRO-3.")
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if not path.is_file():  # formats/layouts.py says the same before torch is imported
        raise FileNotFoundError(
            f"There is no projector at {path}. --pretrain_mm_mlp_adapter takes the {PROJECTOR_FILE} that stage 1 "
            f"wrote, or the directory that holds it."
        )
    stored = {key: tensor for key, tensor in read_tensors(path).items() if not key.endswith(others)}
    stored = {key.rpartition("mm_projector.")[2]: tensor for key, tensor in stored.items()}
    found, needed = ({name: list(tensor.shape) for name, tensor in t.items()} for t in (stored, projector.state_dict()))
    if found != needed:
        raise ProjectorError(f"{path} holds {found}, but this projector has {needed}.")
    projector.load_state_dict(stored)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin or .safetensors file; a .bin, a pickle, with anything else is refused unrun."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ProjectorError(
                f"{path} is not a whole safetensors file ({error}). Fetch or write it again."
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ProjectorError(
            f"{path} is damaged, or holds something other than tensors, which could run code when read. It was not "
            f"loaded; take a {PROJECTOR_FILE} that holds tensors only."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ProjectorError(f"{path} is not a whole torch file ({error}). Fetch or write it again.") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ProjectorError(f"{path} does not hold a table of tensors by name, as LLaVA's {PROJECTOR_FILE} does.")
    return content


def list_some(names: list[str]) -> str:
    """Return four names and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
