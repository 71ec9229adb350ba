"""`--image_size`: a tower for pictures of another size, its position embeddings interpolated once before training."""

import copy

import torch
from torch import nn

from ..model.projector import gathered
from ..model.vision_tower import has_layers


def resize(model: nn.Module, image_size: int) -> None:
    """Make the tower's model take square pictures of another size; without position embeddings it stays as it is.

    transformers' own function interpolates, as in each forward with `interpolate_pos_encoding`, but always in fp32.
    """
    if not has_layers(model.config) or model.config.image_size == image_size:
        return
    name, old = next((n, module) for n, module in model.named_modules() if hasattr(module, "interpolate_pos_encoding"))
    resized = copy.deepcopy(model.config)
    resized.image_size = image_size
    with torch.device("meta" if next(model.parameters()).is_meta else "cpu"):
        # The new one has parameters and buffers for the new number of patches.
        in_fp32, new = type(old)(model.config), type(old)(resized)
    model.config = resized
    for path, parameter in old.named_parameters():
        if "position_embedding" in path:
            with gathered(parameter), torch.no_grad():  # ZeRO-3 may have partitioned it
                in_fp32.get_parameter(path).copy_(parameter)
                like = new.get_parameter(path)
                tokens = torch.empty(1, *like.shape[-2:], device=like.device)  # only its shape is read
                values = in_fp32.interpolate_pos_encoding(tokens, image_size, image_size).view_as(like)
                parameter = nn.Parameter(values.to(parameter))
        owner, _, last = path.rpartition(".")
        setattr(new.get_submodule(owner), last, parameter)
    model.set_submodule(name, new)
