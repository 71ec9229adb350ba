"""The vision encoder behind one small interface: pixel values in, patch features out.

Replaces `llava/model/multimodal_encoder/clip_encoder.py`. There the forward runs under `no_grad` in any case, so that
unfreezing the tower trains nothing; here gradients flow if and only if some parameter of the tower is trained.
"""

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionModel

from ..data.images import normalise
from ..data.tokenization import foreign_code_refused

SELECT_FEATURES = ("patch", "cls_patch")


class VisionTower(nn.Module):
    """A CLIP vision model cut at one of its layers.

    Attributes:
        model: transformers' `CLIPVisionModel`.
        tokens_per_image, hidden_size: shape of the features of one image.
        image_size: side of the square picture it takes, pixels.
        pixel_table: float32 [3, 256], what its image processor makes of bytes; None if it is given floats only.
    """

    def __init__(self, model: nn.Module, select_layer: int = -2, select_feature: str = "patch"):
        """
        Args:
            select_layer: index into the hidden states (0 = embeddings, -1 = after the last layer), LLaVA-1.5 takes -2.
            select_feature: `patch` drops the class token, `cls_patch` keeps it.
        """
        super().__init__()
        layers = model.config.num_hidden_layers
        if not -layers - 1 <= select_layer <= layers:
            raise ValueError(
                f"--mm_vision_select_layer {select_layer}: the vision tower has {layers} layers, "
                f"so that {-layers - 1} to {layers} are possible."
            )
        self.model = model
        self.select_layer, self.select_feature = select_layer, select_feature
        self.image_size, self.hidden_size = model.config.image_size, model.config.hidden_size
        self.tokens_per_image = tokens_per_image(model.config, select_feature)
        # No buffer: DeepSpeed and `.to(dtype)` would round it, and DDP would broadcast it before each forward.
        self.pixel_table: torch.Tensor | None = None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, image_size, image_size] -> [images, tokens_per_image, hidden_size], in the tower's dtype.

        Bytes (uint8) are normalised by `pixel_table`; floats are taken as they are.
        """
        if pixel_values.dtype == torch.uint8:
            self.pixel_table = self.pixel_table.to(pixel_values.device)
            pixel_values = normalise(pixel_values, self.pixel_table)
        trained = self.training and any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            hidden_states = self.model(pixel_values.to(self.model.dtype), output_hidden_states=True).hidden_states
        features = hidden_states[self.select_layer]
        return features if self.select_feature == "cls_patch" else features[:, 1:]

    def unused_parameters(self) -> set[str]:
        """Names of the parameters behind the selected layer: no gradient ever reaches them."""
        used_layers = self.select_layer % (self.model.config.num_hidden_layers + 1)
        return {
            name
            for name, _ in self.named_parameters()
            if "post_layernorm" in name
            or (".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= used_layers)
        }


def tokens_per_image(config, select_feature: str) -> int:
    """Features of one image under a vision tower's configuration, known before any weight is read."""
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"--mm_vision_select_feature {select_feature}: unknown; known: {', '.join(SELECT_FEATURES)}.")
    return (config.image_size // config.patch_size) ** 2 + (select_feature == "cls_patch")


def load_vision_config(path: str, trust_remote_code: bool = False):
    """The configuration of a CLIP vision tower; of a whole CLIP model (`openai/clip-*`) its vision part."""
    with foreign_code_refused(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise ValueError(f"--vision_tower {path}: its model type is {config.model_type}, expected a CLIP vision model.")
    return config


def load_vision_tower(
    path: str, select_layer: int, select_feature: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> VisionTower:
    """Reads a tower from a local directory or a hub name, whole CLIP models included."""
    config = load_vision_config(path, trust_remote_code)
    with foreign_code_refused(path):
        model = CLIPVisionModel.from_pretrained(path, config=config, dtype=dtype)
    return VisionTower(model, select_layer, select_feature)
