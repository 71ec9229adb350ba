"""Write the results of a run: stage 1's projector, or the whole model in transformers' or LLaVA's layout.

Replaces LLaVA's `safe_save_model_for_hf_trainer` and the saving half of its `train.py`, whose results only LLaVA's own
code can read. Weights are gathered and written one shard at a time; `config.json` is written last, so that a partial
result is not taken for a model.
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
from ..errors import UserError
from ..files import staged
from ..hub import find_file
from ..model.llava import LlavaModel
from ..model.projector import PROJECTOR_FILE, is_main_process, save_projector
from ..model.vision_tower import published_name
from ..options.chat_template import chat_template
from ..options.tiles import NEWLINE_KEY, Tiling
from .layouts import MODEL_FILES
from .tokenizers import (
    BOS_IN_TEMPLATE,
    SENTENCEPIECE_FILE,
    image_token_tokenizer,
    leave_bos_to_the_template,
    slow_llama_config,
)
from .weights import SHARD_BYTES, whole_shape, write_json, write_weights

# Embeddings grow to a multiple of 64 rows, as llava-hf publishes them: matrix products are faster then.
ROWS_MULTIPLE = 64

# Read only when sampling. Vicuna sets the first two without `do_sample`, and transformers then refuses to save them.
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Keys that transformers adds to every configuration, and the path that the weights were read from.
CONFIG_NOISE = (
    *("_name_or_path", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("return_dict", "output_hidden_states", "output_attentions"),
)


@dataclass
class Description:
    """What the files of a result say that its model does not know.

    Attributes:
        projector_type, vision_tower_name, image_aspect_ratio, model_max_length: values of the flags; only LLaVA's
            layout names the tower.
        version, template: the conversation template trained with, and its name. Without it no chat template is saved:
            the language model's own is not what the model was trained on.
        tokenizer, image_processor: those trained with, copied before they are changed. A projector needs neither, an
            adapter the tokenizer alone.
        export_format: of a whole model, `transformers` or `llava`.
        include_vision_tower: whether LLaVA's layout has the tower's weights, as it must if they were trained; LLaVA's
            code gets them by the tower's name otherwise. Transformers' layout always has them.
        dtype: of a whole model. Projectors and adapters are written in the dtype that they are trained in.
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


def save_projector_only(directory: str | Path, model: LlavaModel, description: Description) -> None:
    """Write stage 1's result as LLaVA does: `mm_projector.bin`, and a `config.json` with the model it belongs to.

    A collective; the main process writes.
    """
    directory = Path(directory)
    if is_main_process():
        begin_directory(directory)
    rows = {"model.embed_tokens.weight": model.new_tokens.weight} if model.new_tokens is not None else {}
    save_projector(model.projector, directory / PROJECTOR_FILE, others=_newline(model) | rows)
    if is_main_process():
        config = llava_config(model, description)
        base = {"_name_or_path": model.base} if model.base else {}  # as LLaVA's own have it
        write_json(directory, "config.json", {**config, **base, "tune_mm_mlp_adapter": True})


def check_may_be_written(
    directory: str | Path, model_flags=None, export_format: str = "transformers", vision_config=None
) -> None:
    """Raise UserError if saving here would overwrite a model that is not LLaVA's, such as the language model itself.

    Given the run's flags, before the first step, also if the result would overwrite what the run starts from, or if the
    layout cannot hold this model.
    """
    if model_flags is not None:
        base = model_flags.model_name_or_path
        if Path(base).is_dir() and Path(base).resolve() == Path(directory).resolve():
            raise UserError(
                f"The result would be written over {base}, which it is made from. Choose another directory."
            )
        if export_format == "llava" and vision_config is not None and vision_config.model_type == "timm_wrapper":
            raise UserError(
                "--export_format llava: apple's code has FastVLM's tower under its own names. Leave the flag out: "
                "transformers' FastVlmForConditionalGeneration is what is written then."
            )
        if export_format == "llava" and not model_flags.vision_tower:
            raise UserError(
                f"--export_format llava: that layout names the vision tower, and {base} does not say which it is. Give "
                f"it as --vision_tower; it is compared with the one inside."
            )
    config = Path(directory) / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type", "unknown")
        if not model_type.startswith(("llava", "fast_vlm")):
            raise UserError(
                f"{directory} holds a model of type {model_type}, which saving would overwrite. Choose another "
                f"--output_dir."
            )


