"""Generation: prompts and images in, tokens out.

Replaces LLaVA's own `generate`, which takes one image size and does not pad. Images are placed by the model's `embed`,
as in training; the rest is transformers' `generate` of the language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.collator import join_pictures
from ..data.images import Picture
from ..data.tokenization import IMAGE_TOKEN_INDEX, expand_images
from ..model.llava import LlavaModel


def expand_prompt(prompt: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
    """Return a prompt [L] with as many tokens for each image as it has features, instead of one."""
    return expand_images(prompt, [picture.tokens for picture in pictures])


def generate(
    model: LlavaModel,
    prompts: Sequence[np.ndarray],
    pictures: Sequence[Picture],
    device: torch.device | str,
    **options,
) -> torch.Tensor:
    """Return the tokens of the answers, int64 [prompts, longest answer]. Under ZeRO-3 it is a collective.

    Args:
        prompts: from `expand_prompt`.
        pictures: of all prompts, in order.
        options: of transformers' `generate`; the defaults are in the language model's `generation_config`.
    """
    rows = [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts]
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    is_image = input_ids == IMAGE_TOKEN_INDEX
    pixel_values, *placement = join_pictures(pictures, model.vision_tower.image_size)
    embeddings = model.embed(
        input_ids.masked_fill(is_image, 0).to(device),
        pixel_values.to(device),
        is_image.flatten().nonzero().squeeze(-1).to(device),
        *(None if tensor is None else tensor.to(device) for tensor in placement),
    )
    with attention_with_cache(model.language_model) as language_model:
        return language_model.generate(inputs_embeds=embeddings, attention_mask=mask.to(device), **options)


@contextmanager
def attention_with_cache(language_model: nn.Module) -> Iterator[nn.Module]:
    """Let attention take a cache: `varlen` is for packed rows only, and is `sdpa` meanwhile."""
    is_varlen = language_model.config._attn_implementation == "varlen"
    if is_varlen:
        language_model.set_attn_implementation("sdpa")
    try:
        yield language_model
    finally:
        if is_varlen:
            language_model.set_attn_implementation("varlen")
