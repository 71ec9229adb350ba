"""Read vision towers from disk or hub: configuration, image processor and weights.

A tower may be a model of its own, or a part of a contrastive, LLaVA or FastVLM model.
"""

import os
import re
from collections.abc import Iterable

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, CLIPImageProcessorPil, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ..errors import UserError
from ..hub import find_file, foreign_code_refused, read_json
from ..model.vision_tower import KINDS, VisionTower, has_layers, published_name, takes_any_size
from ..options.fastvlm import FASTVITHD, apple_name, check_timm, complete_timm, fastvithd_config
from .layouts import LLAVA_NAMES, TRANSFORMERS_NAMES
from .weights import Stored, assign_parts, open_weights

# Keys of LLaVA-NeXT's image processor that CLIP's does not have.
OF_LLAVA_NEXT = {"image_processor_type", "image_grid_pinpoints", "do_pad"}

# Keys that are equal in two configurations of the same tower.
SHAPE_OF_A_TOWER = (
    *("model_type", "architecture", "hidden_size", "intermediate_size", "mlp_ratio"),
    *("num_hidden_layers", "num_attention_heads", "num_register_tokens"),
    *("patch_size", "hidden_act", "layer_norm_eps"),
)


def load_vision_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return a vision tower's configuration, or that of the vision part of a contrastive, LLaVA or FastVLM model.

    Raises:
        UserError: it is none of `KINDS`, or it needs timm, which cannot be imported.
        OSError: there is no such tower, or the hub cannot be reached.
    """
    if FASTVITHD.fullmatch(path):
        return fastvithd_config()
    written = read_json(path, "config.json")
    if not written:
        raise FileNotFoundError(f"{path} has no config.json, so it is not a vision tower (--vision_tower).")
    if tower := written.get("mm_vision_tower"):  # the layout of LLaVA's own code
        return load_vision_config(tower, trust_remote_code)
    if "architecture" in (written.get("vision_config") or written):  # timm's key
        check_timm()
    with foreign_code_refused(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = getattr(config, "vision_config", config)
    if config.model_type not in KINDS:
        naflex = " SigLIP 2 models with a fixed resolution are supported, NaFlex ones are not."
        raise UserError(
            f"{path}: the model type of its vision tower is {config.model_type}. Known are {', '.join(KINDS)}."
            + (naflex if config.model_type == "siglip2_vision_model" else "")
        )
    return complete_timm(config) if config.model_type == "timm_wrapper" else config


def load_vision_tower(
    path: str,
    select_layer: int,
    select_feature: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> VisionTower:
    """Read a tower, of its own or in a contrastive model, from a directory or hub name.

    Raises UserError for missing weights, which transformers would initialize with a warning.
    """
    config = load_vision_config(path, trust_remote_code)
    with foreign_code_refused(path):
        model, loading = MODEL_MAPPING[type(config)].from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"--vision_tower {path} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more weight{'s' * (len(missing) != 2)}" if len(missing) > 1 else "")
            + f": it holds no whole {type(model).__name__}."
        )
    return VisionTower(model, select_layer, select_feature, image_size)


def tower_image_processor(path: str) -> BaseImageProcessor:
    """Return the image processor of a tower or model, folder or hub name. Raises OSError or UserError without one."""
    apple = FASTVITHD.fullmatch(path)
    written = {} if apple else read_json(path, "config.json")
    if named := written.get("mm_vision_tower"):
        return tower_image_processor(named)
    if not apple and ("pretrained_cfg" not in written or find_file(path, "preprocessor_config.json")):
        processor = load_image_processor(path)
        if not isinstance(processor, LlavaNextImageProcessorPil):
            return processor
        settings = processor.to_dict()
        return CLIPImageProcessorPil(**{key: settings[key] for key in settings.keys() - OF_LLAVA_NEXT})
    # timm's settings are in config.json, and apple's in the tower's name: mean 0 and std 1.
    settings = written.get("pretrained_cfg") or {}
    size = int(apple[1]) if apple else settings["input_size"][-1]
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=tuple(settings.get("mean", (0.0, 0.0, 0.0))),
        image_std=tuple(settings.get("std", (1.0, 1.0, 1.0))),
    )


def tower_image_size(path: str, vision_config: PreTrainedConfig) -> int:
    """Return the side of the square input image, pixels: the image processor's if the tower takes any size."""
    if not takes_any_size(vision_config):
        return vision_config.image_size
    return output_size(tower_image_processor(path))


