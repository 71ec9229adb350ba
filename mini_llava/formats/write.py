"""Every directory layout that is written: stage 1's projector, transformers' whole model, LLaVA's whole model.

Replaces LLaVA's `safe_save_model_for_hf_trainer` and the saving half of `train.py`, whose results need LLaVA's own code
to be read. Here the default is what transformers and the servers built on it load as it stands. Weights stream from the
partitioned model to the disk one shard at a time; `config.json` comes last, so that no partial result looks whole.
"""

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ..data.templates import IMAGE_MARK, Template
from ..files import staged
from ..hub import find_file
from ..model.llava import LlavaModel
from ..model.projector import PROJECTOR_FILE, is_main_process, save_projector
from ..model.vision_tower import VisionTower, published_name
from ..options.chat_template import chat_template
from ..options.tiles import NEWLINE_KEY, Tiling
from .layouts import MODEL_FILES
from .tokenizers import SENTENCEPIECE_FILE, image_token_tokenizer, slow_llama_config
from .weights import SHARD_BYTES, whole_shape, write_json, write_weights

# Embeddings in a multiple of 64 rows, as llava-hf publishes them: matrix products over the vocabulary are faster so.
ROWS_MULTIPLE = 64

# Read only when sampling. Vicuna sets the first two without `do_sample`, and transformers then refuses to save them.
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What transformers adds to every configuration, and where the weights lay on somebody's disk.
CONFIG_NOISE = (
    *("_name_or_path", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("return_dict", "output_hidden_states", "output_attentions"),
)


@dataclass
class Description:
    """What a result's files say of it, beside what its model knows.

    Attributes:
        projector_type, vision_tower_name, image_aspect_ratio, model_max_length: the values of the flags; LLaVA's
            layout names the tower, transformers' needs no name.
        version, template: the conversation template trained with, and its name. Without it no chat template is saved:
            the language model's own would not be what the model was trained on.
        tokenizer, image_processor: those trained with; copied, not changed. A projector has no need of them, an adapter
            of the tokenizer alone.
        export_format: of a whole model, `transformers` or `llava`.
        include_vision_tower: whether LLaVA's layout gets the tower's weights, as it must where they were trained;
            otherwise LLaVA fetches them by the tower's name. Transformers' always has them.
        dtype: of a whole model's weights and in its configuration. Projectors and adapters are written as trained.
    """

    projector_type: str
    vision_tower_name: str | None
    image_aspect_ratio: str
    model_max_length: int
    version: str | None = None
    template: Template | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    image_processor: BaseImageProcessor | None = None
    export_format: str = "transformers"
    include_vision_tower: bool = False
    dtype: torch.dtype | None = None


def save_projector_only(directory: str | Path, model: LlavaModel, described: Description) -> None:
    """Write stage 1's result, as LLaVA does: `mm_projector.bin`, and the `config.json` that says what it belongs to.

    Every rank calls it, the main process writes.
    """
    directory = Path(directory)
    if is_main_process():
        begin_directory(directory)
    rows = {"model.embed_tokens.weight": model.new_tokens.weight} if model.new_tokens is not None else {}
    save_projector(model.projector, directory / PROJECTOR_FILE, beside=_newline(model) | rows)
    if is_main_process():
        config = llava_config(model, described)
        base = {"_name_or_path": model.base} if model.base else {}  # as LLaVA's own have it
        write_json(directory, "config.json", {**config, **base, "tune_mm_mlp_adapter": True})


def check_may_be_written(
    directory: str | Path, model_flags=None, export_format: str = "transformers", vision_config=None
) -> None:
    """Raise ValueError if saving here would overwrite a model that is not LLaVA's, such as the language model itself.

    The saving functions call it. With the run's flags, before the first step, it spares a long run other bad ends:
    writing over what the run starts from, and a layout in which this model has no place.
    """
    if model_flags is not None:
        base = model_flags.model_name_or_path
        if Path(base).is_dir() and Path(base).resolve() == Path(directory).resolve():
            raise ValueError(
                f"The result would be written over {base}, which it is made from. Choose another directory."
            )
        if export_format == "llava" and vision_config is not None and vision_config.model_type == "timm_wrapper":
            raise ValueError(
                "--export_format llava: apple's code has FastVLM's tower under names of its own. Leave the flag out: "
                "transformers' FastVlmForConditionalGeneration is what is written then."
            )
        if export_format == "llava" and not model_flags.vision_tower:
            raise ValueError(
                f"--export_format llava: that layout names the vision tower, and {base} does not say which it is. Give "
                f"it as --vision_tower; it is compared with the one inside."
            )
    config = Path(directory) / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type", "unknown")
        if not model_type.startswith(("llava", "fast_vlm")):
            raise ValueError(
                f"{directory} holds a model of type {model_type}, which saving would overwrite. Choose another "
                f"--output_dir."
            )


def why_not_transformers(
    projector_type: str,
    language_model: nn.Module,
    vision_tower: VisionTower | None = None,
    tiling: Tiling | None = None,
) -> str | None:
    """None if `LlavaForConditionalGeneration` computes what the trained model does, otherwise the reason why not.

    That class, and those for FastVLM and for images in tiles alike, has exactly two linear layers with a GELU between
    them, calls the language model without its head and puts a bare `lm_head` of its own on top.
    """
    if projector_type != "mlp2x_gelu":
        return f"transformers' LLaVA knows the projector mlp2x_gelu only, not {projector_type}."
    if tiling and not tiling.has_newline:
        return f"transformers' LLaVA-NeXT lays out tiles as spatial_unpad only, not {tiling.merge_type}."
    if tiling and vision_tower is not None and vision_tower.model.config.image_size != tiling.tile_size:
        return (
            f"transformers' LLaVA-NeXT takes tiles of the {vision_tower.model.config.image_size} pixels in the vision "
            f"tower's config.json, trained were tiles of {tiling.tile_size}."
        )
    if vision_tower is not None and vision_tower.select_feature == "patch" and vision_tower.leading_tokens > 1:
        return (
            f"transformers' LLaVA drops the first of the tower's {vision_tower.leading_tokens} tokens in front of the "
            f"patches and takes the registers for patches; with --mm_vision_select_feature cls_patch it keeps all, too."
        )
    config = language_model.config
    if not type(language_model).__module__.startswith("transformers."):
        return f"transformers' LLaVA would not run the code that came with {type(language_model).__name__}."
    # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them: all of it after lm_head, inside the class.
    for setting, neutral in (("logits_scaling", 1.0), ("logit_scale", 1.0), ("final_logit_softcapping", None)):
        if getattr(config, setting, neutral) not in (neutral, None):
            return f"transformers' LLaVA would ignore the language model's {setting} {getattr(config, setting)}."
    foreign = [
        name for name in language_model.state_dict() if not name.startswith("model.") and name != "lm_head.weight"
    ]
    if foreign:
        return f"transformers' LLaVA has no place for the language model's {foreign[0]}."
    return None


def save_transformers(
    directory: str | Path, model: LlavaModel, described: Description, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole model as `LlavaForConditionalGeneration` with its processor, for transformers 4 and 5 alike.

    With FastVLM's tower it is `FastVlmForConditionalGeneration`, which is LLaVA's but for how it takes the features; a
    model whose images come in tiles is `LlavaNextForConditionalGeneration`.

    `<image>` becomes a token. Where the embeddings have no row for it they grow, to a multiple of 64, by rows that hold
    the mean of the old ones: as inputs they give way to image features, and as outputs the mean never beats the best.

    Args:
        model: bare, without DDP or engine; every rank calls this, the main process writes.
        described: `image_aspect_ratio` "pad" is added to the copy of the image processor; `generate` stops at those
            of the template's ends that are tokens, and at the end token.
        shard_bytes: size of one weight file, and of what the main process holds in memory.

    Raises:
        ValueError: the layout cannot express this model, or the directory holds another kind of model.
    """
    tower, dtype, template = model.vision_tower, described.dtype, described.template
    if reason := why_not_transformers(described.projector_type, model.language_model, tower, model.tiling):
        raise ValueError(f"{reason} Save it in LLaVA's layout.")
    directory = Path(directory)
    jinja = chat_template(template) if template else None
    tokenizer = _with_image_token(described.tokenizer, jinja)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)

    embeddings = model.language_model.get_input_embeddings().weight
    old_rows = whole_shape(embeddings)[0]
    rows = old_rows if image_token_id < old_rows else math.ceil((image_token_id + 1) / ROWS_MULTIPLE) * ROWS_MULTIPLE

    fast_vlm = tower.model.config.model_type == "timm_wrapper"
    inside = "model." if fast_vlm else ""  # FastVLM came after transformers 4, whose names LLaVA's files keep

    def language_name(name: str) -> str:
        if not fast_vlm:
            return "language_model." + name
        return name if name.startswith("lm_head.") else "model.language_model." + name.removeprefix("model.")

    weights = [
        (f"{inside}vision_tower.{published_name(tower.model.config, name)}", tensor)
        for name, tensor in tower.model.state_dict(keep_vars=True).items()
    ]
    layers = {"0": "linear_1", "2": "linear_2"}
    for name, tensor in model.projector.state_dict(keep_vars=True).items():
        number, part = name.split(".")
        weights.append((f"{inside}multi_modal_projector.{layers[number]}.{part}", tensor))
    weights += [(name.removeprefix("model."), tensor) for name, tensor in _newline(model).items()]
    language_weights, tied = _language_weights(model.language_model)
    weights += [(language_name(name), tensor) for name, tensor in language_weights]
    resized = {language_name(name): rows for name in ("model.embed_tokens.weight", "lm_head.weight")}

    if is_main_process():
        begin_directory(directory)
    write_weights(directory, weights, dtype, shard_bytes, resized)
    save_projector(model.projector, directory / PROJECTOR_FILE, dtype, _newline(model))
    if not is_main_process():
        return

    # "default" takes off one token, the class token.
    strategy = "default" if tower.leading_tokens and tower.select_feature == "patch" else "full"
    processor = (LlavaNextProcessor if model.tiling else LlavaProcessor)(
        image_processor=_as_llavas(described.image_processor, described.image_aspect_ratio, model.tiling),
        tokenizer=tokenizer,
        patch_size=tower.model.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tower.leading_tokens,
        image_token=IMAGE_MARK,
        chat_template=jinja,
    )
    with staged(directory) as staging:
        processor.save_pretrained(staging)
        _make_readable_for_transformers_4(staging, processor.image_processor)
        # Not read with tokenizer.json beside it; LLaVA's layout, exported from here, takes it.
        if tokenizer.name_or_path and (file := find_file(tokenizer.name_or_path, SENTENCEPIECE_FILE)):
            shutil.copyfile(file, staging / SENTENCEPIECE_FILE)
    stop = template.stop if template else ()
    generation = generation_settings(model.language_model.generation_config, tokenizer, stop)
    write_json(directory, "generation_config.json", generation)

    text_config = copy.deepcopy(model.language_model.config)
    text_config.vocab_size, text_config.tie_word_embeddings = rows, tied
    model_type, architecture = _of_transformers(model)
    tiles = {"image_grid_pinpoints": _height_first(model.tiling)} if model.tiling else {}
    config = CONFIG_MAPPING[model_type](
        text_config=text_config,
        vision_config=copy.deepcopy(tower.model.config),
        image_token_index=image_token_id,
        image_seq_length=tower.tokens_per_image,
        vision_feature_layer=tower.select_layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=tied,
        architectures=[architecture],
        **tiles,
    ).to_dict()
    # Not transformers' own keys: they tell this program how the model was trained.
    config |= {
        "conversation_version": described.version,
        "mm_use_im_start_end": model.use_im_start_end,
        "mm_use_im_patch_token": model.use_im_patch_token,
    }
    config = _portable(config, dtype)
    config["text_config"] = _portable(config["text_config"], dtype)
    config["vision_config"] = _portable(config["vision_config"], dtype)
    write_json(directory, "config.json", config)


def save_whole_model(directory: str | Path, model: LlavaModel, described: Description) -> str:
    """Write the whole model in the layout asked for; return a line about it.

    LLaVA's layout takes the place of transformers' where that cannot express the model. Every rank calls it, the main
    process writes.
    """
    reason = why_not_transformers(described.projector_type, model.language_model, model.vision_tower, model.tiling)
    if reason is None and described.export_format == "transformers":
        save_transformers(directory, model, described)
        return f"The model is in {directory}; transformers' {_of_transformers(model)[1]}.from_pretrained reads it."
    save_llava(directory, model, described)
    because = f": {reason}" if described.export_format == "transformers" else "."
    return f"The model is in {directory}, in the layout of LLaVA's own code{because}"


def save_llava(
    directory: str | Path, model: LlavaModel, described: Description, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole model in the layout of LLaVA's own code (`liuhaotian/llava-v1.5-*`), for every projector.

    Every rank calls it, the main process writes.
    """
    directory, dtype = Path(directory), described.dtype
    weights, tied = _language_weights(model.language_model)
    for name, tensor in model.projector.state_dict(keep_vars=True).items():
        weights.append((f"model.mm_projector.{name}", tensor))
    weights += _newline(model).items()
    if described.include_vision_tower:
        for name, tensor in model.vision_tower.model.state_dict(keep_vars=True).items():
            name = published_name(model.vision_tower.model.config, name)
            weights.append((f"model.vision_tower.vision_tower.{name}", tensor))

    if is_main_process():
        begin_directory(directory)
    write_weights(directory, weights, dtype, shard_bytes)
    save_projector(model.projector, directory / PROJECTOR_FILE, dtype, _newline(model))
    if not is_main_process():
        return
    with staged(directory) as staging:
        _save_tokenizer_for_llava(staging, described.tokenizer)
    generation = generation_settings(model.language_model.generation_config, described.tokenizer)
    write_json(directory, "generation_config.json", generation)
    config = _portable({**llava_config(model, described), "tie_word_embeddings": tied}, dtype)
    # LLaVA's loader ignores tower weights in the files unless this is set (its issues 902 and 1694).
    config["unfreeze_mm_vision_tower"] = described.include_vision_tower
    write_json(directory, "config.json", config)


def generation_settings(generation_config: GenerationConfig, tokenizer, stop: tuple[str, ...] = ()) -> dict:
    """The content of `generation_config.json`: the language model's own, made consistent.

    Sampling values without `do_sample` are dropped (they made LLaVA's last save fail after the whole training, its
    issue 1144), and the ids of begin, end and padding are the tokenizer's.
    """
    settings = {key: value for key, value in generation_config.to_dict().items() if value is not None}
    settings.pop("_from_model_config", None)
    if not settings.get("do_sample"):
        for name in SAMPLING_SETTINGS:
            settings.pop(name, None)
    ends = settings.get("eos_token_id", [])
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    ends += [tokenizer.added_tokens_encoder[mark] for mark in stop if mark in tokenizer.added_tokens_encoder]
    ends = list(dict.fromkeys(ends))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [None])[0]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": padding,
    }
    return settings | {name: value for name, value in ids.items() if value is not None}


