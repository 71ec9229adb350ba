"""LLaVA's legacy tokens around an image: their rows in the language model, trained and saved with the projector.

Replaces `initialize_vision_tokenizer`, which writes to empty tensors under ZeRO-3, and trains all word embeddings in
stage 1, although stage 2 reads the new rows only. Here stage 1 trains only these, as a part of the model of their own.
"""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.templates import IMAGE_MARK, Template
from ..errors import UserError
from ..formats.layouts import find_projector
from ..model.llava import LlavaModel
from ..model.projector import gathered, read_tensors

PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, template: Template, start_end: bool, patch: bool) -> Template:
    """Add the tokens of LLaVA's older models to the tokenizer; return the template with start and end around an image.

    `<im_patch>` occurs in no text, only in the vocabulary. LLaVA's template for captions has no start and end; here it
    does, because stage 1 trains them.
    """
    names = [PATCH_TOKEN] * patch + [START_TOKEN, END_TOKEN] * start_end
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if not start_end:
        return template
    return replace(template, image_mark=template.image_mark.replace(IMAGE_MARK, START_TOKEN + IMAGE_MARK + END_TOKEN))


def token_ids_end(tokenizer) -> int:
    """Return the highest id plus 1: more than `len(tokenizer)` if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def missing_rows(tokenizer, language_config) -> int:
    """Return how many ids of the tokenizer have no row in the configured word embeddings."""
    return max(0, token_ids_end(tokenizer) - language_config.get_text_config().vocab_size)


def add_token_rows(
    model: LlavaModel,
    tokenizer: PreTrainedTokenizerBase,
    added: int,
    marks: tuple[bool, bool],
    projector: str | None = None,
) -> None:
    """Add rows for the tokenizer's last tokens to word embeddings and head, each the mean of the older rows.

    Args:
        added: how many tokens are new to the language model, which may have been trained with these before.
        marks: whether the tokenizer has start and end, and whether it has the patch token.
        projector: file or directory of stage 1's projector with the rows for start and end; None: the mean.
    """
    language_model, vocabulary = model.language_model, token_ids_end(tokenizer)
    was_trained = [matrix.requires_grad for matrix in matrices(language_model)]
    embeddings = matrices(language_model)[0]
    # Embeddings with spare rows are not made smaller, and without new tokens they stay unchanged.
    if added and getattr(embeddings, "ds_shape", embeddings.shape)[0] < vocabulary:
        language_model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for matrix, trained in zip(matrices(language_model), was_trained, strict=True):
        if added:
            first = vocabulary - added
            with gathered(matrix, modified=True), torch.no_grad():
                matrix[first:vocabulary] = matrix[:first].float().mean(0).to(matrix.dtype)
        matrix.requires_grad_(trained)
    model.use_im_start_end, model.use_im_patch_token = marks
    model.added_tokens = added
    if not model.use_im_start_end:
        return
    model.first_image_token = tokenizer.convert_tokens_to_ids(START_TOKEN)
    if projector:
        set_rows(model, read_rows(projector))


def set_rows(model: LlavaModel, rows: torch.Tensor) -> None:
    """Set the word embeddings of `<im_start>` and `<im_end>`, [2, width]. Raises UserError for another width."""
    embeddings = matrices(model.language_model)[0]
    with gathered(embeddings, modified=True), torch.no_grad():
        place = embeddings[model.first_image_token :][:2]
        if place.shape != rows.shape:
            raise UserError(
                f"The rows of <im_start> and <im_end> are {list(rows.shape)}, but this model needs {list(place.shape)}."
            )
        place.copy_(rows)


def read_rows(projector: str | Path) -> torch.Tensor:
    """Return the rows [2, width] of a projector file: LLaVA writes these alone, or all embeddings with these last."""
    path = find_projector(projector)
    rows = [tensor for key, tensor in read_tensors(path).items() if key.endswith("embed_tokens.weight")]
    if len(rows) != 1 or rows[0].dim() != 2 or len(rows[0]) < 2:
        raise UserError(
            f"{path} has no rows for <im_start> and <im_end> (model.embed_tokens.weight): its projector was trained "
            "without them. Use --mm_use_im_start_end False."
        )
    return rows[0][-2:]


def matrices(language_model: nn.Module) -> list[nn.Parameter]:
    """Return word embeddings and head; one matrix if they are tied."""
    both = [language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight]
    return both[:1] if both[0] is both[1] else both
