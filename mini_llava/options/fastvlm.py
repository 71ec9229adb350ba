"""FastViTHD, the vision tower of Apple's FastVLM: a model of timm, and its names in Apple's own checkpoints."""

import re

import torch
from transformers import PreTrainedConfig

from ..errors import UserError
from ..model.vision_tower import empty_model

# The tower of FastVLM under the name that apple's own checkpoints have for it; the number is the image size.
FASTVITHD = re.compile(r"mobileclip_l_(\d+)")


def check_timm() -> None:
    """Raise unless timm, which builds FastVLM's tower, is installed; it is imported only where there is one."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit the torch is a RuntimeError
        raise UserError(
            f"The vision tower is a model of timm, which cannot be imported here ({error}). Install it with `pip "
            f"install timm`; it needs a torchvision that fits the installed torch."
        ) from error


def fastvithd_config() -> PreTrainedConfig:
    """Return the configuration of the tower that Apple's checkpoints have under its name only."""
    check_timm()
    from transformers import TimmWrapperConfig

    return complete_timm(TimmWrapperConfig(architecture="fastvit_mci3", model_args={"inference_mode": True}))


def complete_timm(config: PreTrainedConfig) -> PreTrainedConfig:
    """Add width and stride, which a timm model shows only when it is built, under the names that the others have."""
    side = 256
    shape = empty_model(config)(torch.empty(1, 3, side, side, device="meta"), do_pooling=False).last_hidden_state.shape
    if len(shape) != 4:
        raise UserError(
            f"The timm model {config.architecture} gives features of shape {list(shape)}. Known are those that give a "
            f"grid [1, width, rows, columns], as FastVLM's does."
        )
    config.hidden_size, config.patch_size = shape[1], side // shape[2]
    return config


def apple_name(name: str) -> str:
    """Return the name that a weight of timm's `fastvit_mci3` has in apple's FastVLM checkpoints.

    Apple numbers downsampling, position encoding and stages in one list: 0, (1) 2, (3) 4, (5, 6) 7, (8, 9) 10.
    """
    name = name.removeprefix("timm_model.")
    if match := re.match(r"stages\.(\d)\.", name):
        stage = int(match[1])
        blocks = (0, 2, 4, 7, 10)[stage]
        down = (None, 1, 3, 5, 8)[stage]
        for here, there in (("blocks", blocks), ("downsample", down), ("pos_emb", blocks - 1)):
            name = name.replace(f"stages.{stage}.{here}.", f"network.{there}.")
        name = name.replace(f"network.{down}.proj.0.reparam_conv", f"network.{down}.proj.0.lkb_reparam")
        name = name.replace(".mlp.", ".convffn.").replace(".gamma", "")
    for here, there in (("stem", "patch_embed"), ("final_conv", "conv_exp")):
        name = re.sub(rf"^{here}\.", f"{there}.", name)
    return "model." + name.replace(".se.fc1.", ".se.reduce.").replace(".se.fc2.", ".se.expand.")