# ---------------------------------------------------------------------------------------------------- configurations


def llava_config(model: LlavaModel, described: Description) -> dict:
    """Return the language model's configuration with the keys that LLaVA's `initialize_vision_modules` and `train` add.

    `conversation_version` is ours: LLaVA's files do not say which template a model was trained with.
    """
    config = model.language_model.config.to_dict()
    family = config["model_type"]
    config |= {
        "model_type": f"llava_{family}",
        "architectures": [f"Llava{family.capitalize()}ForCausalLM"],
        "use_mm_proj": True,
        "mm_vision_tower": described.vision_tower_name,
        "mm_projector_type": described.projector_type,
        "mm_hidden_size": model.vision_tower.hidden_size,
        "mm_vision_select_layer": model.vision_tower.select_layer,
        "mm_vision_select_feature": model.vision_tower.select_feature,
        "mm_patch_merge_type": model.tiling.merge_type if model.tiling else "flat",
        "mm_use_im_start_end": model.use_im_start_end,
        "mm_use_im_patch_token": model.use_im_patch_token,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": described.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": described.model_max_length,
        "conversation_version": described.version,
    }
    if model.vision_tower.is_resized:  # ours: LLaVA's code takes the size that the tower's name stands for
        config["mm_image_size"] = model.vision_tower.image_size
    if model.tiling:
        config["image_grid_pinpoints"] = [list(pair) for pair in model.tiling.pinpoints]
    return _portable(config, next(model.language_model.parameters()).dtype)


