"""The samples of a run, as its flags and its model ask for: those to train on, and the held-out ones.

Configurations, tokenizer and image processor are read here, no weight.
"""

import os
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from .arguments import Arguments, ModelArguments
from .data.images import ImageReader
from .data.records import RecordStore
from .data.samples import Samples
from .data.templates import Template
from .formats.read import Source
from .formats.tokenizers import load_tokenizer
from .guards.records import RecordCheck
from .model.vision_tower import tokens_per_image
from .options.chat_template import find_template
from .options.image_tokens import add_image_tokens, missing_rows
from .options.token_rows import add_tokens


def open_samples(arguments: Arguments, source: Source, cache_folder: str | os.PathLike | None = None) -> Samples:
    """Return the samples to train on.

    Args:
        cache_folder: of the store's index, see `RecordStore`.

    Raises:
        UserError, OSError: a sentence about what the model, its tokenizer or the data cannot do.
    """
    model_flags, data_flags = arguments.model, arguments.data
    tiling = source.tiling
    tokenizer = load_tokenizer(source.name, model_flags.trust_remote_code)
    known_tokens, image_size = len(tokenizer), source.image_size()
    add_tokens(tokenizer, model_flags.add_tokens)
    template = choose_template(model_flags, model_flags.version, tokenizer)
    rows = missing_rows(tokenizer, source.language_config) if model_flags.resize_token_embeddings else 0
    image_reader = ImageReader(
        tokens_per_image(source.vision_config, source.select_feature, image_size),
        source.image_processor(),
        data_flags.image_aspect_ratio,
        image_size,
        tiling,
    )
    # After all that may be refused at once: a large file takes long to read.
    files = data_flags.data_path, data_flags.image_folder, data_flags.exclude
    store = RecordStore(*files, cache_folder, follow_links=data_flags.follow_links)
    check, new_tokens = RecordCheck(data_flags.leave_unread or []), max(len(tokenizer) - known_tokens, rows)
    return Samples(store, template, tokenizer, data_flags.model_max_length, image_reader, check, new_tokens)


def open_held_out(arguments: Arguments, samples: Samples) -> Samples | None:
    """Return the samples of `--eval_data_path`, with the template of `--eval_version`; None without the flag."""
    data_flags = arguments.data
    if data_flags.eval_data_path is None:
        return None
    files, links = (data_flags.eval_data_path, data_flags.eval_image_folder), data_flags.follow_links
    store = RecordStore(*files, flag_prefix="eval_", follow_links=links)
    return replace(samples, store=store, template=held_out_template(arguments, samples.tokenizer))


def held_out_template(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template that held-out questions are asked with."""
    return choose_template(arguments.model, arguments.data.eval_version or arguments.model.version, tokenizer)


def choose_template(model_flags: ModelArguments, version: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return a template with LLaVA's image marks if flags ask for them; the tokenizer then gets them too."""
    marks = (model_flags.mm_use_im_start_end, model_flags.mm_use_im_patch_token)
    return add_image_tokens(tokenizer, find_template(version, tokenizer), *marks)
