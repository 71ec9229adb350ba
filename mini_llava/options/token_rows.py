"""Rows of single tokens that are trained while the other rows of word embeddings and head stay frozen.

In stage 1 those of LLaVA's marks around an image; with adapters those of new tokens, which nothing else would train.
PEFT's `trainable_token_indices` copies the whole matrices at each forward and finds them empty under ZeRO-3. Here hooks
put the rows into what embedding and head give; the files are PEFT's.
"""

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..arguments import Arguments
from ..errors import UserError
from ..model.llava import LlavaModel
from ..model.projector import gathered, list_some
from .image_tokens import END_TOKEN, START_TOKEN, matrices


def add_tokens(tokenizer: PreTrainedTokenizerBase, names: list[str] | None) -> None:
    """Add the tokens of `--add_tokens` that the tokenizer has not; they are not special, so that answers show them."""
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names or ()])


def trained_ids(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens whose rows are trained beside a frozen language model, in order.

    Raises:
        UserError: `--trainable_token_indices` names a token that the tokenizer has not.
    """
    if not arguments.training.lora_enable:
        return tokenizer.convert_tokens_to_ids([START_TOKEN, END_TOKEN]) if arguments.model.mm_use_im_start_end else []
    vocabulary, found = tokenizer.get_vocab(), set()
    for name in [*(arguments.model.add_tokens or ()), *(arguments.training.trainable_token_indices or ())]:
        index = vocabulary.get(name, int(name) if name.isdecimal() else -1)
        if index not in vocabulary.values():
            raise UserError(
                f"--trainable_token_indices {name}: {tokenizer.name_or_path} has no such token; give tokens or ids, or "
                "add tokens with --add_tokens."
            )
        found.add(index)
    return sorted(found)


class TokenRows(nn.Embedding):
    """The trained rows: [tokens, width] of the embedding, and `head`, the same of the head or None.

    A part of the model of its own, called as a module, so that ZeRO-3 gathers it as it does any other.
    """

    def __init__(self, language_model: nn.Module, ids: list[int], dtype: torch.dtype, with_head: bool):
        both = []
        for matrix in matrices(language_model):
            with gathered(matrix):
                both.append(matrix[ids].detach().to(dtype, copy=True))
        width = both[0].shape[-1]
        super().__init__(len(ids), width, _weight=both[0])
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.head = None
        if with_head:
            self.head = nn.Linear(width, len(ids), bias=False, device="meta")
            self.head.weight = nn.Parameter(both[1]) if len(both) > 1 else self.weight
        self._hooks = [language_model.get_input_embeddings().register_forward_hook(self._embed)]
        if with_head:
            self._hooks.append(language_model.get_output_embeddings().register_forward_hook(self._score))

    def _embed(self, embedding: nn.Module, inputs: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
        """Replace the embeddings of these tokens; where there is none, the gradient is zero rather than absent."""
        number = torch.searchsorted(self.ids, inputs[0]).clamp(max=len(self.ids) - 1)
        own = self(number).to(found.dtype) * getattr(embedding, "embed_scale", 1)  # Gemma scales its embeddings
        return torch.where((self.ids[number] == inputs[0])[..., None], own, found)

    def _score(self, head: nn.Module, inputs: tuple[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
        own = self.head(inputs[0]).to(found.dtype)
        if head.bias is not None:
            own = own + head.bias[self.ids]
        return found.index_copy_(-1, self.ids, own)  # in place: a copy of all logits may be gigabytes

    @torch.no_grad()
    def write_into(self, language_model: nn.Module) -> None:
        """Copy the rows to the language model's own matrices, and stand in for these no longer."""
        for hook in self._hooks:
            hook.remove()
        rows = [self.weight] if self.head is None else [self.weight, self.head.weight]
        for matrix, own in zip(matrices(language_model), rows, strict=False):
            matrix[self.ids] = own.to(matrix.dtype)


def peft_names(model: LlavaModel) -> dict[str, nn.Parameter]:
    """Return the rows that are trained with adapters by the names that PEFT gives them."""
    rows, language_model = model.new_tokens, model.language_model
    if rows is None or rows.head is None:
        return {}
    both = [(language_model.get_input_embeddings(), rows.weight)]
    if rows.head.weight is not rows.weight:
        both.append((language_model.get_output_embeddings(), rows.head.weight))
    names = {id(module): name for name, module in language_model.named_modules()}
    return {f"{names[id(module)]}.token_adapter.trainable_tokens_delta": parameter for module, parameter in both}


def peft_setting(model: LlavaModel) -> dict:
    """Return what PEFT's configuration says of the rows: nothing where there are none."""
    layers = [name.split(".")[-3] for name in peft_names(model)]
    return {"trainable_token_indices": {layer: model.new_tokens.ids.tolist() for layer in layers}} if layers else {}


def ids_of_setting(setting: list | dict | None, where: str) -> list[int]:
    """Return the ids of PEFT's `trainable_token_indices`. Raises UserError where embedding and head have others."""
    lists = [sorted(ids) for ids in (setting.values() if isinstance(setting, dict) else [setting or []])]
    if lists[1:] and lists[1:] != lists[:-1]:
        raise UserError(f"{where} has other trainable_token_indices for {list_some(list(setting))}.")
    return lists[0] if lists else []