def _portable(config: dict, dtype: torch.dtype) -> dict:
    """A configuration without noise, that transformers 4 and 5 read alike.

    5 keeps RoPE's base inside `rope_parameters`; 4 looks for `rope_theta`, and without it silently takes 10,000 (Llama
    3 has 500,000). 4 calls the dtype `torch_dtype`. The cache, which training switches off, is on again.
    """
    config = {key: value for key, value in config.items() if key not in CONFIG_NOISE}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if "use_cache" in config:
        config["use_cache"] = True
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return config


# ------------------------------------------------------------------------------------------- tokenizer and processor


def _with_image_token(tokenizer, chat_template: str | None):
    tokenizer = copy.deepcopy(image_token_tokenizer(tokenizer))
    tokenizer.chat_template = chat_template
    # Batches are padded on the right in training, and on the left to generate.
    tokenizer.padding_side = "left"
    return tokenizer


def _as_llavas(image_processor, image_aspect_ratio: str, tiling: Tiling | None):
    """The tower's processor with LLaVA's tiles, or its padding to a square on the mean colour, as trained.

    CLIP's own has no such options; LLaVA's are the same code with them. The PIL variants are pinned because those of
    torchvision resize differently, and a run would depend on what is installed.
    """
    settings = image_processor.to_dict()
    settings.pop("image_processor_type", None)
    # What the tower's leaves out, LLaVA's would do: SigLIP's crops nothing.
    settings = {"do_center_crop": False, **settings, "do_pad": True}
    if tiling:
        of_tile = {
            "size": {"shortest_edge": tiling.tile_size},
            "crop_size": {"height": tiling.tile_size, "width": tiling.tile_size},
            "image_grid_pinpoints": _height_first(tiling),
        }
        return LlavaNextImageProcessorPil(**settings | of_tile)
    return LlavaImageProcessorPil(**settings) if image_aspect_ratio == "pad" else image_processor