def why_not_transformers(projector_type: str, model: LlavaModel) -> str | None:
    """Return why `LlavaForConditionalGeneration` would not compute what the model does; None if it would.

    That class, and those for FastVLM and for tiles, has two linear layers with a GELU between them, calls the language
    model without its head and adds a plain `lm_head`.
    """
    language_model, tower, tiling = model.language_model, model.vision_tower, model.tiling
    if projector_type != "mlp2x_gelu":
        return f"transformers' LLaVA knows the projector mlp2x_gelu only, not {projector_type}."
    if tiling and not tiling.has_newline:
        return f"transformers' LLaVA-NeXT lays out tiles as spatial_unpad only, not {tiling.merge_type}."
    if tiling and (image_size := tower.model.config.image_size) != tiling.tile_size:
        return (
            f"transformers' LLaVA-NeXT takes tiles of the {image_size} pixels in the vision tower's config.json, "
            f"but it was trained on tiles of {tiling.tile_size}."
        )
    if tiling and tiling.max_tiles:
        return (
            f"transformers' LLaVA-NeXT does not interpolate features of images in more than {tiling.max_tiles} tiles, "
            f"and splits each of several images into tiles, against anyres_max_{tiling.max_tiles}."
        )
    if tower.select_feature == "patch" and tower.leading_tokens > 1:
        return (
            f"transformers' LLaVA drops the first of the tower's {tower.leading_tokens} tokens in front of the "
            f"patches and takes the registers for patches; with --mm_vision_select_feature cls_patch it keeps all, too."
        )
    config = language_model.config
    if not type(language_model).__module__.startswith("transformers."):
        return f"transformers' LLaVA would not run the code that came with {type(language_model).__name__}."
    # Granite divides its logits, Cohere multiplies them, Gemma 2 caps them: inside their classes, after lm_head.
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
    directory: str | Path, model: LlavaModel, description: Description, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole model as `LlavaForConditionalGeneration` with its processor, for transformers 4 and 5 alike.

    With FastVLM's tower the class is `FastVlmForConditionalGeneration`, with images in tiles
    `LlavaNextForConditionalGeneration`. `<image>` becomes a token. If the embeddings have no row for it they grow, to a
    multiple of 64, by rows with the mean of the old ones: as inputs these are replaced by image features, and as
    outputs the mean never has the highest logit.

    Args:
        model: without DDP or engine. A collective; the main process writes.
        description: with `image_aspect_ratio` "pad" the image processor pads; `generate` stops at the end token and at
            those of the template's end marks that are tokens.
        shard_bytes: size of one weight file, and of what the main process holds in memory.

    Raises:
        UserError: the layout cannot express this model, or the directory holds another kind of model.
    """
    tower, dtype, template = model.vision_tower, description.dtype, description.template
    if reason := why_not_transformers(description.projector_type, model):
        raise UserError(f"{reason} Save it in LLaVA's layout.")
    directory = Path(directory)
    tokenizer = copy.deepcopy(image_token_tokenizer(description.tokenizer))
    bos, tokenizer.chat_template = None, None
    if template and not template.captions_only:
        prompt = "".join(text for text, _ in template.render(["Hi"], ["Hi"]))
        bos = leave_bos_to_the_template(tokenizer, prompt)
        tokenizer.chat_template = chat_template(template, bos or "")
    tokenizer.padding_side = "left"  # for generation; training pads on the right
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)

    rows = whole_shape(model.language_model.get_input_embeddings().weight)[0]
    if image_token_id >= rows:
        rows = math.ceil((image_token_id + 1) / ROWS_MULTIPLE) * ROWS_MULTIPLE
    language_weights, tied = _language_weights(model.language_model)
    weights = _tower_and_projector_weights(model)
    weights += [(_name_in_transformers(model, name), tensor) for name, tensor in language_weights]
    resized = {_name_in_transformers(model, name): rows for name in ("model.embed_tokens.weight", "lm_head.weight")}

    if is_main_process():
        begin_directory(directory)
    write_weights(directory, weights, dtype, shard_bytes, resized)
    save_projector(model.projector, directory / PROJECTOR_FILE, dtype, _newline(model))
    if not is_main_process():
        return

    # "default" removes one token, the class token.
    strategy = "default" if tower.leading_tokens and tower.select_feature == "patch" else "full"
    # Version 4's Llama and Gemma classes add BOS unless told not to.
    adds = {} if bos is None else {"add_bos_token": False, "add_eos_token": False, BOS_IN_TEMPLATE: True}
    _save_processor(directory, model, description, tokenizer, strategy, adds)
    stop = template.stop if template else ()
    generation = generation_settings(model.language_model.generation_config, tokenizer, stop)
    write_json(directory, "generation_config.json", generation)

    text_config = copy.deepcopy(model.language_model.config)
    text_config.vocab_size, text_config.tie_word_embeddings = rows, tied
    model_type, architecture = _transformers_class(model)
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
    # Keys of this program, not of transformers.
    config["conversation_version"] = description.version
    config["mm_use_im_start_end"], config["mm_use_im_patch_token"] = model.use_im_start_end, model.use_im_patch_token
    parts = {part: _portable(config[part], dtype) for part in ("text_config", "vision_config")}
    write_json(directory, "config.json", _portable(config, dtype) | parts)


def _name_in_transformers(model: LlavaModel, name: str) -> str:
    """Return the name of a language model's tensor; FastVLM came after transformers 4, whose names LLaVA keeps."""
    if not _is_fast_vlm(model):
        return "language_model." + name
    return name if name.startswith("lm_head.") else "model.language_model." + name.removeprefix("model.")


