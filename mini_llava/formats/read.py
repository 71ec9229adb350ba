"""Every layout that a run can start from, told apart by what is in it and never by its name.

Replaces LLaVA's `load_pretrained_model`, which decides by words in the folder's name and loads with `strict=False`. A
plain language model gets a vision tower and a new projector; a LLaVA model, in the layout of LLaVA's own code or in
transformers', brings its own. All names and shapes are compared before a weight is read. Weights stay mapped to their
files until they are copied: under ZeRO-3 rank 0 reads them, one after the other, and the other ranks none.
"""

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ..data.images import load_image_processor, of_size, output_size
from ..data.tokenization import find_file, foreign_code_refused, read_json
from ..model.attention import CAPPED
from ..model.projector import PROJECTOR_FILE, build_projector
from ..model.vision_tower import (
    FASTVITHD,
    VisionTower,
    apple_name,
    empty_model,
    has_layers,
    leading_tokens,
    load_vision_config,
    load_vision_tower,
    published_name,
    resize,
    takes_any_size,
    tokens_per_image,
)
from ..options.image_newline import ImageNewline
from ..options.tiles import MERGE_TYPES, Tiling, choose_tiling

# Looked for in this order; the first two are the ones that cannot hold code.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Buffers that older versions saved, today's compute them; and the head of apple's tower, behind the features.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|vision_tower\.model\.head\.proj)$")

# Where each part of the model is in the files: (how its names begin there, the part, how they begin here). The first
# that fits counts. CLIP's names come with and without `vision_model.`, as transformers 4 and 5 have them.
LLAVA_NAMES = (
    ("model.image_newline", "image_newline", "weight"),
    ("model.mm_projector.", "projector", ""),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower", ""),
    ("model.vision_tower.vision_tower.", "vision_tower", ""),
    ("", "language_model", ""),
)
TRANSFORMERS_NAMES = (
    # As transformers 4 writes them, and 5 too unless told otherwise
    ("image_newline", "image_newline", "weight"),
    ("multi_modal_projector.linear_1.", "projector", "0."),
    ("multi_modal_projector.linear_2.", "projector", "2."),
    ("vision_tower.vision_model.", "vision_tower", ""),
    ("vision_tower.", "vision_tower", ""),
    ("language_model.", "language_model", ""),
    # As transformers 5 has them in memory
    ("model.image_newline", "image_newline", "weight"),
    ("model.multi_modal_projector.linear_1.", "projector", "0."),
    ("model.multi_modal_projector.linear_2.", "projector", "2."),
    ("model.vision_tower.vision_model.", "vision_tower", ""),
    ("model.vision_tower.", "vision_tower", ""),
    ("model.language_model.", "language_model", "model."),
    ("lm_head.", "language_model", "lm_head."),
)

# Keys of LLaVA's configuration that are none of the language model's.
OF_LLAVA = re.compile(r"(^|_)mm_|^image_|^tokenizer_|^(model_type|architectures|vision_tower|conversation_version)$")
# Ours is written llava_qwen2, others' is llava_qwen; LLaVA-1.5's published "llava" is told by its architecture.
FAMILIES = {"qwen": "qwen2"}

# Transformers' layout does not name the tower; LLaVA's has to, and takes it by width, layers, patch, image, activation.
# The weights are written too then, so that the name stands for the architecture and the image processor only.
KNOWN_TOWERS = {
    (1024, 24, 14, 336, "quick_gelu"): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224, "quick_gelu"): "openai/clip-vit-large-patch14",
    (1152, 27, 14, 384, "gelu_pytorch_tanh"): "google/siglip-so400m-patch14-384",
}
# What its configuration has besides CLIP's.
OF_LLAVA_NEXT = {"image_processor_type", "image_grid_pinpoints", "do_pad"}
OPTIONAL_PARTS = ("vision_tower", "image_newline")
IMAGE_TOKEN_FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token")
# What two configurations of the same tower share.
SHAPE_OF_A_TOWER = (
    *("model_type", "architecture", "hidden_size", "intermediate_size", "mlp_ratio"),
    *("num_hidden_layers", "num_attention_heads", "num_register_tokens"),
    *("patch_size", "hidden_act", "layer_norm_eps"),
)


class Stored(NamedTuple):
    """A tensor mapped to its file, and where that is."""

    tensor: torch.Tensor
    file: Path
    key: str


