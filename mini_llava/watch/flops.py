"""Operations that a step needs, and the peak of the GPU: the two sides of MFU.

Counted are the necessary matrix products, from the parameters' shapes and the samples' lengths: not padding, blank
images, recomputed activations or unused logits.
"""

import copy
import functools

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.collator import MicroBatch
from ..data.lengths import Lengths
from ..model.llava import LlavaModel
from ..model.trained import numel
from ..model.vision_tower import VisionTower, empty_model, has_layers

# Dense half-precision operations a second (without sparsity), from the data sheets, by a part of the GPU's name.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def peak_flops(accelerator: Accelerator) -> float | None:
    """Return the peak of one device in half precision, operations a second; None if unknown (CPU, fp32)."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(accelerator.device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class FlopCounter:
    """Counts operations (a multiplication and an addition are two) of forward and backward for one micro-batch.

    For each position a weight costs 2 in forward, 2 in backward if gradients pass it to something trained, and 2 more
    if it is trained: 6 for what is trained, 4 for a frozen language model (behind a trained projector, or under
    adapters), 2 for a frozen tower. Attention is counted within each sample, causal in the language model.

    Attributes:
        language_model_parameters: N of the usual approximation 6 N.
        peak: of one device, operations a second; None if unknown.
    """

    def __init__(self, model: LlavaModel, peak: float | None = None):
        self.peak = peak
        tower, projector, language_model = model.vision_tower, model.projector, model.language_model
        head = language_model.get_output_embeddings().weight
        text = language_model.config.get_text_config()
        self.language_model_parameters = sum(numel(parameter) for parameter in language_model.parameters())

        self.per_logit = _flops(head, 4)
        self.per_token = sum(_flops(weight, 4) for weight in _matrices(language_model).values() if weight is not head)
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # 2 products of L x L x width, half of them masked; backward costs twice as much as forward.
        self.per_squared_length = 3 * 2 * text.num_attention_heads * head_size * text.num_hidden_layers

        self._tower, self._tower_is_trained = tower, any(weight.requires_grad for weight in tower.parameters())
        self._projector = tower.tokens_per_image * sum(_flops(weight, 2) for weight in _matrices(projector).values())

    @functools.cached_property
    def per_image(self) -> int:
        """The operations for one image or tile. The tower runs on meta tensors for it, once, where it is asked for."""
        return (3 if self._tower_is_trained else 1) * _tower_flops(self._tower) + self._projector

    def __call__(self, batch: MicroBatch) -> float:
        """Return the operations for a micro-batch of `collate` on the CPU."""
        if batch["cu_seqlens"] is not None:
            lengths = batch["cu_seqlens"].diff().double()
        else:
            lengths = batch["attention_mask"].sum(dim=1).double()
        images = len(batch["pixel_values"]) if batch["image_positions"].numel() else 0  # or tiles of images
        logits = int((batch["targets"] >= 0).sum())
        return self._sum(lengths.sum().item(), lengths.square().sum().item(), logits, images)

    def of_lengths(self, lengths: Lengths) -> float:
        """Return the operations for all records once."""
        length = lengths.length.astype(float)
        return self._sum(length.sum(), (length**2).sum(), lengths.trained.sum(), lengths.pictures.sum())

    def _sum(self, tokens: float, squared_lengths: float, logits: float, images: float) -> float:
        return (
            self.per_token * tokens
            + self.per_squared_length * squared_lengths
            + self.per_logit * logits
            + self.per_image * images
        )


def _tower_flops(tower: VisionTower) -> int:
    """Return the operations of a forward for one image up to the selected layer, counted by torch on meta tensors."""
    config = copy.deepcopy(tower.model.config)
    if has_layers(config):
        config.num_hidden_layers = tower.select_layer % (config.num_hidden_layers + 1)
    blank = torch.empty(1, 3, tower.image_size, tower.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty_model(config)(blank)
    return counter.get_total_flops()


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of matrix products and convolutions, by name: no norms and no embedding tables."""
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in tables
    }


def _flops(weight: nn.Parameter, frozen: int) -> int:
    return (6 if weight.requires_grad else frozen) * numel(weight)
