"""Reads the recordings in fixtures/ (`fixtures/README.md` says how they were made); names tensors as LLaVA does."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mini_llava.arguments import ModelArguments
from mini_llava.data.collator import collate
from mini_llava.data.images import Picture, normalisation_table, normalise, pixel_values
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import Sample, tokenize
from mini_llava.formats.read import load_llava, open_source
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor
from mini_llava.image_files import load_image
from mini_llava.model.llava import LlavaModel

FIXTURES = Path(__file__).parent / "fixtures"
LLAVA = "LLaVA c121f04"
IMAGE_TOKENS = 16


def load_json(name: str):
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def write_projector(path: Path) -> Path:
    """The projector of `llava_init/`, which holds the whole model, alone in a file and in fp32."""
    tensors = load_file(FIXTURES / "llava_init" / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items() if "mm_projector" in name}, path)
    return path


def golden_model(projector: Path) -> LlavaModel:
    """The recordings' model in fp32, vision tower frozen."""
    dtypes = dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32)
    parts = {"model_name_or_path": str(FIXTURES / "llm"), "vision_tower": str(FIXTURES / "clip")}
    source = open_source(ModelArguments(**parts, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2))
    model = load_llava(source, "sdpa", dtypes, str(projector))
    model.vision_tower.requires_grad_(False)
    return model.train()


def llava_name(name: str) -> str:
    """The name of one of our parameters in LLaVA's model."""
    part, _, rest = name.partition(".")
    if part == "language_model":
        return rest
    if part == "projector":
        return f"model.mm_projector.{rest}"
    rest = rest.removeprefix("model.").removeprefix("vision_model.")
    return f"model.vision_tower.vision_tower.vision_model.{rest}"


def golden_samples(records: list[dict], max_length: int) -> list[Sample]:
    template, tokenizer = get_template("v1"), load_tokenizer(FIXTURES / "llm")
    return [tokenize(record, template, tokenizer, IMAGE_TOKENS, max_length) for record in records]


def golden_pixels(names: list[str], aspect_ratio: str = "pad") -> list[torch.Tensor]:
    processor = load_image_processor(FIXTURES / "clip")
    folder = str(FIXTURES / "data" / "images")
    return [pixel_values(load_image(folder, name), processor, aspect_ratio) for name in names]


def as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, as other code than ours takes them."""
    return normalise(pixels, normalisation_table(load_image_processor(FIXTURES / "clip")))


def golden_batch(samples: list[Sample], packed: bool) -> dict:
    """One micro-batch of these samples with their images, as the model takes it."""
    pictures = [[Picture(pixels[None], IMAGE_TOKENS) for pixels in golden_pixels(sample.images)] for sample in samples]
    samples = [replace(sample, pictures=opened) for sample, opened in zip(samples, pictures, strict=True)]
    return collate(samples, 56, packed)


def all_logits(model: LlavaModel, batch: dict) -> torch.Tensor:
    """Logits [B, L, vocabulary] of every position, from the model's own forward."""
    rows, columns = batch["input_ids"].shape
    everywhere = {
        "logit_positions": torch.arange(columns),
        "targets": torch.zeros(rows, columns, dtype=torch.int64),
    }
    seen = []
    hook = model.language_model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    with hook, torch.no_grad():
        model(**{**batch, **everywhere})
    return seen[0]


def by_sample(batch: dict, values: torch.Tensor, samples: list[Sample]) -> list[torch.Tensor]:
    """Splits [B, L, ...] of a padded or packed batch into one [length, ...] for each sample."""
    lengths = [len(sample.input_ids) for sample in samples]
    if batch["cu_seqlens"] is not None:
        return list(values[0].split(lengths))
    return [row[:length] for row, length in zip(values, lengths, strict=True)]
