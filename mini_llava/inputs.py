"""What a run makes of a record and of a picture: the functions that its flags and its model ask for.

`train.py` trains with them, `tools/inspect.py` and `tools/tour.py` show what they do. Configurations, tokenizer and
image processor are read here, no weight.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .arguments import Arguments
from .data.loader import open_pixels
from .data.records import measurement_key
from .data.templates import Template, get_template
from .data.tokenization import Sample, add_image_tokens, load_tokenizer, tokenize, tokenize_prompt
from .data.unread import allowed
from .formats.read import Source
from .model.vision_tower import tokens_per_image
from .options.image_tokens import missing_rows
from .options.tiles import Tiles, Tiling


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        new_tokens: how many tokens at the end of the tokenizer get new rows: LLaVA's image marks, if flags add them,
            and with `--resize_token_embeddings` all for which the language model has none.
        to_sample: (record, `folder` of its images) to what is trained on.
        to_eval_sample: the same with the template of `--eval_version`.
        to_prompt: record to the ids up to the answer of its last question, one for each image, in that template.
        to_pixels: (image folder, image name) to what `collate` takes.
        measurement_key: of the lengths that `to_sample` gives, for their cache.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    eval_template: Template
    new_tokens: int
    image_processor: BaseImageProcessor
    image_size: int
    tiling: Tiling | None
    to_sample: Callable[..., Sample]
    to_eval_sample: Callable[..., Sample]
    to_prompt: Callable[[dict], np.ndarray]
    to_pixels: Callable[[str, str], torch.Tensor | Tiles]
    measurement_key: str


def choose_inputs(arguments: Arguments, source: Source) -> Inputs:
    """Raises ValueError and OSError, with sentences, for what the model or its tokenizer cannot do.

    arguments: as `Arguments.fixed_by` gives them.
    """
    model_flags, data_flags = arguments.model, arguments.data
    tiling = source.tiling
    tokenizer = load_tokenizer(source.name, model_flags.trust_remote_code)
    template = get_template(model_flags.version, tokenizer)
    eval_template = get_template(data_flags.eval_version or model_flags.version, tokenizer)
    marks, known_tokens = (model_flags.mm_use_im_start_end, model_flags.mm_use_im_patch_token), len(tokenizer)
    template, eval_template = (add_image_tokens(tokenizer, each, *marks) for each in (template, eval_template))
    resized = model_flags.resize_token_embeddings
    image_processor, image_size = source.image_processor(), source.image_size()
    left_unread = allowed(data_flags.leave_unread or [])
    image_tokens = tokens_per_image(source.vision_config, source.select_feature, image_size)
    to_sample = functools.partial(
        tokenize,
        template=template,
        tokenizer=tokenizer,
        tokens_per_image=tiling.tokens if tiling else image_tokens,
        max_length=data_flags.model_max_length,
        left_unread=left_unread,
    )
    to_pixels = functools.partial(
        open_pixels,
        processor=image_processor,
        aspect_ratio=data_flags.image_aspect_ratio,
        size=image_size,
        tiling=tiling,
    )
    return Inputs(
        tokenizer,
        template,
        eval_template,
        max(len(tokenizer) - known_tokens, missing_rows(tokenizer, source.language_config) if resized else 0),
        image_processor,
        image_size,
        tiling,
        to_sample,
        functools.partial(to_sample, template=eval_template),
        functools.partial(tokenize_prompt, template=eval_template, tokenizer=tokenizer, left_unread=left_unread),
        to_pixels,
        measurement_key(template, tokenizer, tiling or image_tokens, data_flags.model_max_length, left_unread),
    )