def tower_inside(path: str, vision_config: PreTrainedConfig) -> dict[str, dict[str, Stored]]:
    """Return the tower's weights from a LLaVA model or from timm's files; empty if transformers reads `path` itself."""
    if FASTVITHD.fullmatch(path):
        raise UserError(
            f"--vision_tower {path} is only a name: its weights are inside apple's FastVLM checkpoints. Give the "
            f"folder or hub name of one, or of a FastVLM model in transformers' layout."
        )
    config = read_json(path, "config.json")
    if config.get("mm_vision_tower"):
        parts = assign_parts(open_weights(path, config), LLAVA_NAMES, path)
        if "vision_tower" in parts or FASTVITHD.fullmatch(config["mm_vision_tower"]):
            return {"vision_tower": parts.get("vision_tower", {})}
        return tower_inside(config["mm_vision_tower"], vision_config)
    if config.get("model_type") in ("llava", "llava_next", "fast_vlm"):
        return {"vision_tower": assign_parts(open_weights(path, config), TRANSFORMERS_NAMES, path)["vision_tower"]}
    if vision_config.model_type == "timm_wrapper":
        weights = open_weights(path, {"model_type": vision_config.model_type, **config})
        names = {key: "timm_model." + key.removeprefix("timm_model.") for key in weights if not key.startswith("head.")}
        return {"vision_tower": {name: weights[key] for key, name in names.items()}}
    return {}


def check_same_tower(name: str, vision_config: PreTrainedConfig, tower: str) -> bool:
    """Return whether the tower inside a model has been resized; raise UserError if `tower` is another one."""
    other = load_vision_config(tower)
    for key in SHAPE_OF_A_TOWER:
        theirs, ours = getattr(other, key, None), getattr(vision_config, key, None)
        if ours != theirs:
            raise UserError(
                f"--vision_tower {tower} contradicts {name}: its {key} is {theirs}, that of the tower inside the model "
                f"is {ours}. Leave the flag out."
            )
    return has_layers(other) and other.image_size != vision_config.image_size


def as_in_memory(
    found: dict[str, Stored], expected: Iterable[str], vision_config: PreTrainedConfig
) -> dict[str, Stored]:
    """Return a tower's tensors by the names of this version of transformers; files have published or Apple's names."""
    if any(name.startswith("model.patch_embed.") for name in found):
        names = {apple_name(name): name for name in expected}
        return {names.get(name, name): stored for name, stored in found.items()}

    def plain(name: str) -> str:
        return published_name(vision_config, name).removeprefix("vision_model.")

    names = {plain(name): name for name in expected}
    return {names.get(plain(name), name): stored for name, stored in found.items()}


def load_image_processor(path: str | os.PathLike) -> BaseImageProcessor:
    """Return the image processor of a vision tower, folder or hub name, in its PIL version.

    Chosen by the class name in the settings, CLIP's old feature extractor included: AutoImageProcessor would take the
    torchvision version where it is installed, whose pixels differ slightly, and in some versions demands it. Code from
    the folder is never run. Raises UserError if there is no PIL version.
    """
    settings, _ = BaseImageProcessor.get_image_processor_dict(path)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "none"
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    processor_class = getattr(transformers, f"{family}ImageProcessorPil", None)
    if processor_class is None:
        raise UserError(
            f"The image processor of {path} is {name!r}, of which transformers {transformers.__version__} has no PIL "
            f"version; CLIP's and SigLIP's have one."
        )
    return processor_class.from_pretrained(path)


def of_size(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """Return the same processor for square pictures of another size, pixels."""
    settings = processor.to_dict()
    settings.pop("image_processor_type", None)
    for name in ("size", "crop_size"):
        if settings.get(name):
            settings[name] = {key: size for key, value in dict(settings[name]).items() if value is not None}
    return type(processor)(**settings)


def output_size(processor: BaseImageProcessor) -> int:
    """Return the side of the square pictures that the processor makes, pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    return dict(size)["height"]
