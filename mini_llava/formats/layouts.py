"""Names in each directory layout: of the files, of the tensors of each part of the model, of LLaVA's keys.

LLaVA's loader goes by words in the folder's name; here `config.json` says which layout it is.
"""

import re

from ..options.tiles import MERGE_TYPES

# Looked for in this order; the first two are the ones that cannot hold code.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# What an older model in the directory may consist of; left there, it would be read beside the new one.
MODEL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "mm_projector.bin"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"),
    "chat_template.jinja",
)

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
IMAGE_TOKEN_FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token")


def layout_of(name: str, config: dict) -> str:
    """Return the layout that `config.json` speaks of."""
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


def tiles_in(name: str, config: dict) -> tuple[str | None, list | str | None]:
    """Return merge type and pinpoints by a LLaVA configuration; None, None: images are whole. Raise ValueError."""
    aspect_ratio, merge_type = str(config.get("image_aspect_ratio")), config.get("mm_patch_merge_type", "flat")
    if aspect_ratio == "anyres" and merge_type in MERGE_TYPES:
        return merge_type, config.get("image_grid_pinpoints")
    if aspect_ratio.startswith("anyres") or merge_type != "flat":
        raise ValueError(
            f"{name}: its config.json has image_aspect_ratio {aspect_ratio} with mm_patch_merge_type {merge_type}; "
            f"known are anyres with {', '.join(MERGE_TYPES)}, and others with flat."
        )
    return None, None