def _tower_and_projector_weights(model: LlavaModel) -> list[tuple[str, torch.Tensor]]:
    inside, config = "model." if _is_fast_vlm(model) else "", model.vision_tower.model.config
    tower = model.vision_tower.model.state_dict(keep_vars=True)
    weights = [(f"{inside}vision_tower.{published_name(config, name)}", tensor) for name, tensor in tower.items()]
    layers = {"0": "linear_1", "2": "linear_2"}
    for name, tensor in model.projector.state_dict(keep_vars=True).items():
        number, part = name.split(".")
        weights.append((f"{inside}multi_modal_projector.{layers[number]}.{part}", tensor))
    return weights + [(name.removeprefix("model."), tensor) for name, tensor in _newline(model).items()]


def _save_processor(
    directory: Path, model: LlavaModel, description: Description, tokenizer, strategy: str, adds: dict
) -> None:
    """Write the processor of transformers' layout so that transformers 4, too, reads what 5 writes.

    adds: what `tokenizer_config.json` says about tokens added to every text.
    """
    processor = (LlavaNextProcessor if model.tiling else LlavaProcessor)(
        image_processor=_llava_image_processor(description, model.tiling),
        tokenizer=tokenizer,
        patch_size=model.vision_tower.model.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=model.vision_tower.leading_tokens,
        image_token=IMAGE_MARK,
        chat_template=tokenizer.chat_template,
    )
    with staged(directory) as staging:
        processor.save_pretrained(staging)
        # 4 would otherwise add token_type_ids, which the model does not take.
        _make_readable_for_transformers_4(staging, model_input_names=["input_ids", "attention_mask"], **adds)
        # 5 keeps the image processor inside processor_config.json.
        settings = json.loads(processor.image_processor.to_json_string())
        settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil")
        _dump(settings, staging / "preprocessor_config.json")
        # For a later export in LLaVA's layout; it is not read as long as tokenizer.json is there.
        if tokenizer.name_or_path and (file := find_file(tokenizer.name_or_path, SENTENCEPIECE_FILE)):
            shutil.copyfile(file, staging / SENTENCEPIECE_FILE)


def save_whole_model(directory: str | Path, model: LlavaModel, description: Description) -> str:
    """Write the whole model in the requested layout, or LLaVA's if transformers' cannot express it; return a sentence.

    A collective; the main process writes.
    """
    reason = why_not_transformers(description.projector_type, model)
    if reason is None and description.export_format == "transformers":
        save_transformers(directory, model, description)
        return f"The model is in {directory}; transformers' {_transformers_class(model)[1]}.from_pretrained reads it."
    save_llava(directory, model, description)
    because = f": {reason}" if description.export_format == "transformers" else "."
    return f"The model is in {directory}, in the layout of LLaVA's own code{because}"


