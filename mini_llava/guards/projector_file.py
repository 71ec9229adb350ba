"""Whether a projector's file fits the model; if not, a sentence about what it was made for."""

from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..formats.layouts import find_projector
from ..model.projector import list_some, read_tensors


def check_projector_file(projector: nn.Module, path: str | Path, others: tuple[str, ...] = ()) -> None:
    """Raise UserError if `load_projector` would refuse the file; the sentence says which flag to look at."""
    path = find_projector(path)
    found: dict[str, torch.Tensor] = {}
    foreign = []
    for key, tensor in read_tensors(path).items():
        prefix, mark, name = key.rpartition("mm_projector.")
        if others and key.endswith(others):
            continue
        if not mark or (prefix and not prefix.endswith(".")):
            foreign.append(key)
        elif name in found:
            raise UserError(f"{path} holds two tensors for the projector's {name!r}; the second is {key!r}.")
        else:
            found[name] = tensor
    if foreign:
        raise UserError(f"{path} holds more than a projector: {list_some(foreign)}. {_what_they_are(foreign)}")

    expected = projector.state_dict()
    fitting = f"The file holds a projector of type {_kind_of(found)}: check --mm_projector_type."
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{path} lacks {list_some(missing)}, which this projector has. {fitting}")
    if extra := [name for name in found if name not in expected]:
        raise UserError(f"{path} also holds {list_some(extra)}, which this projector does not have. {fitting}")
    for name, parameter in expected.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{path}: {name} is {list(found[name].shape)}, but this model needs {list(parameter.shape)}. "
                f"{_fitting_widths(found, expected)}"
            )
        if not found[name].is_floating_point():
            raise UserError(
                f"{path}: {name} has dtype {found[name].dtype}, which is no floating-point weight. Save the projector "
                f"without quantisation."
            )


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
    """Return the value of --mm_projector_type that gives these parameter names, where one does."""
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
    """Return which flag to look at: the first weight of a projector is [text_width, vision_width]."""
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