@dataclass
class Source:
    """What a run starts from, with all names and shapes checked.

    Attributes:
        name: directory or hub name, as given.
        layout: "language_model", "llava" or "transformers".
        config: of `config.json`, as it stands.
        vision_tower: where the tower and its image processor are to be found under a name of their own, or None.
        stored: part -> name in that part -> tensor, for the parts whose weights come from here; empty for a plain
            language model, which transformers reads by itself.
        trust_remote_code: whether code that the models bring is run; if not, ValueError where it would be needed.
        merge_type, pinpoints: of images in tiles, as in LLaVA-1.6's configuration; a merge type None: images are whole.
        resized_to: side of the pictures that the tower is made to take, pixels; None: those it was trained with.
    """

    name: str
    layout: str
    config: dict
    language_config: PreTrainedConfig
    vision_config: PreTrainedConfig
    vision_tower: str | None
    projector_type: str
    select_layer: int
    select_feature: str
    stored: dict[str, dict[str, Stored]]
    trust_remote_code: bool = False
    merge_type: str | None = None
    pinpoints: list | str | None = None
    resized_to: int | None = None

    def describe(self, pretrained_projector: str | None = None) -> str:
        """What a person should know before the run; `pretrained_projector` is the value of the flag of that name."""
        if self.layout == "language_model":
            return f"{self.name} is a language model ({self.language_config.model_type})."
        whose = "LLaVA's own code" if self.layout == "llava" else "transformers"
        tower = "with its weights" if "vision_tower" in self.stored else f"to be read from {self.vision_tower}"
        return (
            f"{self.name} is a LLaVA model in the layout of {whose}: language model {self.language_config.model_type}, "
            f"projector {self.projector_type}, vision tower {tower}, its layer {self.select_layer}, "
            f"{self.select_feature}."
            + (f" Images come in tiles ({self.merge_type})." if self.merge_type else "")
            + (f" Its projector gives way to the one in {pretrained_projector}." if pretrained_projector else "")
        )

    def image_processor(self) -> BaseImageProcessor:
        """The tower's image processor, which pads nothing: the trainer pads by `--image_aspect_ratio`."""
        where = self.name if self.layout == "transformers" else self.vision_tower
        processor = tower_image_processor(where)
        if getattr(processor, "do_pad", None):
            processor.do_pad = False
        return of_size(processor, self.resized_to) if self.resized_to else processor

    def image_size(self) -> int:
        """Side of the square picture that the tower takes, pixels."""
        if self.resized_to:
            return self.resized_to
        where = self.name if self.layout == "transformers" else self.vision_tower
        return tower_image_size(where, self.vision_config)

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles of the tower's size; None: they are whole."""
        if self.merge_type is None:
            return None
        size = self.image_size()
        tokens = tokens_per_image(self.vision_config, self.select_feature, size)
        return choose_tiling(size, tokens, self.merge_type, self.pinpoints)

    def in_tiles(self, model_flags, data_flags, explicit: Iterable[str]) -> "Source":
        """Return this with the tiles of a run, from its flags and from a LLaVA model that has some.

        Raises:
            ValueError: the flags contradict each other or the model.
        """
        merge_type, aspect_ratio = model_flags.mm_patch_merge_type, data_flags.image_aspect_ratio
        if self.merge_type:
            for flag, given, fixed in (
                ("image_aspect_ratio", aspect_ratio, "anyres"),
                ("mm_patch_merge_type", merge_type, self.merge_type),
            ):
                if flag in explicit and given != fixed:
                    raise ValueError(
                        f"--{flag} {given} contradicts {self.name}, which was trained with {fixed}. Leave the flag out."
                    )
        elif aspect_ratio == "anyres" and not has_layers(self.vision_config):
            raise ValueError(
                f"--image_aspect_ratio anyres: no layout has a place for a model with the vision tower "
                f"{self.vision_config.architecture} and images in tiles. Use pad, at the tower's full resolution."
            )
        chosen = self.merge_type or ((merge_type or "spatial_unpad") if aspect_ratio == "anyres" else None)
        pinpoints = data_flags.image_grid_pinpoints or self.pinpoints
        source = dataclasses.replace(self, merge_type=chosen, pinpoints=pinpoints)
        tiling = source.tiling
        for flag, given in (("mm_patch_merge_type", merge_type), ("image_grid_pinpoints", pinpoints)):
            if not tiling and given not in (None, "flat"):
                raise ValueError(f"--{flag} {given} does nothing without --image_aspect_ratio anyres.")
        return source

    def fixed_flags(self) -> dict:
        """Return flag name to value, for what a run that starts from this has to have."""
        tiling = self.tiling
        fixed = {
            "vision_tower": self.vision_tower,
            "mm_projector_type": self.projector_type,
            "mm_vision_select_layer": self.select_layer,
            "mm_vision_select_feature": self.select_feature,
            "mm_patch_merge_type": self.merge_type or "flat",
            "image_grid_pinpoints": str([list(pair) for pair in tiling.pinpoints]) if tiling else None,
        }
        if tiling:
            fixed["image_aspect_ratio"] = "anyres"
        if self.layout != "language_model":
            fixed |= {key: bool(self.config.get(key)) for key in IMAGE_TOKEN_FLAGS}
        return fixed

    def image_aspect_ratio(self) -> str:
        """What the images were trained with: `pad`, `square` or `anyres`."""
        if self.merge_type:
            return "anyres"
        if self.layout == "llava":
            return self.config.get("image_aspect_ratio", "square")
        return "pad" if getattr(load_image_processor(self.name), "do_pad", None) else "square"

    def model_max_length(self, tokenizer) -> int:
        """The longest sequence, image tokens included; where nothing says it, what the language model was made for."""
        longest = self.config.get("tokenizer_model_max_length") or tokenizer.model_max_length
        return min(longest, self.language_config.max_position_embeddings)

    def load_projector(self) -> nn.Module:
        """The projector with its weights, or with new ones from torch's generator, in fp32 or as stored."""
        projector = build_projector(self.projector_type, self.vision_config.hidden_size, _width(self.language_config))
        if "projector" in self.stored:
            projector.load_state_dict({name: stored.tensor for name, stored in self.stored["projector"].items()})
        return projector

    def load_newline(self) -> ImageNewline | None:
        """The newline with its weights, or with new ones; None where images are whole or their rows have no end."""
        if self.tiling is None or not self.tiling.has_newline:
            return None
        newline = ImageNewline(_width(self.language_config))
        if "image_newline" in self.stored:
            newline.load_state_dict({name: stored.tensor for name, stored in self.stored["image_newline"].items()})
        return newline

    def load_language_model(self, dtype: torch.dtype, attn_implementation: str | None, **options) -> nn.Module:
        """The language model; `options` go to `from_pretrained`. Under ZeRO-3 it is partitioned while it is read.

        Args:
            attn_implementation: None takes what transformers has for it, and eager if it caps scores.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape.
        """
        if attn_implementation is None and self.language_config.model_type in CAPPED:
            attn_implementation = "eager"  # some versions of transformers take sdpa, and leave the cap out unsaid
        options |= {"dtype": dtype, "attn_implementation": attn_implementation}
        if self.layout == "language_model":
            with foreign_code_refused(self.name):
                model = _load_strictly(self.name, trust_remote_code=self.trust_remote_code, **options)
        else:
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.language_config)].from_pretrained(
                None,
                config=self.language_config,
                state_dict=_of_this_rank(self.stored["language_model"]),
                generation_config=self.generation_config(),
                **options,
            )
        restore_rotary_frequencies(model)
        return model

    def load_vision_tower(self, dtype: torch.dtype) -> VisionTower:
        if "vision_tower" not in self.stored:
            selected = self.select_layer, self.select_feature
            return self.as_tower(load_vision_tower(self.vision_tower, *selected, dtype, self.trust_remote_code).model)
        # Every rank has the values: some versions of transformers do not send buffers to the others under ZeRO-3.
        tensors = {name: stored.tensor for name, stored in self.stored["vision_tower"].items()}
        model_class = MODEL_MAPPING[type(self.vision_config)]
        model = model_class.from_pretrained(None, config=self.vision_config, state_dict=tensors, dtype=dtype)
        return self.as_tower(model)

    def as_tower(self, model: nn.Module) -> VisionTower:
        """The tower around transformers' model, of the size that is wanted."""
        if self.resized_to:
            resize(model, self.resized_to)
        tower = VisionTower(model, self.select_layer, self.select_feature, self.image_size())
        tower.is_resized = self.resized_to is not None
        return tower

    def generation_config(self) -> GenerationConfig:
        if find_file(self.name, "generation_config.json"):
            return GenerationConfig.from_pretrained(self.name)
        return GenerationConfig.from_model_config(self.language_config)


