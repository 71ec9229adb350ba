"""LLaVA's legacy tokens around an image: their rows in the language model, trained in stage 1, kept with the projector.

Replaces `initialize_vision_tokenizer`, which under ZeRO-3 writes to empty tensors, and in stage 1 trains all word
embeddings, of which stage 2 takes the new rows alone. Here only these rows are trained there, as a part of their own.
"""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.templates import IMAGE_MARK, Template
from ..model.llava import LlavaModel
from ..model.projector import PROJECTOR_FILE, read_tensors, whole

PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, template: Template, start_end: bool, patch: bool) -> Template:
    """Add the tokens of LLaVA's older models to the tokenizer and return the template that puts them around an image.

    `<im_patch>` never stands in a text: it only takes its place in the vocabulary, the first one. In LLaVA the template
    for captions drops start and end again; here they are in it, since stage 1 trains them.
    """
    names = [PATCH_TOKEN] * patch + [START_TOKEN, END_TOKEN] * start_end
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if not start_end:
        return template
    return replace(template, image_mark=template.image_mark.replace(IMAGE_MARK, START_TOKEN + IMAGE_MARK + END_TOKEN))


def token_ids_end(tokenizer) -> int:
    """Return the number behind the highest id, which is more than `len(tokenizer)` where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def missing_rows(tokenizer, language_config) -> int:
    """Return how many ids of the tokenizer lie beyond the rows of the word embeddings, as configured."""
    return max(0, token_ids_end(tokenizer) - language_config.get_text_config().vocab_size)


def add_token_rows(
    model: LlavaModel,
    tokenizer,
    added: int,
    start_end: bool,
    patch: bool,
    projector: str | None,
    train: bool,
    dtype: torch.dtype,
) -> None:
    """Gives the tokenizer's last tokens rows in word embeddings and head, both the mean of the rows before them.

    Args:
        added: how many of its tokens are new to the language model, which may have been trained with them before.
        projector: file or directory of stage 1's projector, whose rows for start and end are taken; None: the mean.
        train: whether these two rows are trained although the language model is frozen (stage 1), in `dtype`.
    """
    language_model, vocabulary = model.language_model, token_ids_end(tokenizer)
    was_trained = [matrix.requires_grad for matrix in _matrices(language_model)]
    embeddings = _matrices(language_model)[0]
    # A vocabulary with room to spare is not made smaller, and one without new tokens stays as it is.
    if added and getattr(embeddings, "ds_shape", embeddings.shape)[0] < vocabulary:
        language_model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for matrix, trained in zip(_matrices(language_model), was_trained, strict=True):
        if added:
            first = vocabulary - added
            with whole(matrix, modified=True), torch.no_grad():
                matrix[first:vocabulary] = matrix[:first].float().mean(0).to(matrix.dtype)
        matrix.requires_grad_(trained)
    model.use_im_start_end, model.use_im_patch_token, model.added_tokens = start_end, patch, added
    if not start_end:
        return
    model.first_image_token = tokenizer.convert_tokens_to_ids(START_TOKEN)
    if projector:
        set_rows(model, read_rows(projector))
    if train:
        embeddings = _matrices(language_model)[0]
        with whole(embeddings):
            rows = embeddings[model.first_image_token :][:2].detach().to(dtype, copy=True)
        model.new_tokens = nn.Embedding.from_pretrained(rows, freeze=False)


def set_rows(model: LlavaModel, rows: torch.Tensor) -> None:
    """Puts [2, width] into the word embeddings of `<im_start>` and `<im_end>`. Raises ValueError for another width."""
    embeddings = _matrices(model.language_model)[0]
    with whole(embeddings, modified=True), torch.no_grad():
        place = embeddings[model.first_image_token :][:2]
        if place.shape != rows.shape:
            raise ValueError(
                f"The rows of <im_start> and <im_end> are {list(rows.shape)}, but this model needs {list(place.shape)}."
            )
        place.copy_(rows)


def read_rows(projector: str | Path) -> torch.Tensor:
    """The rows [2, width] in a projector file: LLaVA writes the whole matrix, the new rows last, or these alone."""
    path = Path(projector)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    rows = [tensor for key, tensor in read_tensors(path).items() if key.endswith("embed_tokens.weight")]
    if len(rows) != 1 or rows[0].dim() != 2 or len(rows[0]) < 2:
        raise ValueError(
            f"{path} has no rows for <im_start> and <im_end> (model.embed_tokens.weight): its projector was trained "
            "without them. Use --mm_use_im_start_end False."
        )
    return rows[0][-2:]


def _matrices(language_model: nn.Module) -> list[nn.Parameter]:
    """Word embeddings and head; one where they are tied."""
    both = [language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight]
    return both[:1] if both[0] is both[1] else both
