"""Every layout that a run can start from, recognised by its content and never by its name.

Replaces LLaVA's `load_pretrained_model`, which decides by words in the folder's name and loads with `strict=False`. A
plain language model gets a vision tower and a new projector; a LLaVA model, in the layout of LLaVA's own code or in
transformers', brings its own. All names and shapes are compared before a weight is read. Weights stay mapped to their
files until they are copied: under ZeRO-3 rank 0 reads them, one after the other, and the other ranks none.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..data.images import normalisation_table
from ..errors import UserError
from ..guards.projector_file import check_projector_file
from ..hub import find_file, foreign_code_refused, read_json, short_bars_left_out
from ..model.llava import LlavaModel
from ..model.projector import build_projector, list_some, load_projector
from ..model.vision_tower import VisionTower, empty_model, has_layers, leading_tokens, tokens_per_image
from ..options.attention import CAPPED
from ..options.fastvlm import FASTVITHD
from ..options.image_size import resize
from ..options.tiles import NEWLINE_KEY, ImageNewline, Tiling, choose_tiling
from .layouts import (
    FAMILIES,
    IMAGE_TOKEN_FLAGS,
    KNOWN_TOWERS,
    LLAVA_NAMES,
    OF_LLAVA,
    TRANSFORMERS_NAMES,
    layout_of,
    tiles_in,
)
from .towers import (
    as_in_memory,
    check_same_tower,
    load_image_processor,
    load_vision_config,
    load_vision_tower,
    of_size,
    tower_image_processor,
    tower_image_size,
    tower_inside,
)
from .weights import Stored, assign_parts, open_weights, what_else


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
        trust_remote_code: whether code that the models bring is run; if not, UserError where it would be needed.
        merge_type, pinpoints: of images in tiles, as in LLaVA-1.6's configuration; a merge type None: images are whole.
        max_tiles: N of `anyres_max_N`, see `Tiling`.
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
    max_tiles: int | None = None
    resized_to: int | None = None

    def describe(self, pretrained_projector: str | None = None) -> str:
        """Return what a person should know before the run; `pretrained_projector` is the value of that flag."""
        if self.layout == "language_model":
            return f"{self.name} is a language model ({self.language_config.model_type})."
        whose = "LLaVA's own code" if self.layout == "llava" else "transformers"
        tower = "with its weights" if "vision_tower" in self.stored else f"to be read from {self.vision_tower}"
        return (
            f"{self.name} is a LLaVA model in the layout of {whose}: language model {self.language_config.model_type}, "
            f"projector {self.projector_type}, vision tower {tower}, its layer {self.select_layer}, "
            f"{self.select_feature}."
            + (f" Images come in tiles ({self.merge_type})." if self.merge_type else "")
            + (
                f" Features of images in more than {self.max_tiles} tiles are interpolated, and each of several images "
                f"in a record is shown whole (anyres_max_{self.max_tiles})."
                if self.max_tiles
                else ""
            )
            + (f" Its projector gives way to the one in {pretrained_projector}." if pretrained_projector else "")
        )

    def image_processor(self) -> BaseImageProcessor:
        """Return the tower's image processor, which pads nothing: the trainer pads by `--image_aspect_ratio`."""
        where = self.name if self.layout == "transformers" else self.vision_tower
        processor = tower_image_processor(where)
        if getattr(processor, "do_pad", None):
            processor.do_pad = False
        return of_size(processor, self.resized_to) if self.resized_to else processor

    def image_size(self) -> int:
        """Return the side of the square picture that the tower takes, pixels."""
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
        return choose_tiling(size, tokens, self.merge_type, self.pinpoints, self.max_tiles)

    def in_tiles(self, model_flags, data_flags, explicit: Iterable[str]) -> "Source":
        """Return this with the tiles of a run, from its flags and from a LLaVA model that has some.

        Raises:
            UserError: the flags contradict each other or the model.
        """
        merge_type, aspect_ratio = model_flags.mm_patch_merge_type, data_flags.image_aspect_ratio
        if self.merge_type:
            for flag, given, fixed in (
                ("image_aspect_ratio", aspect_ratio, "anyres"),
                ("mm_patch_merge_type", merge_type, self.merge_type),
            ):
                if flag in explicit and given != fixed:
                    raise UserError(
                        f"--{flag} {given} contradicts {self.name}, which was trained with {fixed}. Leave the flag out."
                    )
        elif aspect_ratio == "anyres" and not has_layers(self.vision_config):
            raise UserError(
                f"--image_aspect_ratio anyres: no layout has a place for a model with the vision tower "
                f"{self.vision_config.architecture} and images in tiles. Use pad, at the tower's full resolution."
            )
        chosen = self.merge_type or ((merge_type or "spatial_unpad") if aspect_ratio == "anyres" else None)
        pinpoints = data_flags.image_grid_pinpoints or self.pinpoints
        source = dataclasses.replace(self, merge_type=chosen, pinpoints=pinpoints)
        tiling = source.tiling
        for flag, given in (("mm_patch_merge_type", merge_type), ("image_grid_pinpoints", pinpoints)):
            if not tiling and given not in (None, "flat"):
                raise UserError(f"--{flag} {given} does nothing without --image_aspect_ratio anyres.")
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
        """Return what the images were trained with: `pad`, `square` or `anyres`."""
        if self.merge_type:
            return "anyres"
        if self.layout == "llava":
            return self.config.get("image_aspect_ratio", "square")
        return "pad" if getattr(load_image_processor(self.name), "do_pad", None) else "square"

    def model_max_length(self, tokenizer) -> int:
        """Return the longest sequence, image tokens included; where nothing says it, the language model's positions."""
        longest = self.config.get("tokenizer_model_max_length") or tokenizer.model_max_length
        return min(longest, self.language_config.max_position_embeddings)

    def load_projector(self) -> nn.Module:
        """Return the projector with its weights, or with new ones from torch's generator, in fp32 or as stored."""
        projector = build_projector(self.projector_type, self.vision_config.hidden_size, _width(self.language_config))
        if "projector" in self.stored:
            projector.load_state_dict({name: stored.tensor for name, stored in self.stored["projector"].items()})
        return projector

    def load_newline(self) -> ImageNewline | None:
        """Return the newline with its weights, or new ones; None where images are whole or their rows have no end."""
        if self.tiling is None or not self.tiling.has_newline:
            return None
        newline = ImageNewline(_width(self.language_config))
        if "image_newline" in self.stored:
            newline.load_state_dict({name: stored.tensor for name, stored in self.stored["image_newline"].items()})
        return newline

    @short_bars_left_out()
    def load_language_model(self, dtype: torch.dtype, attn_implementation: str | None, **options) -> nn.Module:
        """Load the language model; `options` go to `from_pretrained`. Under ZeRO-3 it is partitioned while it is read.

        Args:
            attn_implementation: None takes what transformers has for it, and eager if it caps scores.

        Raises:
            UserError: tensors are missing, unexpected or of another shape.
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

    @short_bars_left_out()
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
        """Return the tower around transformers' model, of the size that is wanted."""
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
        UserError: a flag contradicts the model, or tensors are missing, unexpected or of another shape.
        OSError: there is no such directory or hub name.
    """
    name = model_flags.model_name_or_path
    config = read_json(name, "config.json")
    if not config:
        raise FileNotFoundError(f"{name} has no config.json, so it is not a model. {what_else(name)}")
    layout = layout_of(name, config)
    if layout == "language_model":
        if not model_flags.vision_tower:
            raise UserError(f"--vision_tower is missing: {name} is a language model and has none of its own.")
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
            stored=tower_inside(model_flags.vision_tower, vision_config),
            trust_remote_code=trusted,
        )
    else:
        source = (_read_llava if layout == "llava" else _read_transformers)(name, config, model_flags, set(explicit))
        _check_against_flags(source, model_flags, set(explicit))
    _check_weights(source)
    _resize(source, model_flags.image_size)
    return source if data_flags is None else source.in_tiles(model_flags, data_flags, explicit)


def load_llava(
    source: Source,
    attn_implementation: str | None,
    dtypes: dict[str, torch.dtype],
    pretrained_projector: str | None = None,
    quantisation: dict | None = None,
    has_token_rows: bool = False,
) -> LlavaModel:
    """Return the model that a run starts from: a language model with tower and projector, or all of a LLaVA model.

    Args:
        source: what `open_source` found.
        attn_implementation: None takes what transformers has for this language model, eager if it caps scores.
        dtypes: of the parts `language_model`, `vision_tower` and `projector`. Under ZeRO-3 the first two are read in
            the DeepSpeed config's precision instead, because they are partitioned while they are read.
        pretrained_projector: file or directory to read the projector from, in place of the source's; where neither has
            one it gets new weights, from torch's generator.
        quantisation: further arguments for reading the language model, see `backend.quantisation`.
        has_token_rows: the projector's file holds the rows that `image_tokens.py` reads, too.
    """
    # The projector first: reading the models may or may not draw random numbers, which depends on the backend, and new
    # weights should depend on the seed alone.
    projector, newline = source.load_projector(), source.load_newline()
    if pretrained_projector:
        others = ("embed_tokens.weight",) * has_token_rows + (NEWLINE_KEY,) * (newline is not None)
        check_projector_file(projector, pretrained_projector, others)
        load_projector(projector, pretrained_projector, others)
        if newline is not None:
            newline.load_beside_projector(pretrained_projector)
    language_model = source.load_language_model(dtypes["language_model"], attn_implementation, **(quantisation or {}))
    tower = source.load_vision_tower(dtypes["vision_tower"])
    tower.pixel_table = normalisation_table(source.image_processor())
    newline, projector = newline and newline.to(dtypes["projector"]), projector.to(dtypes["projector"])
    parts = {"vision_tower": tower, "projector": projector, "language_model": language_model, "image_newline": newline}
    return assemble(source, parts)


def map_llava(source: Source) -> LlavaModel:
    """Return a LLaVA model whose weights stay in their files.

    For writing another layout with hardly any memory: a tensor is read when it is written.

    Raises:
        UserError: the source is a plain language model.
    """
    if source.layout == "language_model":
        raise UserError(f"{source.name} is a language model ({source.language_config.model_type}), not a LLaVA model.")
    parts = empty_parts(source)
    for part, tensors in source.stored.items():
        # strict=False: of tied weights one is stored; everything else has been compared.
        parts[part].load_state_dict({name: stored.tensor for name, stored in tensors.items()}, False, assign=True)
    language_model = parts["language_model"]
    language_model.tie_weights()
    language_model.generation_config = source.generation_config()
    if "vision_tower" in source.stored:
        tower = source.as_tower(parts["vision_tower"])
    else:
        tower = source.load_vision_tower(next(iter(source.stored["language_model"].values())).tensor.dtype)
    return assemble(source, parts | {"vision_tower": tower})


def assemble(source: Source, parts: dict[str, nn.Module | None]) -> LlavaModel:
    """Return the model made of a `VisionTower` and the other parts, by the names that `empty_parts` has."""
    newline = parts.get("image_newline")
    model = LlavaModel(parts["vision_tower"], parts["projector"], parts["language_model"], newline, source.tiling)
    model.base = source.name
    return model


# ------------------------------------------------------------------------------------------------------- the layouts


def _read_llava(name: str, config: dict, model_flags, explicit: set[str]) -> Source:
    stored = assign_parts(open_weights(name, config), LLAVA_NAMES, name)
    tower = config.get("mm_vision_tower") or config.get("vision_tower")
    given = model_flags.vision_tower if "vision_tower" in explicit else None
    if given and _is_same_or_gone(given, tower):
        tower = given
    if not tower:
        raise UserError(f"{name}: its config.json names no mm_vision_tower. Give it as --vision_tower.")
    if _is_gone(tower) and not FASTVITHD.fullmatch(tower):
        raise UserError(
            f"{name}: its config.json names the vision tower {tower}, which is not there. Give its place as "
            f"--vision_tower."
        )
    vision_config, resized_to = load_vision_config(tower, model_flags.trust_remote_code), config.get("mm_image_size")
    if "vision_tower" not in stored:
        stored |= tower_inside(tower, vision_config)
    else:
        if resized_to and has_layers(vision_config):
            vision_config.image_size = resized_to
        layers = {
            int(found[1]) for key in stored["vision_tower"] if (found := re.match(r"encoder\.layers\.(\d+)\.", key))
        }
        if vision_config.model_type == "siglip_vision_model" and len(layers) < vision_config.num_hidden_layers:
            # LLaVA-NeXT's code removes the last layer and the head, and takes the output of what is left.
            vision_config.num_hidden_layers, vision_config.vision_use_head = len(layers), False
            config = config | {"mm_vision_select_layer": -1}
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


def read_language_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Return the configuration of a language model, or of that inside a LLaVA model; None without a config.json."""
    config = read_json(name, "config.json")
    if not config:
        return None
    layout = layout_of(name, config)
    if layout == "llava":
        return _language_config(name, config)
    with foreign_code_refused(name):
        outer = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code and layout == "language_model")
    return _checked(name, outer.text_config if layout == "transformers" else outer)