def open_source(model_flags, explicit: Iterable[str] = (), data_flags=None) -> Source:
    """Find out what `--model_name_or_path` is, and check it.

    What a LLaVA model fixes (tower, projector type, layer, feature, image tokens, tiles) `Arguments.fixed_by` takes.

    Args:
        model_flags: the fields of `ModelArguments`.
        explicit: names of the flags that were given and are not defaults. One that contradicts the model is an error.
        data_flags: the fields of `DataArguments`, which say whether images come in tiles; None: as the model says.

    Raises:
        ValueError: a flag contradicts the model, or tensors are missing, unexpected or of another shape.
        OSError: there is no such directory or hub name.
    """
    name = model_flags.model_name_or_path
    config = read_json(name, "config.json")
    if not config:
        raise FileNotFoundError(f"{name} has no config.json, so it is no model. {_what_else(name)}")
    layout = layout_of(name, config)
    if layout == "language_model":
        if not model_flags.vision_tower:
            raise ValueError(f"--vision_tower is missing: {name} is a language model and has none of its own.")
        trusted = model_flags.trust_remote_code
        language_config = read_language_config(name, trusted)
        vision_config = load_vision_config(model_flags.vision_tower, trusted)
        has_output_only = not has_layers(vision_config) and "mm_vision_select_layer" not in explicit
        source = Source(
            name,
            layout,
            config,
            language_config,
            vision_config,
            model_flags.vision_tower,
            model_flags.mm_projector_type,
            -1 if has_output_only else model_flags.mm_vision_select_layer,
            model_flags.mm_vision_select_feature,
            stored=_tower_inside(model_flags.vision_tower, vision_config),
            trust_remote_code=trusted,
        )
    else:
        source = (_read_llava if layout == "llava" else _read_transformers)(name, config, model_flags, set(explicit))
        _check_against_flags(source, model_flags, set(explicit))
    _check_weights(source)
    _resize(source, model_flags.image_size)
    return source if data_flags is None else source.in_tiles(model_flags, data_flags, explicit)