def save_llava(
    directory: str | Path, model: LlavaModel, description: Description, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the whole model, with any projector, in the layout of LLaVA's own code (`liuhaotian/llava-v1.5-*`).

    A collective; the main process writes.
    """
    directory, dtype = Path(directory), description.dtype
    weights, tied = _language_weights(model.language_model)
    for name, tensor in model.projector.state_dict(keep_vars=True).items():
        weights.append((f"model.mm_projector.{name}", tensor))
    weights += _newline(model).items()
    if description.include_vision_tower:
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
        _save_tokenizer_for_llava(staging, description.tokenizer)
    generation = generation_settings(model.language_model.generation_config, description.tokenizer)
    write_json(directory, "generation_config.json", generation)
    config = _portable({**llava_config(model, description), "tie_word_embeddings": tied}, dtype)
    # LLaVA's loader ignores tower weights in the files unless this is set (its issues 902 and 1694).
    config["unfreeze_mm_vision_tower"] = description.include_vision_tower
    write_json(directory, "config.json", config)


def generation_settings(generation_config: GenerationConfig, tokenizer, stop: tuple[str, ...] = ()) -> dict:
    """Return the content of `generation_config.json`: the language model's, with the tokenizer's special ids.

    Sampling values without `do_sample` are dropped: they made LLaVA's last save fail (its issue 1144).
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


def llava_config(model: LlavaModel, description: Description) -> dict:
    """Return the language model's configuration with the keys that LLaVA's `initialize_vision_modules` and `train` add.

    `conversation_version` and `mm_image_size` are keys of this program.
    """
    config = model.language_model.config.to_dict()
    family = config["model_type"]
    config |= {
        "model_type": f"llava_{family}",
        "architectures": [f"Llava{family.capitalize()}ForCausalLM"],
        "use_mm_proj": True,
        "mm_vision_tower": description.vision_tower_name,
        "mm_projector_type": description.projector_type,
        "mm_hidden_size": model.vision_tower.hidden_size,
        "mm_vision_select_layer": model.vision_tower.select_layer,
        "mm_vision_select_feature": model.vision_tower.select_feature,
        "mm_patch_merge_type": model.tiling.merge_type if model.tiling else "flat",
        "mm_use_im_start_end": model.use_im_start_end,
        "mm_use_im_patch_token": model.use_im_patch_token,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": description.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": description.model_max_length,
        "conversation_version": description.version,
    }
    if model.vision_tower.is_resized:
        config["mm_image_size"] = model.vision_tower.image_size
    if model.tiling:
        config["image_grid_pinpoints"] = [list(pair) for pair in model.tiling.pinpoints]
        if model.tiling.max_tiles:
            config["image_aspect_ratio"] += f"_max_{model.tiling.max_tiles}"
    return _portable(config, next(model.language_model.parameters()).dtype)


def _portable(config: dict, dtype: torch.dtype) -> dict:
    """Return a configuration that transformers 4 and 5 read alike.

    5 keeps RoPE's base inside `rope_parameters`; 4 and mlx-vlm read `rope_theta`, and silently take 10,000 without it
    (Llama 3 has 500,000). Gemma 3 has a second one for its sliding layers. 4 calls the dtype `torch_dtype`. The cache,
    which training switches off, is on again.
    """
    config = {key: value for key, value in config.items() if key not in CONFIG_NOISE}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if "use_cache" in config:
        config["use_cache"] = True
    rope = config.get("rope_parameters")
    if rope and "full_attention" in rope:
        if "rope_theta" in (sliding := rope.get("sliding_attention") or {}):
            config["rope_local_base_freq"] = sliding["rope_theta"]
        rope = rope["full_attention"]
    if rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return config


# ------------------------------------------------------------------------------------------- tokenizer and processor


def _llava_image_processor(description: Description, tiling: Tiling | None) -> BaseImageProcessor:
    """Return the tower's image processor with tiles, or with padding to a square on the mean colour, as trained.

    CLIP's own has no such options; LLaVA's are the same code with them. The PIL variants are pinned because those of
    torchvision resize differently, and a run would depend on what is installed. The files cannot pin them for all: by
    a class name without `Fast` transformers 4 takes PIL's, 5 torchvision's unless it is given `backend="pil"`.
    """
    image_processor = description.image_processor
    settings = image_processor.to_dict()
    settings.pop("image_processor_type", None)
    # SigLIP's does not crop and has no such key; LLaVA's default is to crop.
    settings = {"do_center_crop": False, **settings, "do_pad": True}
    if tiling:
        tile = {
            "size": {"shortest_edge": tiling.tile_size},
            "crop_size": {"height": tiling.tile_size, "width": tiling.tile_size},
            "image_grid_pinpoints": _height_first(tiling),
        }
        return LlavaNextImageProcessorPil(**settings | tile)
    return LlavaImageProcessorPil(**settings) if description.image_aspect_ratio == "pad" else image_processor


def _height_first(tiling: Tiling) -> list[list[int]]:
    """Return the pinpoints as transformers has them; in LLaVA's configuration the width comes first."""
    return [[height, width] for width, height in tiling.pinpoints]


def _is_fast_vlm(model: LlavaModel) -> bool:
    return model.vision_tower.model.config.model_type == "timm_wrapper"


def _transformers_class(model: LlavaModel) -> tuple[str, str]:
    """Return transformers' model type and class."""
    if _is_fast_vlm(model):
        return "fast_vlm", "FastVlmForConditionalGeneration"
    if model.tiling:
        return "llava_next", "LlavaNextForConditionalGeneration"
    return "llava", "LlavaForConditionalGeneration"


def _save_tokenizer_for_llava(staging: Path, tokenizer) -> None:
    """Write the tokenizer for the slow class of LLaVA's loader: a Llama tokenizer as its `tokenizer.model`.

    Other tokenizers, and Llama's without that file, are written unchanged, by names that transformers 4 knows.
    """
    model_file = find_file(tokenizer.name_or_path, SENTENCEPIECE_FILE) if tokenizer.name_or_path else None
    config = slow_llama_config(tokenizer) if model_file else None
    if config is None:
        tokenizer.save_pretrained(staging)
        _make_readable_for_transformers_4(staging)
        return
    shutil.copyfile(model_file, staging / SENTENCEPIECE_FILE)
    _dump(config, staging / "tokenizer_config.json")
    if isinstance(tokenizer.chat_template, str):
        (staging / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _make_readable_for_transformers_4(staging: Path, **settings) -> None:
    """Adjust the tokenizer's files that transformers 5 wrote; `settings` go into `tokenizer_config.json`."""
    path = staging / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend", "name_or_path"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 5 writes this list under another name than 4 reads; a table both read.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _dump(config | settings, path)

    # Before tokenizers 0.20 a merge was one text, which is still read unless one of its halves has a blank.
    path = staging / "tokenizer.json"
    pipeline = json.loads(path.read_text(encoding="utf-8"))
    merges = pipeline["model"].get("merges", [])
    if not any(" " in half for pair in merges for half in pair):
        pipeline["model"]["merges"] = [" ".join(pair) for pair in merges]
        _dump(pipeline, path)


def _dump(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- weights and files


def _language_weights(language_model: nn.Module) -> tuple[list[tuple[str, torch.Tensor]], bool]:
    """Return names and tensors, without an `lm_head` that is tied to the embedding, and whether it is tied."""
    embeddings = language_model.get_input_embeddings().weight
    tied = language_model.get_output_embeddings().weight is embeddings
    weights = language_model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in weights.items() if not tied or name != "lm_head.weight"], tied


def _newline(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the image newline, if the model has one, by LLaVA's name."""
    return {f"model.{NEWLINE_KEY}": model.image_newline.weight} if model.image_newline is not None else {}


def begin_directory(directory: Path) -> None:
    """Remove an older model's files, `config.json` first, so that what is left is not taken for a model."""
    check_may_be_written(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in MODEL_FILES:
        for file in directory.glob(pattern):
            if file.is_file():
                file.unlink()
