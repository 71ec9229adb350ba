"""Open any directory with a LLaVA model or a trained part of one as a whole model, for `export` and `chat`.

Replaces the loader that LLaVA's tools choose by words in the folder's name. A LoRA directory, a projector and a
training state name the base that they belong to. Names and shapes of all tensors are compared.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..arguments import ModelArguments
from ..data.templates import Template
from ..errors import UserError
from ..formats.adapters import is_inside_llava
from ..formats.layouts import (
    ADAPTER_CONFIG,
    IMAGE_TOKEN_FLAGS,
    PROJECTOR_FILE,
    WEIGHT_FILES,
    check_saved_place,
    layout_of,
    tiles_in,
)
from ..formats.read import Source, load_llava, open_source
from ..formats.tokenizers import load_tokenizer
from ..hub import find_file, read_json
from ..model.llava import LlavaModel
from ..options.chat_template import find_template
from ..options.image_tokens import add_image_tokens, add_token_rows, missing_rows
from ..options.lora import base_of, load_lora, merge_lora
from ..options.token_rows import add_tokens
from ..training.checkpoint import CheckpointError, PieceReader, read_manifest

WHOLE, LORA, PROJECTOR, STATE = "whole model", "LoRA directory", "projector", "training state"
# Flags whose values a trained part's config.json has.
FIXED = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")


@dataclass
class SavedModel:
    """A directory that holds a model, and what using it takes; no weight is read yet.

    Attributes:
        kind: WHOLE, LORA, PROJECTOR or STATE.
        config: its `config.json`.
        source: of the weights that the directory does not have; of a whole model, the directory itself.
        template: the conversation template, image tokens included.
        version_is_known: whether the directory, or the caller, names the template.
        tower_is_own: whether the tower's weights differ from those of the tower's name.
        inside_llava: whether it has adapters that PEFT saved on transformers' LLaVA; `config` is that of their base.
    """

    directory: str
    kind: str
    config: dict
    source: Source
    tokenizer: PreTrainedTokenizerBase
    added_tokens: int
    version: str
    template: Template
    version_is_known: bool
    tower_is_own: bool
    inside_llava: bool = False

    def load(self, dtype: torch.dtype | None = None, merged: bool = True) -> LlavaModel:
        """Return the whole model on the CPU, adapters merged, ready to generate; dtype None: that of the base.

        merged: False leaves adapters beside the base in its stored dtype, in fp32, as is everything else.
        """
        dtype = dtype or self.stored_dtype()
        # Adapters are added to the base in its stored dtype, so that the sum is rounded once.
        language_dtype = self.stored_dtype() if self.kind == LORA else dtype
        dtypes = {"language_model": language_dtype, "vision_tower": dtype, "projector": torch.float32}
        own_projector = self.directory if self.kind in (PROJECTOR, STATE) else None
        marks = self.image_tokens()
        model = load_llava(self.source, None, dtypes, own_projector, None, marks[0])
        if self.kind == LORA:
            load_lora(model, self.directory, torch.float32)
            if not merged:
                return model
            merge_lora(model, dtype)
        else:
            rows = self.directory if self.kind == PROJECTOR and marks[0] else None
            add_token_rows(model, self.tokenizer, self.added_tokens, marks, rows)
        if self.kind == STATE:
            _read_trained(Path(self.directory), model)
        return model.to(dtype).requires_grad_(False).eval()

    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of the language model's weights, in the directory or in the base."""
        if tensors := self.source.stored.get("language_model"):
            return next(iter(tensors.values())).tensor.dtype
        return self.source.language_config.dtype or torch.float32

    def image_aspect_ratio(self) -> str:
        """Return the `--image_aspect_ratio` of the training: `pad`, `square` or `anyres`."""
        if self.kind == WHOLE or self.inside_llava or self.source.merge_type:
            return self.source.image_aspect_ratio()
        return self.config.get("image_aspect_ratio", "square")

    def model_max_length(self) -> int:
        """Return the longest sample in tokens, as the directory or the base says."""
        return self.config.get("tokenizer_model_max_length") or self.source.model_max_length(self.tokenizer)

    def describe(self) -> str:
        """Return sentences about what was opened."""
        text = self.source.describe()
        if self.kind != WHOLE:
            text = f"{self.directory} is a {self.kind}; the rest of the model comes from {self.source.name}."
        if not self.version_is_known:
            text += " It does not say which conversation template it was trained with, so v1 is used (--version)."
        return text

    def image_tokens(self) -> tuple[bool, bool]:
        """Return whether it has LLaVA's tokens around an image, and its patch token."""
        return tuple(bool(self.config.get(key)) for key in IMAGE_TOKEN_FLAGS)