def map_parts(source: Source) -> tuple[VisionTower, nn.Module, nn.Module, ImageNewline | None]:
    """Tower, projector, language model and newline of a LLaVA model, whose weights stay in their files.

    For writing another layout with hardly any memory: a tensor is read when it is written.

    Raises:
        ValueError: the source is a plain language model.
    """
    if source.layout == "language_model":
        raise ValueError(f"{source.name} is a language model ({source.language_config.model_type}), no LLaVA model.")
    empty = empty_parts(source)
    for part, tensors in source.stored.items():
        # strict=False: of tied weights one is stored; everything else has been compared.
        empty[part].load_state_dict({name: stored.tensor for name, stored in tensors.items()}, False, assign=True)
    language_model = empty["language_model"]
    language_model.tie_weights()
    language_model.generation_config = source.generation_config()
    if "vision_tower" in source.stored:
        tower = source.as_tower(empty["vision_tower"])
    else:
        tower = source.load_vision_tower(next(iter(source.stored["language_model"].values())).tensor.dtype)
    return tower, empty["projector"], language_model, empty.get("image_newline")


# ------------------------------------------------------------------------------------------------------- the layouts


def layout_of(name: str, config: dict) -> str:
    """The layout that `config.json` speaks of."""
    model_type, architectures = config.get("model_type", ""), config.get("architectures") or []
    if "text_config" in config and "vision_config" in config:
        if model_type not in ("llava", "llava_next", "fast_vlm"):
            raise ValueError(
                f"{name} is a model of type {model_type} ({', '.join(architectures)}). Of those with a vision tower "
                f"inside only LLaVA's are known here (LlavaForConditionalGeneration, type llava, and "
                f"LlavaNextForConditionalGeneration, type llava_next), and FastVLM's (type fast_vlm)."
            )
        return "transformers"
    return "llava" if model_type.startswith("llava") or "mm_vision_tower" in config else "language_model"


def _read_llava(name: str, config: dict, model_flags, explicit: set[str]) -> Source:
    stored = _assign_parts(_open_weights(name, config), LLAVA_NAMES, name)
    tower = config.get("mm_vision_tower") or config.get("vision_tower")
    given = model_flags.vision_tower if "vision_tower" in explicit else None
    if given and _is_same_or_gone(given, tower):
        tower = given
    if not tower:
        raise ValueError(f"{name}: its config.json names no mm_vision_tower. Give it as --vision_tower.")
    if _is_gone(tower) and not FASTVITHD.fullmatch(tower):
        raise ValueError(
            f"{name}: its config.json names the vision tower {tower}, which is not there. Give its place as "
            f"--vision_tower."
        )
    vision_config, resized_to = load_vision_config(tower, model_flags.trust_remote_code), config.get("mm_image_size")
    if "vision_tower" not in stored:
        stored |= _tower_inside(tower, vision_config)
    elif resized_to and has_layers(vision_config):
        vision_config.image_size = resized_to
    return Source(
        name,
        "llava",
        config,
        _language_config(name, config),
        vision_config,
        tower,
        config.get("mm_projector_type", "linear"),
        config.get("mm_vision_select_layer", -2) if has_layers(vision_config) else -1,
        config.get("mm_vision_select_feature", "patch"),
        stored,
        model_flags.trust_remote_code,
        *tiles_in(name, config),
        resized_to,
    )


