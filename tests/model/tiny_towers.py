"""Vision towers of every kind, real and tiny, written as the directories that `--vision_tower` reads.

`save_tower("siglip", folder)` returns the folder's path. The weights are transformers' own random ones, from a seed.
"""

from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, LAYERS = 28, 14, 32, 3
SHAPE = dict(
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
)
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CROPPED = dict(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
# kind: (model, configuration, image processor, tokens in front of the patches)
KINDS = {
    "clip": (
        CLIPVisionModel,
        CLIPVisionConfig(**SHAPE, intermediate_size=64),
        CLIPImageProcessorPil(**CROPPED),
        1,
    ),
    "siglip": (
        SiglipVisionModel,
        SiglipVisionConfig(**SHAPE, intermediate_size=64),
        SiglipImageProcessorPil(size=SQUARE),
        0,
    ),
    "dinov2": (
        Dinov2Model,
        Dinov2Config(**SHAPE, mlp_ratio=2),
        BitImageProcessorPil(**CROPPED, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        1,
    ),
    "dinov2_with_registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3),
        BitImageProcessorPil(**CROPPED, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        4,
    ),
}


def save_tower(kind: str, folder: str | Path, seed: int = 0) -> str:
    model_class, config, processor, _ = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no part, zero at the start as registers are, goes unnoticed
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
