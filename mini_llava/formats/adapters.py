"""Adapters by the names that they have in files: on the language model, or inside transformers' LLaVA.

LLaVA's training, and this one, wraps the language model alone: `base_model.model.model.layers.0.…`. PEFT around
`LlavaForConditionalGeneration` has the language model one level deeper, at `model.language_model.` since transformers
4.52 and at `language_model.model.` before, and may have adapted or trained projector and tower beside it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import UserError
from ..model.projector import read_tensors
from .layouts import TRANSFORMERS_NAMES, find_adapter

# PEFT's names count from its own wrapper.
PREFIX = "base_model.model."
OF_ADAPTER = re.compile(r"\.lora_[AB]\.weight$")
INSIDE_LLAVA = re.compile(r"(model\.)?(language_model|multi_modal_projector|vision_tower(?!\.vision_tower))\.")


@dataclass
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        inside_llava: whether the names are those of transformers' LLaVA.
        parts: part of the model -> name in that part, without an adapter's own name -> (key in the file, tensor).
    """

    path: Path
    inside_llava: bool
    parts: dict[str, dict[str, tuple[str, torch.Tensor]]]

    def adapted(self, part: str) -> dict[str, str]:
        """Return the layers of a part that have adapters: name in the part -> name in the file."""
        found = {}
        for name, (key, _) in self.parts[part].items():
            if OF_ADAPTER.search(key):
                found[OF_ADAPTER.sub("", name)] = OF_ADAPTER.sub("", key).removeprefix(PREFIX)
        return found


def is_inside_llava(directory: str | Path) -> bool:
    """Return whether a LoRA directory's names are those of transformers' LLaVA. Raises as `read_adapter` does."""
    path = find_adapter(directory)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return _is_inside_llava(opened.keys())
    return _is_inside_llava(read_tensors(path))


def _is_inside_llava(keys: Iterable[str]) -> bool:
    return any(INSIDE_LLAVA.match(key.removeprefix(PREFIX)) for key in keys)


def read_adapter(directory: str | Path) -> AdapterFile:
    """Return the tensors of a LoRA directory's adapter file. Raises UserError or FileNotFoundError."""
    path = find_adapter(directory)
    tensors = read_tensors(path)
    inside_llava = _is_inside_llava(tensors)
    parts = {part: {} for part in ("language_model", "projector", "vision_tower", "image_newline")}
    for key, tensor in tensors.items():
        name, part = key.removeprefix(PREFIX), "language_model"
        if inside_llava:
            there, part, here = next((rule for rule in TRANSFORMERS_NAMES if name.startswith(rule[0])), (None,) * 3)
            if part is None:
                raise UserError(f"{path} holds {key}, which is no part of transformers' LLaVA.")
            name = here + name.removeprefix(there)
        parts[part][name] = key, tensor
    return AdapterFile(path, inside_llava, parts)


def name_inside_llava(name: str) -> str:
    """Return PEFT's name, on transformers' LLaVA since 4.52, of a language model's module or tensor."""
    return "model.language_model." + name.removeprefix("model.")