def tiles_in(name: str, config: dict) -> tuple[str | None, list | str | None]:
    """Merge type and pinpoints of a LLaVA configuration; None, None where images are whole. Raises ValueError."""
    aspect_ratio, merge_type = str(config.get("image_aspect_ratio")), config.get("mm_patch_merge_type", "flat")
    if aspect_ratio == "anyres" and merge_type in MERGE_TYPES:
        return merge_type, config.get("image_grid_pinpoints")
    if aspect_ratio.startswith("anyres") or merge_type != "flat":
        raise ValueError(
            f"{name}: its config.json has image_aspect_ratio {aspect_ratio} with mm_patch_merge_type {merge_type}; "
            f"known are anyres with {', '.join(MERGE_TYPES)}, and others with flat."
        )
    return None, None


def read_language_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Return the configuration of a language model, or of that inside a LLaVA model; None without a config.json."""
    config = read_json(name, "config.json")
    if not config:
        return None
    layout = layout_of(name, config)
    if layout == "llava":
        return _language_config(name, config)
    with foreign_code_refused(name):
        whole = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code and layout == "language_model")
    return whole.text_config if layout == "transformers" else whole


def _language_config(name: str, config: dict) -> PreTrainedConfig:
    """The language model's configuration out of LLaVA's, which is the same with further keys."""
    family = config["model_type"].removeprefix("llava").removeprefix("_")
    if not family:
        architecture = re.fullmatch(r"Llava(\w+)ForCausalLM", (config.get("architectures") or [""])[0])
        family = architecture[1].lower() if architecture else ""
    family = FAMILIES.get(family, family)
    try:
        return AutoConfig.for_model(family, **{key: config[key] for key in config if not OF_LLAVA.search(key)})
    except ValueError:
        raise ValueError(
            f"{name}: its config.json has model_type {config['model_type']!r} and architectures "
            f"{config.get('architectures')}, which name no language model that transformers knows."
        ) from None


def _read_transformers(name: str, config: dict, model_flags, explicit: set[str]) -> Source:
    vision_config = load_vision_config(name)
    whole = AutoConfig.from_pretrained(name, trust_remote_code=False)
    strategies, tiled = _strategies(vision_config), config["model_type"] == "llava_next"
    for key, value, known in (
        ("projector_hidden_act", whole.projector_hidden_act, ("gelu",)),
        ("multimodal_projector_bias", getattr(whole, "multimodal_projector_bias", True), (True,)),
        ("vision_feature_select_strategy", whole.vision_feature_select_strategy, strategies),
    ):
        if value not in known:
            raise ValueError(f"{name}: its config.json has {key} {value!r}; known here: {', '.join(map(str, known))}.")
    if not isinstance(whole.vision_feature_layer, int):
        raise ValueError(
            f"{name}: its config.json has vision_feature_layer {whole.vision_feature_layer}; the features of several "
            f"layers at once are not supported."
        )
    language_config = whole.text_config
    language_config.tie_word_embeddings = whole.tie_word_embeddings  # transformers goes by the outer one
    tower = model_flags.vision_tower if "vision_tower" in explicit else None
    resized = _check_same_tower(name, vision_config, tower) if tower else False
    keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "hidden_act")
    return Source(
        name,
        "transformers",
        config,
        language_config,
        vision_config,
        tower or KNOWN_TOWERS.get(tuple(getattr(vision_config, key, None) for key in keys)),
        "mlp2x_gelu",
        whole.vision_feature_layer,
        strategies[whole.vision_feature_select_strategy],
        _assign_parts(_open_weights(name, config), TRANSFORMERS_NAMES, name),
        merge_type="spatial_unpad" if tiled else None,
        # Height comes first there, width in LLaVA's own.
        pinpoints=[(width, height) for height, width in whole.image_grid_pinpoints] if tiled else None,
        resized_to=vision_config.image_size if resized else None,
    )


def _strategies(vision_config: PreTrainedConfig) -> dict[str, str]:
    """transformers' `vision_feature_select_strategy`: all of a hidden state, or all but its first token."""
    leading = leading_tokens(vision_config)
    return {"full": "cls_patch" if leading else "patch"} | ({"default": "patch"} if leading == 1 else {})


# ------------------------------------------------------------------------------------------------- the tower