def open_saved(
    directory: str, base: str | None = None, vision_tower: str | None = None, version: str | None = None
) -> SavedModel:
    """Find out what a directory or hub name holds, and check it.

    Args:
        base: the language or LLaVA model that a trained part belongs to, instead of the recorded one.
        vision_tower: the tower, instead of the recorded one.
        version: the conversation template, instead of the recorded one.

    Raises:
        UserError: the directory holds no LLaVA model, or what it holds does not fit together.
        OSError: a directory or file is missing.
    """
    check_saved_place(directory, base, vision_tower)
    kind, config = _kind(directory), read_json(directory, "config.json")
    inside_llava = kind == LORA and is_inside_llava(directory)
    if inside_llava:  # PEFT says nothing of the model, and the adapters change nothing of what its base says
        config = read_json(base or base_of(directory), "config.json")
    if not config:
        raise FileNotFoundError(f"{directory} has no config.json, which says how the {kind} belongs to its base.")
    own = kind == WHOLE
    if own and layout_of(directory, config) == "language_model":
        raise UserError(f"{directory} is a language model ({config.get('model_type')}), not a LLaVA model.")
    if own and base:
        raise UserError(f"{directory} is a whole model: --model_base {base} has no part in it.")
    flags = ModelArguments(model_name_or_path=directory if own else base or _recorded_base(directory, kind, config))
    flags.vision_tower = vision_tower or (None if own else config.get("mm_vision_tower"))
    flags.image_size = None if own else config.get("mm_image_size")
    explicit = {"vision_tower"} if vision_tower else set()
    if not own:
        for name in FIXED:
            setattr(flags, name, config.get(name, getattr(flags, name)))
        explicit |= config.keys() & set(FIXED)
    try:
        source = open_source(flags, explicit)
    except OSError as error:
        if own:
            raise
        raise OSError(
            f"{directory} is a {kind} of {flags.model_name_or_path} with the vision tower {flags.vision_tower}. One of "
            f"them cannot be read: {error} Give their places as --model_base and --vision_tower."
        ) from error
    if inside_llava and source.layout == "language_model":
        raise UserError(f"{directory} has adapters of a whole LLaVA model, and {source.name} is a language model.")
    if not own and not inside_llava:
        source.merge_type, source.pinpoints, source.max_tiles = tiles_in(directory, config)

    has_tokenizer = find_file(directory, "tokenizer_config.json") is not None
    tokenizer = load_tokenizer(directory if has_tokenizer else source.name)
    known, version = len(tokenizer), version or config.get("conversation_version")
    if kind == STATE and not has_tokenizer:
        add_tokens(tokenizer, read_manifest(Path(directory))["arguments"].get("add_tokens"))
    template = find_template(version or "v1", tokenizer)
    template = add_image_tokens(tokenizer, template, *(bool(config.get(key)) for key in IMAGE_TOKEN_FLAGS))
    added = len(tokenizer) - known
    if not own:
        added = max(added, missing_rows(tokenizer, source.language_config))
    return SavedModel(
        directory=directory,
        kind=kind,
        config=config,
        source=source,
        tokenizer=tokenizer,
        added_tokens=added,
        version=version or "v1",
        template=template,
        version_is_known=bool(version),
        tower_is_own="vision_tower" in source.stored or _tower_was_trained(directory, kind, config),
        inside_llava=inside_llava,
    )


def _kind(directory: str) -> str:
    if find_file(directory, ADAPTER_CONFIG):
        return LORA
    if (Path(directory) / "manifest.json").is_file():
        trained = read_manifest(Path(directory))["parameters"]
        with_projector = ("projector.", "new_tokens.", "image_newline.")
        return PROJECTOR if all(name.startswith(with_projector) for name in trained) else STATE
    if any(find_file(directory, name) for name in WEIGHT_FILES):
        return WHOLE
    if find_file(directory, PROJECTOR_FILE) and find_file(directory, "config.json"):
        return PROJECTOR
    states = sorted(path.parent.name for path in Path(directory).glob("checkpoint-*/manifest.json"))
    raise FileNotFoundError(
        f"{directory} holds no model: neither weights ({WEIGHT_FILES[1]}, ...) nor {ADAPTER_CONFIG} nor "
        f"{PROJECTOR_FILE} with its config.json."
        + (f" It holds training states: name one of {', '.join(states)} inside it." if states else "")
    )


def _recorded_base(directory: str, kind: str, config: dict) -> str:
    """Return the base that a trained part names."""
    if kind == LORA:
        return base_of(directory)
    if (Path(directory) / "manifest.json").is_file():
        return read_manifest(Path(directory))["arguments"]["model_name_or_path"]
    if name := config.get("_name_or_path"):
        return name
    raise UserError(f"{directory} is a {kind}, and its config.json does not say of which model: give --model_base.")


def _tower_was_trained(directory: str, kind: str, config: dict) -> bool:
    if kind == STATE:
        return any(name.startswith("vision_tower.") for name in read_manifest(Path(directory))["parameters"])
    return kind == LORA and bool(config.get("unfreeze_mm_vision_tower"))


@torch.no_grad()
def _read_trained(directory: Path, model: LlavaModel) -> None:
    """Fill the trained parameters of the base of a run with a checkpoint's masters. Raises CheckpointError.

    Sizes of the files are compared, checksums are not.
    """
    manifest = read_manifest(directory)
    reader, parameters = PieceReader(directory, manifest), dict(model.named_parameters())
    for name, shape in manifest["parameters"].items():
        mine = list(parameters[name].shape) if name in parameters else "not there"
        if mine != shape:
            raise CheckpointError(f"{directory} has trained {name} {shape}, which in its base is {mine}: another base.")
    for name, shape in manifest["parameters"].items():
        master = torch.empty(parameters[name].numel(), dtype=torch.float32)
        reader.copy_into(master, name)
        parameters[name].copy_(master.view(shape))
