"""The vision encoder behind one small interface: pixel values in, patch features out.

Replaces `llava/model/multimodal_encoder/`, where every tower is its own class whose forward always runs under
`no_grad`, so that unfreezing it trains nothing. Here a tower is a line of data about a model of transformers, and
gradients flow if and only if one of its parameters is trained. Which parameters the features depend on is found with
autograd, on a copy on the meta device.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from ..data.images import normalise
from ..errors import UserError

SELECT_FEATURES = ("patch", "cls_patch")


class Kind(NamedTuple):
    """What a tower's configuration does not say.

    Attributes:
        class_token: whether a class token comes before the patches, with registers, if any, between them.
        level: prefix of the names of its weights in published files.
        renamed: (part of a name in transformers 5, the same in published files).
    """

    class_token: bool
    level: str = ""
    renamed: tuple[tuple[str, str], ...] = ()


_DINOV2_NAMES = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
# By the model_type in the configuration. A new tower is a line here, if transformers' AutoModel has its model.
KINDS = {
    "clip_vision_model": Kind(class_token=True, level="vision_model."),
    "siglip_vision_model": Kind(class_token=False, level="vision_model."),
    "dinov2": Kind(class_token=True, renamed=_DINOV2_NAMES),
    "dinov2_with_registers": Kind(class_token=True, renamed=_DINOV2_NAMES),
    "timm_wrapper": Kind(class_token=False),
}


class VisionTower(nn.Module):
    """A vision model of transformers, whose features are the hidden states of one of its layers.

    It is always in evaluation mode, trained or not: a BatchNorm (FastViTHD) keeps the statistics of the pretraining,
    because features must not depend on how a global batch is split.

    Attributes:
        model: transformers' model.
        tokens_per_image, hidden_size: shape of the features of one image.
        image_size: side of the square picture it takes, pixels.
        leading_tokens: number of hidden states before those of the patches.
        is_resized: whether its pictures have another size than those of the tower it was read from.
        pixel_table: float32 [3, 256], byte -> normalised value; None if it only gets floats.
    """

    def __init__(
        self, model: nn.Module, select_layer: int = -2, select_feature: str = "patch", image_size: int | None = None
    ):
        """
        Args:
            select_layer: index into the hidden states (0 = embeddings, -1 = after the last layer); LLaVA-1.5: -2.
            select_feature: `patch` drops class token and registers, `cls_patch` keeps them.
            image_size: None takes the configuration's.
        """
        super().__init__()
        check_select_layer(model.config, select_layer)
        self.model = _without_head(model)
        self.select_layer, self.select_feature = select_layer, select_feature
        self.image_size, self.hidden_size = image_size or model.config.image_size, model.config.hidden_size
        self.leading_tokens = leading_tokens(model.config)
        self.tokens_per_image = tokens_per_image(model.config, select_feature, self.image_size)
        # Not a buffer: DeepSpeed and `.to(dtype)` would round it, and DDP would broadcast it before each forward.
        self.pixel_table: torch.Tensor | None = None
        self.is_resized = False

    def train(self, mode: bool = True) -> "VisionTower":
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return features in the tower's dtype: [n, 3, image_size, image_size] -> [n, tokens_per_image, hidden_size].

        Bytes (uint8) are normalised by `pixel_table`; floats are taken as they are.
        """
        if pixel_values.dtype == torch.uint8:
            self.pixel_table = self.pixel_table.to(pixel_values.device)
            pixel_values = normalise(pixel_values, self.pixel_table)
        trained = self.training and any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = _hidden_state(self.model, pixel_values.to(self.model.dtype), self.select_layer)
        return features if self.select_feature == "cls_patch" else features[:, self.leading_tokens :]

    def unused_parameters(self) -> set[str]:
        """Return the names of the parameters that the features do not depend on, so that no gradient reaches them.

        These are layers after the selected one, the final norm, a pooling head, the token of masked patches.
        """
        copy = empty_model(self.model.config)
        blank = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        named = dict(copy.named_parameters(prefix="model"))
        with torch.enable_grad():
            features = _hidden_state(copy, blank, self.select_layer)
        gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def _hidden_state(model: nn.Module, pixel_values: torch.Tensor, select_layer: int) -> torch.Tensor:
    """Return [images, tokens, width], leading tokens included."""
    if has_layers(model.config):
        return model(pixel_values, output_hidden_states=True).hidden_states[select_layer]
    return model(pixel_values, do_pooling=False).last_hidden_state.flatten(2).transpose(1, 2)  # [images, width, h, w]