def tower_image_processor(path: str) -> BaseImageProcessor:
    """The image processor of a tower or model, folder or hub name.

    Raises:
        OSError, ValueError: there is none, or none that could be used.
    """
    apple = FASTVITHD.fullmatch(path)
    written = {} if apple else read_json(path, "config.json")
    if named := written.get("mm_vision_tower"):
        return tower_image_processor(named)
    of_its_own = "pretrained_cfg" not in written or find_file(path, "preprocessor_config.json")
    if not apple and of_its_own:
        processor = load_image_processor(path)
        if not isinstance(processor, LlavaNextImageProcessorPil):
            return processor
        settings = processor.to_dict()  # CLIP's, and tiles
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
    """Side of the square picture: the configuration's, or for a tower that takes any size the image processor's."""
    if not takes_any_size(vision_config):
        return vision_config.image_size
    return output_size(tower_image_processor(path))


def _tower_inside(path: str, vision_config: PreTrainedConfig) -> dict[str, dict[str, Stored]]:
    """The tower's weights out of a whole model that is given as the tower, and out of timm's files; else nothing.

    Empty means that transformers reads the weights from `path` by itself.
    """
    if FASTVITHD.fullmatch(path):
        raise ValueError(
            f"--vision_tower {path} is only a name: its weights are inside apple's FastVLM checkpoints. Give the "
            f"folder or hub name of one, or of a FastVLM model in transformers' layout."
        )
    config = read_json(path, "config.json")
    if config.get("mm_vision_tower"):
        parts = _assign_parts(_open_weights(path, config), LLAVA_NAMES, path)
        if "vision_tower" in parts or FASTVITHD.fullmatch(config["mm_vision_tower"]):
            return {"vision_tower": parts.get("vision_tower", {})}
        return _tower_inside(config["mm_vision_tower"], vision_config)
    if config.get("model_type") in ("llava", "llava_next", "fast_vlm"):
        return {"vision_tower": _assign_parts(_open_weights(path, config), TRANSFORMERS_NAMES, path)["vision_tower"]}
    if vision_config.model_type == "timm_wrapper":
        weights = _open_weights(path, {"model_type": vision_config.model_type, **config})
        names = {key: "timm_model." + key.removeprefix("timm_model.") for key in weights if not key.startswith("head.")}
        return {"vision_tower": {name: weights[key] for key, name in names.items()}}
    return {}


# ------------------------------------------------------------------------------------------------- flags and the model


def _check_against_flags(source: Source, model_flags, explicit: set[str]) -> None:
    for flag, fixed in (
        ("mm_projector_type", source.projector_type),
        ("mm_vision_select_layer", source.select_layer),
        ("mm_vision_select_feature", source.select_feature),
        ("vision_tower", source.vision_tower),
        *((key, bool(source.config.get(key))) for key in IMAGE_TOKEN_FLAGS),
    ):
        given = getattr(model_flags, flag)
        same = given == fixed
        if flag == "mm_vision_select_layer":
            same = same_layer(given, fixed, source.vision_config)
        if flag in explicit and not same:
            raise ValueError(
                f"--{flag} {given} contradicts {source.name}, whose config.json says {fixed}. Leave the flag out: a "
                f"LLaVA model is trained on as it is."
            )


def same_layer(one: int, other: int, vision_config: PreTrainedConfig) -> bool:
    """Return whether two values of `--mm_vision_select_layer` are one hidden state: of 25, -2 and 23 are."""
    layers = vision_config.num_hidden_layers + 1 if has_layers(vision_config) else math.inf
    return one == other or (one - other) % layers == 0


def _is_same_or_gone(given: str, named: str | None) -> bool:
    """Whether the tower given may stand for the one the checkpoint names: a copy elsewhere, or that one is gone."""
    return not named or Path(given).name == Path(named).name or _is_gone(named)


def _is_gone(tower: str) -> bool:
    """Whether this is a path, not a hub name (`owner/name`), and leads nowhere."""
    return not Path(tower).exists() and (tower.startswith((".", "/", "~")) or tower.count("/") != 1)


def _resize(source: Source, image_size: int | None) -> None:
    """Notes the value of `--image_size`, for when the tower is loaded."""
    if image_size is None:
        return
    stride = source.vision_config.patch_size
    if image_size % stride:
        raise ValueError(f"--image_size {image_size} is no multiple of {stride}, the vision tower's patch size.")
    source.resized_to = image_size


def _check_same_tower(name: str, vision_config: PreTrainedConfig, tower: str) -> bool:
    """Raises ValueError for another tower than the one inside; returns whether that has been resized since."""
    other = load_vision_config(tower)
    for key in SHAPE_OF_A_TOWER:
        theirs, ours = getattr(other, key, None), getattr(vision_config, key, None)
        if ours != theirs:
            raise ValueError(
                f"--vision_tower {tower} contradicts {name}: its {key} is {theirs}, that of the tower inside the model "
                f"is {ours}. Leave the flag out."
            )
    return has_layers(other) and other.image_size != vision_config.image_size


