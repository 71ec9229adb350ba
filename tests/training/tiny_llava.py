"""A LLaVA of a few thousand parameters and micro-batches for it, made in memory."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from mini_llava.data.collator import MicroBatch, collate
from mini_llava.data.images import Picture
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, Sample
from mini_llava.model.llava import LlavaModel
from mini_llava.model.projector import build_projector
from mini_llava.model.trained import apply_plan
from mini_llava.model.vision_tower import VisionTower

IMAGE_SIZE, TOKENS_PER_IMAGE = 28, 4


def tiny_llava(trained: tuple[str, ...] = ("projector", "language_model"), family: str = "llama") -> LlavaModel:
    """Four layers of width 32 behind a tower of two layers that are all used; attention is eager and can be counted."""
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        family, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
        image_size=IMAGE_SIZE, attn_implementation="eager",
    )  # fmt: skip
    tower = VisionTower(CLIPVisionModel(vision), select_layer=-1)
    model = LlavaModel(tower, build_projector("mlp2x_gelu", 16, 32), AutoModelForCausalLM.from_config(text))
    apply_plan(model, {part: "full" if part in trained else "frozen" for part, _ in model.named_children()})
    return model.train()


def micro_batch(lengths: list[int], images: int = 0, packed: bool = True) -> MicroBatch:
    """Samples of these lengths, the first `images` of them beginning with an image; half of each is trained."""
    samples = []
    for number, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int32) % 90 + 1
        labels = np.where(np.arange(length) >= length // 2, ids, -100).astype(np.int32)
        pictures = []
        if number < images:
            ids[:TOKENS_PER_IMAGE] = IMAGE_TOKEN_INDEX
            labels[:TOKENS_PER_IMAGE] = -100
            pictures = [Picture(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), TOKENS_PER_IMAGE)]
        samples.append(Sample(ids, labels, ["image"] * len(pictures), pictures))
    return collate(samples, IMAGE_SIZE, packed)
