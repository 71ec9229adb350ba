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

from mini_llava.data.templates import get_template
from mini_llava.formats import write
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import tower_image_processor
from mini_llava.model.llava import LlavaModel

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, LAYERS = 28, 14, 32, 3
SHAPE = dict(
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
)
FASTVIT_STRIDE = 64
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


def save_fastvit(folder: str | Path, seed: int = 0) -> str:
    """FastVLM's tower at a hundredth of its width, as the tower inside a FastVLM model has it; it needs timm."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    small = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 64, 128], "inference_mode": True}
    torch.manual_seed(seed)
    model = TimmWrapperModel(TimmWrapperConfig(architecture="fastvit_mci3", model_args=small))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "running_var")):  # statistics unlike those of any batch
                tensor.add_(0.1 * torch.rand_like(tensor))
            elif tensor.dim() > 1:  # timm's own are so small that five stages let nothing of the picture through
                tensor.copy_(torch.randn_like(tensor) / tensor[0].numel() ** 0.5)
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    side = 2 * FASTVIT_STRIDE
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0] * 3, image_std=[1] * 3
    ).save_pretrained(folder)
    return str(folder)


def save_whole(
    model: LlavaModel,
    tower: str,
    folder: Path,
    language_model: str | Path,
    version: str,
    export_format: str = "transformers",
    ratio: str = "pad",
) -> str:
    """Writes the result of a run with this tower and the tokenizer of this language model; returns the run's line."""
    return write.save_whole_model(
        folder,
        model,
        write.Description(
            projector_type="mlp2x_gelu",
            vision_tower_name=tower,
            image_aspect_ratio=ratio,
            model_max_length=128,
            version=version,
            template=get_template(version),
            tokenizer=load_tokenizer(language_model),
            image_processor=tower_image_processor(tower),
            export_format=export_format,
            include_vision_tower=True,
            dtype=torch.float32,
        ),
    )