# ------------------------------------------------------------------------------------------------- weights and files


def _what_else(name: str) -> str:
    """A sentence about a directory that holds something else than a model."""
    if find_file(name, "adapter_config.json"):
        return (
            f"It holds adapters of a language model: python -m mini_llava.tools.export {name} OUT --merge makes a "
            f"whole model of both, which can be started from; --lora_weight_path goes on from the adapters themselves."
        )
    if (manifest := Path(name) / "manifest.json").is_file():
        trained = json.loads(manifest.read_text(encoding="utf-8")).get("parameters", [])
        if any(parameter.startswith(("language_model.", "vision_tower.")) for parameter in trained):
            return (
                f"It is a training state. --resume_from_checkpoint {name} goes on with its run; to start a new one "
                f"from what it has learned, python -m mini_llava.tools.export {name} OUT makes a model of it: give OUT "
                f"instead. Started from its base, all that was trained would be lost."
            )
    if find_file(name, PROJECTOR_FILE):
        return (
            f"It holds a projector ({PROJECTOR_FILE}) and no language model, as stage 1 leaves it: give the language "
            f"model as --model_name_or_path, and this as --pretrain_mm_mlp_adapter."
        )
    return f"Expected one of {', '.join(WEIGHT_FILES)}."


def _open_weights(name: str, config: dict) -> dict[str, Stored]:
    """All tensors of a directory or hub name by the names in its files, mapped and not read."""
    found = next(((kind, file) for kind in WEIGHT_FILES if (file := find_file(name, kind))), None)
    if found is None:
        raise FileNotFoundError(f"{name} is of type {config['model_type']}, but has no weights. {_what_else(name)}")
    kind, first = found
    stored: dict[str, Stored] = {}
    if not kind.endswith(".index.json"):
        return _map_file(Path(first))
    weight_map = json.loads(Path(first).read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(weight_map.values())):
        file = find_file(name, shard)
        if file is None:
            raise FileNotFoundError(f"{first} names {shard}, which is not beside it: the model is not whole.")
        stored |= _map_file(Path(file))
    if absent := sorted(weight_map.keys() - stored.keys()):
        raise ValueError(f"{first} names {list_some(absent)}, in {weight_map[absent[0]]}, but that is not in the file.")
    return stored


def _map_file(file: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors or .bin file; of a .bin, a pickle, anything but tensors is refused unrun."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        else:
            with open(file, "rb") as opened:
                is_zip = opened.read(4) == b"PK\x03\x04"  # files of before torch 1.6 are not, and cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds something other than tensors, which could run code when read. It was not "
            f"loaded; take the model's safetensors files."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a whole file of weights ({error}). Fetch or write it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} does not hold a table of tensors by name.")
    return {key: Stored(tensor, file, key) for key, tensor in tensors.items()}


def _assign_parts(weights: dict[str, Stored], names: tuple, source: str) -> dict[str, dict[str, Stored]]:
    """The tensors of each part under the names they have there."""
    parts: dict[str, dict[str, Stored]] = {part: {} for part in ("language_model", "projector", *OPTIONAL_PARTS)}
    for key, stored in weights.items():
        if COMPUTED.search(key):
            continue
        rule = next((rule for rule in names if key.startswith(rule[0])), None)
        if rule is None:
            raise ValueError(f"{stored.file} holds {key}, which is no part of a LLaVA model that {source} would be.")
        there, part, here = rule
        name = here + key.removeprefix(there)
        if name in parts[part]:
            raise ValueError(f"{source} holds the {part}'s {name} twice, as {parts[part][name].key} and as {key}.")
        parts[part][name] = stored
    return {part: tensors for part, tensors in parts.items() if tensors or part not in OPTIONAL_PARTS}


def empty_parts(source: Source) -> dict[str, nn.Module]:
    """All parts without memory for their weights."""
    newline = ("image_newline",) * bool(source.tiling and source.tiling.has_newline)
    return {part: _empty_part(source, part) for part in ("language_model", "projector", "vision_tower", *newline)}


def _empty_part(source: Source, part: str) -> nn.Module:
    if part == "vision_tower":
        return empty_model(source.vision_config)
    with torch.device("meta"):
        if part == "image_newline":
            return ImageNewline(_width(source.language_config))
        if part == "projector":
            widths = source.vision_config.hidden_size, _width(source.language_config)
            return build_projector(source.projector_type, *widths)
        return empty_language_model(source.language_config)


