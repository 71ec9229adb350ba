"""Names in each directory layout: of files, of each part's tensors, of LLaVA's configuration keys.

LLaVA's loader decides by words in the folder's name, this program by `config.json`.
"""

import re
from pathlib import Path

from ..arguments import check_model_place
from ..errors import UserError

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
DTYPES = ("bfloat16", "float16", "float32")  # of stored weights, by torch's names

# In order of preference: the first two cannot hold code.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# Files of an older model, which would be read with a new one's.
MODEL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "mm_projector.bin"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"),
    "chat_template.jinja",
)

# Prefixes of tensor names: (in the files, the part of the model, in that part). The first match counts. CLIP's names
# have `vision_model.` in transformers 4 and not in 5.
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

# Keys of LLaVA's configuration that the language model's does not have.
OF_LLAVA = re.compile(r"(^|_)mm_|^image_|^tokenizer_|^(model_type|architectures|vision_tower|conversation_version)$")

# This program writes llava_qwen2, others llava_qwen; for LLaVA-1.5's published "llava" the architecture decides.
FAMILIES = {"qwen": "qwen2"}

# Transformers' layout does not name the tower; LLaVA's has to, and gets a name by width, layers, patch size, image size
# and activation. The weights are then written too: the name stands for architecture and image processor only.
KNOWN_TOWERS = {
    (1024, 24, 14, 336, "quick_gelu"): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224, "quick_gelu"): "openai/clip-vit-large-patch14",
    (1152, 27, 14, 384, "gelu_pytorch_tanh"): "google/siglip-so400m-patch14-384",
}
IMAGE_TOKEN_FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token")


def layout_of(name: str, config: dict) -> str:
    """Return the layout of a `config.json`: "transformers", "llava" or "language_model". Raises UserError."""
    model_type, architectures = config.get("model_type", ""), config.get("architectures") or []
    if "text_config" in config and "vision_config" in config:
        if model_type not in ("llava", "llava_next", "fast_vlm"):
            raise UserError(
                f"{name} is a model of type {model_type} ({', '.join(architectures)}). Of the models with a "
                f"vision tower, only LLaVA's (LlavaForConditionalGeneration, type llava, and "
                f"LlavaNextForConditionalGeneration, type llava_next) and FastVLM's (type fast_vlm) can be read. "
                f"LLaVA-OneVision is read in the layout of LLaVA's own code (lmms-lab/llava-onevision-...)."
            )
        return "transformers"
    return "llava" if model_type.startswith("llava") or "mm_vision_tower" in config else "language_model"


def tiles_in(name: str, config: dict) -> tuple[str | None, list | str | None, int | None]:
    """Return merge type, pinpoints and N of `anyres_max_N` of a LLaVA configuration, LLaVA's own or transformers'.

    All are None for a LLaVA model that takes images whole, and for a language model. Raises UserError.
    """
    if config.get("model_type") == "llava_next":
        pairs = config.get("image_grid_pinpoints")  # height comes first there, width in LLaVA's own
        return "spatial_unpad", pairs and [(width, height) for height, width in pairs], None
    aspect_ratio, merge_type = str(config.get("image_aspect_ratio")), config.get("mm_patch_merge_type", "flat")
    if aspect_ratio == "anyres" and merge_type in MERGE_TYPES:
        return merge_type, config.get("image_grid_pinpoints"), None
    if (most := re.fullmatch(r"anyres_max_(\d+)", aspect_ratio)) and merge_type == "spatial_unpad":  # LLaVA-OneVision's
        return merge_type, config.get("image_grid_pinpoints"), int(most[1])
    if aspect_ratio.startswith("anyres") or merge_type != "flat":
        raise UserError(
            f"{name}: its config.json has image_aspect_ratio {aspect_ratio} with mm_patch_merge_type {merge_type}; "
            f"known are anyres with {', '.join(MERGE_TYPES)}, anyres_max_N with spatial_unpad, and others with flat."
        )
    return None, None, None


def find_projector(path: str | Path) -> Path:
    """Return the file of a projector, given itself or its directory. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        path = path / PROJECTOR_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no projector at {path}. --pretrain_mm_mlp_adapter takes the {PROJECTOR_FILE} that stage 1 "
            f"wrote, or the directory that holds it."
        )
    return path


def find_adapter(directory: str | Path) -> Path:
    """Return the file of a LoRA directory that holds its adapters. Raises FileNotFoundError: there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"{directory} (--lora_weight_path) {state}; give the directory of an earlier LoRA run.")
    file = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory} has neither {' nor '.join(ADAPTER_FILES)}: it is not a LoRA directory.")
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {ADAPTER_CONFIG}, which says what its adapters are.")
    return file


def check_saved_place(directory: str, base: str | None = None, vision_tower: str | None = None) -> None:
    """Raise UserError for a path that is no directory: of a saved model, its `--model_base` or its `--vision_tower`."""
    if directory.startswith(("/", ".", "~")) and not Path(directory).is_dir():
        raise UserError(f"{directory} is not a directory; give a model's directory or its name on the hub.")
    check_model_place("--model_base", base)
    check_model_place("--vision_tower", vision_tower)