def _checked(name: str, language_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration. Raise UserError if heads cannot share keys and values evenly: transformers reads it."""
    text_config = language_config.get_text_config()
    heads, shared = (getattr(text_config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    # A model's own code may have a list, a number for each layer.
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise UserError(
            f"{name}: its config.json has num_attention_heads {heads}, which is not a multiple of num_key_value_heads "
            f"{shared}."
        )
    return language_config


def _language_config(name: str, config: dict) -> PreTrainedConfig:
    """The language model's configuration out of LLaVA's, which is the same with further keys."""
    family = config["model_type"].removeprefix("llava").removeprefix("_")
    if not family:
        architecture = re.fullmatch(r"Llava(\w+)ForCausalLM", (config.get("architectures") or [""])[0])
        family = architecture[1].lower() if architecture else ""
    family = FAMILIES.get(family, family)
    if family not in CONFIG_MAPPING:
        raise UserError(
            f"{name}: its config.json has model_type {config['model_type']!r} and architectures "
            f"{config.get('architectures')}, which name no language model that transformers knows."
        )
    with foreign_code_refused(name):
        of_family = {key: config[key] for key in config if not OF_LLAVA.search(key)}
        return _checked(name, AutoConfig.for_model(family, **of_family))


def _read_transformers(name: str, config: dict, model_flags, explicit: set[str]) -> Source:
    vision_config = load_vision_config(name)
    with foreign_code_refused(name):
        outer = AutoConfig.from_pretrained(name, trust_remote_code=False)
    strategies, (merge_type, pinpoints, _) = _strategies(vision_config), tiles_in(name, outer.to_dict())
    for key, value, known in (
        ("projector_hidden_act", outer.projector_hidden_act, ("gelu",)),
        ("multimodal_projector_bias", getattr(outer, "multimodal_projector_bias", True), (True,)),
        ("vision_feature_select_strategy", outer.vision_feature_select_strategy, strategies),
    ):
        if value not in known:
            raise UserError(f"{name}: its config.json has {key} {value!r}; known here: {', '.join(map(str, known))}.")
    if not isinstance(outer.vision_feature_layer, int):
        raise UserError(
            f"{name}: its config.json has vision_feature_layer {outer.vision_feature_layer}; the features of several "
            f"layers at once are not supported."
        )
    language_config = _checked(name, outer.text_config)
    language_config.tie_word_embeddings = outer.tie_word_embeddings  # transformers goes by the outer one
    tower = model_flags.vision_tower if "vision_tower" in explicit else None
    resized = check_same_tower(name, vision_config, tower) if tower else False
    keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "hidden_act")
    return Source(
        name,
        "transformers",
        config,
        language_config,
        vision_config,
        tower or KNOWN_TOWERS.get(tuple(getattr(vision_config, key, None) for key in keys)),
        "mlp2x_gelu",
        outer.vision_feature_layer,
        strategies[outer.vision_feature_select_strategy],
        assign_parts(open_weights(name, config), TRANSFORMERS_NAMES, name),
        merge_type=merge_type,
        pinpoints=pinpoints,
        resized_to=vision_config.image_size if resized else None,
    )


def _strategies(vision_config: PreTrainedConfig) -> dict[str, str]:
    """transformers' `vision_feature_select_strategy`: all of a hidden state, or all but its first token."""
    leading = leading_tokens(vision_config)
    return {"full": "cls_patch" if leading else "patch"} | ({"default": "patch"} if leading == 1 else {})


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
            raise UserError(
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
    """Store `--image_size` for when the tower is loaded."""
    if image_size is None:
        return
    stride = source.vision_config.patch_size
    if image_size % stride:
        raise UserError(f"--image_size {image_size} is not a multiple of {stride}, the vision tower's patch size.")
    source.resized_to = image_size


# ------------------------------------------------------------------------------------------------- weights and files


def empty_parts(source: Source) -> dict[str, nn.Module]:
    """Return all parts without memory for their weights."""
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
    """Raise UserError, naming file, tensor and both shapes, unless each part has all of its tensors and no other."""
    newline = source.stored.get("image_newline")
    if newline and source.merge_type != "spatial_unpad":
        raise UserError(
            f"{newline['weight'].file} also holds {newline['weight'].key}, but by config.json its images do not come "
            f"in tiles with a newline (image_aspect_ratio anyres, mm_patch_merge_type spatial_unpad)."
        )
    if not newline and source.merge_type == "spatial_unpad":
        raise UserError(f"{source.name} lacks image_newline, which spatial_unpad needs. The model is not whole.")
    for part in source.stored:  # not a tower that is read from a place of its own, nor a plain language model
        module = _empty_part(source, part)
        expected = module.state_dict(keep_vars=True)
        if part == "vision_tower":
            source.stored[part] = as_in_memory(source.stored[part], expected, source.vision_config)
        found = source.stored[part]
        kinds = {"projector": source.projector_type, "image_newline": source.merge_type}
        kind = kinds.get(part) or module.config.model_type
        what = f"the {part.replace('_', ' ')} ({kind})"
        stored_twice = _tied_names(expected)
        if missing := sorted(expected.keys() - found.keys() - stored_twice):
            raise UserError(f"{source.name} lacks {list_some(missing)}, which {what} has. The model is not whole.")
        if extra := sorted(found.keys() - expected.keys()):
            keys = [found[name].key for name in extra]
            raise UserError(f"{found[extra[0]].file} also holds {list_some(keys)}, which {what} does not have.")
        for name, stored in found.items():
            if stored.tensor.shape != expected[name].shape:
                raise UserError(
                    f"{stored.file}: {stored.key} is {list(stored.tensor.shape)}, but by config.json {what} needs "
                    f"{list(expected[name].shape)}."
                )
            if not stored.tensor.is_floating_point() and expected[name].is_floating_point():
                raise UserError(
                    f"{stored.file}: {stored.key} has dtype {stored.tensor.dtype}, which is no floating-point weight. "
                    f"Take a model that is not quantised."
                )


def _tied_names(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of tensors that share storage with an earlier one (tied weights)."""
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
        raise UserError(f"{name}: the weights do not fit its config.json. {error}") from error
    for kind, sentence in (("missing_keys", "lacks"), ("unexpected_keys", "also holds")):
        if keys := sorted(loading[kind]):
            raise UserError(f"{name} {sentence} {list_some(keys)}: not the tensors of a {type(model).__name__}.")
    return model


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Compute the frequencies of rotary embeddings again, in place, where they are not fp32.

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