def empty_language_model(language_config: PreTrainedConfig) -> nn.Module | None:
    """Return the language model without memory for its weights; None if its class came as code with the model."""
    if type(language_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):  # its class and not AutoModel, which would partition it under ZeRO-3
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(language_config)](copy.deepcopy(language_config))


def _check_weights(source: Source) -> None:
    """Raises ValueError, naming file, tensor and both shapes, unless each part has all of its tensors and no other."""
    newline = source.stored.get("image_newline")
    if newline and source.merge_type != "spatial_unpad":
        raise ValueError(
            f"{newline['weight'].file} also holds {newline['weight'].key}, but by config.json its images do not come "
            f"in tiles with a newline (image_aspect_ratio anyres, mm_patch_merge_type spatial_unpad)."
        )
    if not newline and source.merge_type == "spatial_unpad":
        raise ValueError(f"{source.name} lacks image_newline, which spatial_unpad needs. The model is not whole.")
    for part in source.stored:  # not a tower that is read from a place of its own, nor a plain language model
        module = _empty_part(source, part)
        expected = module.state_dict(keep_vars=True)
        if part == "vision_tower":
            source.stored[part] = _as_in_memory(source.stored[part], expected, source.vision_config)
        found = source.stored[part]
        kinds = {"projector": source.projector_type, "image_newline": source.merge_type}
        kind = kinds.get(part) or module.config.model_type
        what = f"the {part.replace('_', ' ')} ({kind})"
        stored_twice = _tied_names(expected)
        if missing := sorted(expected.keys() - found.keys() - stored_twice):
            raise ValueError(f"{source.name} lacks {list_some(missing)}, which {what} has. The model is not whole.")
        if extra := sorted(found.keys() - expected.keys()):
            keys = [found[name].key for name in extra]
            raise ValueError(f"{found[extra[0]].file} also holds {list_some(keys)}, which {what} does not have.")
        for name, stored in found.items():
            if stored.tensor.shape != expected[name].shape:
                raise ValueError(
                    f"{stored.file}: {stored.key} is {list(stored.tensor.shape)}, but by config.json {what} needs "
                    f"{list(expected[name].shape)}."
                )
            if not stored.tensor.is_floating_point() and expected[name].is_floating_point():
                raise ValueError(
                    f"{stored.file}: {stored.key} has dtype {stored.tensor.dtype}, which is no floating-point weight. "
                    f"Take a model that is not quantised."
                )


def _as_in_memory(
    found: dict[str, Stored], expected: Iterable[str], vision_config: PreTrainedConfig
) -> dict[str, Stored]:
    """A tower's tensors under the names of this version of transformers: files have published ones, or apple's."""
    if any(name.startswith("model.patch_embed.") for name in found):
        names = {apple_name(name): name for name in expected}
        return {names.get(name, name): stored for name, stored in found.items()}

    def plain(name: str) -> str:
        return published_name(vision_config, name).removeprefix("vision_model.")

    names = {plain(name): name for name in expected}
    return {names.get(plain(name), name): stored for name, stored in found.items()}


def _tied_names(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are another one before them."""
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name for name, tensor in tensors.items() if first[id(tensor)] != name}


def _of_this_rank(tensors: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """What this rank gives to `from_pretrained`: under ZeRO-3 only rank 0 reads values, the others know the shapes."""
    reads = not is_deepspeed_zero3_enabled() or torch.distributed.get_rank() == 0
    return {name: stored.tensor if reads else stored.tensor.to("meta") for name, stored in tensors.items()}


def _load_strictly(name: str, **options) -> nn.Module:
    """transformers only warns of missing tensors, and makes them up."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise ValueError(f"{name}: the weights do not fit its config.json. {error}") from error
    for kind, sentence in (("missing_keys", "lacks"), ("unexpected_keys", "also holds")):
        if keys := sorted(loading[kind]):
            raise ValueError(f"{name} {sentence} {list_some(keys)}: not the tensors of a {type(model).__name__}.")
    return model


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Computes the frequencies of rotary embeddings again, in place, where they are not fp32.

    Read under ZeRO-3, transformers 5.17 leaves them in bf16, whose rounding turns position 1,000 by up to two radians.
    """
    for module in model.modules():
        rounded = [name for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        rounded = [name for name in rounded if getattr(module, name).dtype != torch.float32]
        if rounded:
            exact = type(module)(model.config)
            for name in rounded:
                setattr(module, name, getattr(exact, name).to(getattr(module, name).device))


def _width(config: PreTrainedConfig) -> int:
    return config.get_text_config().hidden_size


def list_some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