def _height_first(tiling: Tiling) -> list[list[int]]:
    """The pinpoints as transformers has them; in LLaVA's own configuration the width comes first."""
    return [[height, width] for width, height in tiling.pinpoints]


def _of_transformers(model: nn.Module) -> tuple[str, str]:
    """transformers' model type and class for a model."""
    if model.vision_tower.model.config.model_type == "timm_wrapper":
        return "fast_vlm", "FastVlmForConditionalGeneration"
    if model.tiling:
        return "llava_next", "LlavaNextForConditionalGeneration"
    return "llava", "LlavaForConditionalGeneration"


def _save_tokenizer_for_llava(staging: Path, tokenizer) -> None:
    """The tokenizer as LLaVA's loader reads it, which takes the slow class: a Llama one as its `tokenizer.model`.

    Other tokenizers, and Llama's where the source had no such file, are written as they are, by names that
    transformers 4 knows.
    """
    model_file = find_file(tokenizer.name_or_path, SENTENCEPIECE_FILE) if tokenizer.name_or_path else None
    config = slow_llama_config(tokenizer) if model_file else None
    if config is None:
        tokenizer.save_pretrained(staging)
        _make_tokenizer_readable_for_transformers_4(staging)
        return
    shutil.copyfile(model_file, staging / SENTENCEPIECE_FILE)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (staging / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if isinstance(tokenizer.chat_template, str):  # which the model may have been trained with
        (staging / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _make_readable_for_transformers_4(staging: Path, image_processor) -> None:
    """Adjust what `LlavaProcessor.save_pretrained` of transformers 5 wrote, so that transformers 4 reads it too."""
    # 4 would otherwise add token_type_ids, which the model does not take.
    _make_tokenizer_readable_for_transformers_4(staging, model_input_names=["input_ids", "attention_mask"])

    # transformers 5 keeps the image processor inside processor_config.json.
    settings = json.loads(image_processor.to_json_string())
    settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil")
    path = staging / "preprocessor_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _make_tokenizer_readable_for_transformers_4(staging: Path, **settings) -> None:
    """Adjust the tokenizer's files that transformers 5 wrote; `settings` go into `tokenizer_config.json`."""
    path = staging / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend", "name_or_path"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # What 5 writes as a list under this name, 4 reads under the other; a table is read by both.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    text = json.dumps(config | settings, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")

    # Before tokenizers 0.20 a merge was one text, which is read to this day, unless one of the two holds a blank.
    path = staging / "tokenizer.json"
    pipeline = json.loads(path.read_text(encoding="utf-8"))
    merges = pipeline["model"].get("merges", [])
    if not any(" " in half for pair in merges for half in pair):
        pipeline["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(pipeline, indent=2, ensure_ascii=False), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- weights and files


def _language_weights(language_model: nn.Module) -> tuple[list[tuple[str, torch.Tensor]], bool]:
    """Names and tensors as the language model has them, without an `lm_head` that is the embedding; whether it is."""
    embeddings = language_model.get_input_embeddings().weight
    head = language_model.get_output_embeddings().weight
    weights = language_model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in weights.items() if head is not embeddings or name != "lm_head.weight"], (
        head is embeddings
    )


def _newline(model: nn.Module) -> dict[str, torch.Tensor]:
    """The newline by the name that LLaVA gives it, if the model has one."""
    return {f"model.{NEWLINE_KEY}": model.image_newline.weight} if model.image_newline is not None else {}


def begin_directory(directory: Path) -> None:
    """Remove an older model's config first, so that the rest is not taken for whole, then its other files."""
    check_may_be_written(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in MODEL_FILES:
        for file in directory.glob(pattern):
            if file.is_file():
                file.unlink()
