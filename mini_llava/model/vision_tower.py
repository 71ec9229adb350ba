"""The vision encoder behind one small interface: pixel values in, patch features out.

Replaces `llava/model/multimodal_encoder/`, where every tower is a class of its own and its forward runs under `no_grad`
in any case, so that unfreezing it trains nothing. Here a tower is a line of data about a model of transformers, and
gradients flow if and only if some parameter of it is trained. What a tower uses of its weights is not listed anywhere:
a copy without memory is run, and autograd says which parameters its features depend on.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from ..data.images import normalise

SELECT_FEATURES = ("patch", "cls_patch")


class Kind(NamedTuple):
    """What a tower's configuration does not say.

    Attributes:
        class_token: whether a class token stands in front of the patches; registers, if any, follow it.
        level: what published files have in front of the names of its weights.
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
    """A vision model of transformers, cut at one of its layers.

    It is always in evaluation mode, trained or not: where there is a BatchNorm (FastViTHD), its statistics stay those
    of the pretraining, because features must not depend on how a global batch is cut.

    Attributes:
        model: transformers' model.
        tokens_per_image, hidden_size: shape of the features of one image.
        image_size: side of the square picture it takes, pixels.
        leading_tokens: what stands in front of the patches in its hidden states.
        is_resized: whether its pictures have another size than its name, or the one it was read from, stands for.
        pixel_table: float32 [3, 256], what its image processor makes of bytes; None if it is given floats only.
    """

    def __init__(
        self, model: nn.Module, select_layer: int = -2, select_feature: str = "patch", image_size: int | None = None
    ):
        """
        Args:
            select_layer: index into the hidden states (0 = embeddings, -1 = after the last layer), LLaVA-1.5 takes -2.
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
        # No buffer: DeepSpeed and `.to(dtype)` would round it, and DDP would broadcast it before each forward.
        self.pixel_table: torch.Tensor | None = None
        self.is_resized = False

    def train(self, mode: bool = True) -> "VisionTower":
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, 3, image_size, image_size] -> [images, tokens_per_image, hidden_size], in the tower's dtype.

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
        """Names of the parameters that the features do not depend on: no gradient ever reaches them.

        Layers behind the selected one, the norm at the end, a pooling head, the token of masked patches.
        """
        copy = empty_model(self.model.config)
        blank = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        named = dict(copy.named_parameters(prefix="model"))
        with torch.enable_grad():
            features = _hidden_state(copy, blank, self.select_layer)
        gradients = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        return {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}


def _hidden_state(model: nn.Module, pixel_values: torch.Tensor, select_layer: int) -> torch.Tensor:
    """[images, tokens, width], leading tokens included."""
    if has_layers(model.config):
        return model(pixel_values, output_hidden_states=True).hidden_states[select_layer]
    return model(pixel_values, do_pooling=False).last_hidden_state.flatten(2).transpose(1, 2)  # [images, width, h, w]


def _without_head(model: nn.Module) -> nn.Module:
    """SigLIP's pooling head keeps its weights and is not run: nothing uses its result, and under ZeRO-3 it would fail.

    It hands the weight of a submodule to a function, without calling the submodule that DeepSpeed gathers it for.
    """
    for module in model.modules():
        if hasattr(module, "use_head"):
            module.use_head = False
    return model


def empty_model(config: PreTrainedConfig) -> nn.Module:
    """The model without memory for its weights: its shapes, and what it computes from what. Its `config` is its own."""
    with torch.device("meta"):
        # Its class and not AutoModel, which would partition it under ZeRO-3.
        return _without_head(MODEL_MAPPING[type(config)](copy.deepcopy(config)))


# --------------------------------------------------------------------------------------------- what configurations say


def has_layers(config: PreTrainedConfig) -> bool:
    """Whether there are hidden states to select from; a convolutional tower of timm has its output only."""
    return hasattr(config, "num_hidden_layers")


def takes_any_size(config: PreTrainedConfig) -> bool:
    """Whether the picture need not have the configuration's size: DINOv2 fits its position embeddings to it."""
    return config.model_type in ("dinov2", "dinov2_with_registers", "timm_wrapper")


def leading_tokens(config: PreTrainedConfig) -> int:
    """Class token and registers."""
    return KINDS[config.model_type].class_token + getattr(config, "num_register_tokens", 0)


def check_select_layer(config: PreTrainedConfig, select_layer: int) -> None:
    if not has_layers(config):
        if select_layer != -1:
            raise ValueError(
                f"--mm_vision_select_layer {select_layer}: the vision tower ({config.architecture}) has no layers to "
                f"select from; its output, -1, is taken. Leave the flag out."
            )
        return
    layers = config.num_hidden_layers
    if not -layers - 1 <= select_layer <= layers:
        raise ValueError(
            f"--mm_vision_select_layer {select_layer}: the vision tower has {layers} layer{'s' * (layers != 1)}, "
            f"so that {-layers - 1} to {layers} are possible."
        )


def tokens_per_image(config: PreTrainedConfig, select_feature: str, image_size: int | None = None) -> int:
    """Features of one image under a vision tower's configuration, known before any weight is read.

    Args:
        image_size: side of the picture in pixels; None takes the configuration's.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"--mm_vision_select_feature {select_feature}: unknown; known: {', '.join(SELECT_FEATURES)}.")
    if select_feature == "cls_patch" and not KINDS[config.model_type].class_token:
        raise ValueError(
            f"--mm_vision_select_feature cls_patch: a vision tower of type {config.model_type} has no class token, its "
            f"features are the patches alone. Leave the flag out."
        )
    image_size = image_size or config.image_size
    if not has_layers(config) and image_size % config.patch_size:
        raise ValueError(
            f"The image size {image_size} is no multiple of {config.patch_size}, the stride of {config.architecture}."
        )
    return (image_size // config.patch_size) ** 2 + (leading_tokens(config) if select_feature == "cls_patch" else 0)


def published_name(config: PreTrainedConfig, name: str) -> str:
    """The name that a weight has in published files, which transformers 4 and 5 read alike."""
    kind = KINDS[config.model_type]
    for here, there in kind.renamed:
        name = name.replace(here, there)
    return kind.level + name.removeprefix(kind.level)