def _without_head(model: nn.Module) -> nn.Module:
    """Return the model with SigLIP's pooling head, which nothing uses, switched off; its weights stay.

    Under ZeRO-3 it would fail: it uses a submodule's weight without calling the submodule, so that it is not gathered.
    """
    for module in model.modules():
        if hasattr(module, "use_head"):
            module.use_head = False
    return model


def empty_model(config: PreTrainedConfig) -> nn.Module:
    """Return the model on the meta device, without memory for its weights; its `config` is a copy."""
    with torch.device("meta"):
        # Its class and not AutoModel, which would partition it under ZeRO-3.
        return _without_head(MODEL_MAPPING[type(config)](copy.deepcopy(config)))


# --------------------------------------------------------------------------------------------- what configurations say


def has_layers(config: PreTrainedConfig) -> bool:
    """Return whether there are hidden states to select from; a convolutional tower of timm only has its output."""
    return hasattr(config, "num_hidden_layers")


def takes_any_size(config: PreTrainedConfig) -> bool:
    """Return whether pictures may have any size: DINOv2 interpolates its position embeddings itself."""
    return config.model_type in ("dinov2", "dinov2_with_registers", "timm_wrapper")


def leading_tokens(config: PreTrainedConfig) -> int:
    """Return the number of class tokens and registers."""
    return KINDS[config.model_type].class_token + getattr(config, "num_register_tokens", 0)


def check_select_layer(config: PreTrainedConfig, select_layer: int) -> None:
    if not has_layers(config):
        if select_layer != -1:
            raise UserError(
                f"--mm_vision_select_layer {select_layer}: the vision tower ({config.architecture}) has no layers to "
                f"select from; its output, -1, is taken. Leave the flag out."
            )
        return
    layers = config.num_hidden_layers
    if not -layers - 1 <= select_layer <= layers:
        raise UserError(
            f"--mm_vision_select_layer {select_layer}: the vision tower has {layers} layer{'s' * (layers != 1)}, "
            f"so that {-layers - 1} to {layers} are possible."
        )


def tokens_per_image(config: PreTrainedConfig, select_feature: str, image_size: int | None = None) -> int:
    """Return the number of features of an image with a side of `image_size` pixels; None: the configuration's."""
    if select_feature not in SELECT_FEATURES:
        raise UserError(f"--mm_vision_select_feature {select_feature}: unknown; known: {', '.join(SELECT_FEATURES)}.")
    if select_feature == "cls_patch" and not KINDS[config.model_type].class_token:
        raise UserError(
            f"--mm_vision_select_feature cls_patch: a vision tower of type {config.model_type} has no class token, its "
            f"features are the patches alone. Leave the flag out."
        )
    image_size = image_size or config.image_size
    if not has_layers(config) and image_size % config.patch_size:
        raise UserError(
            f"The image size {image_size} is not a multiple of {config.patch_size}, the stride of "
            f"{config.architecture}."
        )
    return (image_size // config.patch_size) ** 2 + (leading_tokens(config) if select_feature == "cls_patch" else 0)


def published_name(config: PreTrainedConfig, name: str) -> str:
    """Return the name of a weight in published files, which transformers 4 and 5 both read."""
    kind = KINDS[config.model_type]
    for here, there in kind.renamed:
        name = name.replace(here, there)
    return kind.level + name.removeprefix(kind.level)
