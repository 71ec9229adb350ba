"""Liger's fused GPU kernels in a language model of transformers: RMSNorm, rotary embeddings and SwiGLU.

They read and write each activation once where PyTorch does so several times, and keep fewer of them for backward.
Liger's losses stay off: the model computes logits for trained positions only (see `llava.py`).
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from .packages import check_liger_kernel
from .zero3 import linear_of_rows

# Model types whose losses and gradients with and without the kernels were compared (tests/model/test_fused_kernels.py).
FUSABLE = ("llama", "mistral", "qwen2", "qwen3")


def choose_fused_kernels(requested: bool | None, model_type: str, device: torch.device) -> bool:
    """Return whether to use the kernels: as requested, by default wherever they run.

    Raises UserError if they are requested and cannot run here.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if requested is None:
        return installed and device.type == "cuda" and model_type in FUSABLE
    check_liger_kernel(requested)
    if requested and device.type != "cuda":
        raise UserError(f"--use_liger_kernel True: the kernels need a GPU, this process computes on {device.type}.")
    if requested and model_type not in FUSABLE:
        raise UserError(
            f"--use_liger_kernel True: known for models of type {', '.join(FUSABLE)}, but this one is {model_type!r}."
        )
    return bool(requested)


def use_fused_kernels(language_model: PreTrainedModel) -> None:  # pragma: no cover, needs a GPU
    """Replace the forward of norms and MLPs in this model, and the rotary embedding of its family, in this process.

    Later models of the family get all three. Parameters and their names do not change. ZeRO-3 may have partitioned it.
    """
    import liger_kernel.transformers as liger

    if torch.version.cuda:  # if FlashAttention 4 is installed, Liger takes kernels that are compiled for each length
        for operation in ("ROPE", "RMS_NORM", "SWIGLU"):
            os.environ.setdefault(f"LIGER_KERNEL_IMPL_{operation}", "nvidia-triton")
    # Liger warns of each missing backend for other vendors' devices.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    apply = getattr(liger, f"apply_liger_kernel_to_{language_model.config.model_type}")
    kernels = dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    apply(model=language_model, **kernels)

    from liger_kernel.transformers.functional import liger_swiglu

    make_mlps_keep_less(language_model, liger_swiglu)
    forget_outputs_of_norms(language_model)


# --- Recomputed in backward instead of kept --------------------------------------------------------------------------


def make_mlps_keep_less(language_model: PreTrainedModel, product: Callable) -> None:
    """Replace the forward of every MLP whose last layer is plain and trained by `gated_mlp`."""
    for module in language_model.modules():
        down = getattr(module, "down_proj", None)
        if type(down) is nn.Linear and down.bias is None and down.weight.requires_grad:
            module.forward = functools.partial(gated_mlp, module, product)


def gated_mlp(mlp: nn.Module, product: Callable, x: torch.Tensor) -> torch.Tensor:
    """Compute a Llama-like MLP without keeping its largest activation for backward.

    Args:
        mlp: has `gate_proj`, `up_proj` and `down_proj`, the last one plain and trained.
        product: (gate, up) -> silu(gate) * up.
    """
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return _DownOfProduct.apply(product, gate, up, mlp.down_proj.weight.to(gate.dtype))


class _DownOfProduct(torch.autograd.Function):
    """`product(gate, up) @ weight.T`. The product, a sixth of what a layer keeps, is recomputed in backward."""

    @staticmethod
    def forward(ctx, product, gate, up, weight):
        ctx.product = product
        ctx.save_for_backward(gate, up, weight)
        return F.linear(product(gate, up), weight)

    @staticmethod
    def backward(ctx, gradient):
        gate, up, weight = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            product = ctx.product(gate, up)
        of_weight = gradient.flatten(0, -2).t() @ product.detach().flatten(0, -2)
        of_gate, of_up = torch.autograd.grad(product, (gate, up), gradient @ weight)
        return None, of_gate, of_up, of_weight


# The norms of a decoder layer, and the linear layers that read the output of each.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def forget_outputs_of_norms(language_model: PreTrainedModel) -> None:
    """Recompute the outputs of the layers' norms, a seventh of what a layer keeps, in backward from their inputs.

    The norms keep their inputs anyway. Only if all readers of a norm are plain and trained: others (LoRA's, frozen
    ones) keep what they need. A decoder layer whose parts are units of ZeRO-3 (see `backend.prepare`) is not changed.
    """
    for layer in language_model.modules():
        for norm, names in READERS.items():
            if not hasattr(layer, norm):
                continue
            norm, readers = getattr(layer, norm), [layer.get_submodule(name) for name in names]
            if all(type(reader) is nn.Linear and reader.weight.requires_grad for reader in readers):
                norm.forward = functools.partial(_forgotten, norm.forward, len(readers))
                for reader in readers:
                    reader.forward = functools.partial(_read, reader)


class _Forgotten:
    """The output of a norm between forward and backward: how to recompute it, and its gradient so far."""

    def __init__(self, norm: Callable, readers: int):
        self.norm, self.readers = norm, readers
        self.output = self.gradient = None

    def again(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.output is None:
            with torch.no_grad():
                self.output = self.norm(hidden)
        return self.output

    def add(self, of_reader: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """Add `of_reader @ weight` to the gradient in one product; return the sum after the last reader."""
        of_reader, shape = of_reader.flatten(0, -2), of_reader.shape[:-1]
        if self.gradient is None:
            self.gradient, self.missing = of_reader @ weight, self.readers  # also in a second backward pass
        else:
            self.gradient.addmm_(of_reader, weight)
        self.missing -= 1
        if self.missing:
            return None
        total, self.gradient, self.output = self.gradient.view(*shape, -1), None, None
        return total


def _forgotten(norm: Callable, readers: int, hidden: torch.Tensor) -> torch.Tensor:
    output = norm(hidden)
    output.forgotten = _Forgotten(norm, readers), hidden.detach()
    return output


def _read(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(x, "forgotten"):  # the hooks of a unit of ZeRO-3 have replaced the tensor
        return linear_of_rows(x, layer.weight, layer.bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return _LinearOfNorm.apply(*x.forgotten, x, layer.weight.to(dtype), bias)


class _LinearOfNorm(torch.autograd.Function):
    """`x @ weight.T + bias` that keeps the norm's input, which checkpointing can drop, instead of x."""

    @staticmethod
    def forward(ctx, forgotten, hidden, x, weight, bias):
        ctx.forgotten = forgotten
        ctx.save_for_backward(hidden, weight)
        return linear_of_rows(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_weight = rows.t() @ ctx.forgotten.again(hidden).flatten(0, -2).to(gradient.dtype)
        of_bias = rows.sum(0) if ctx.needs_input_grad[4] else None
        return None, None, ctx.forgotten.add(gradient, weight), of_weight, of_bias
