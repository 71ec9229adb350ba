"""Liger's fused GPU kernels in a language model of transformers: RMSNorm, rotary embeddings and SwiGLU.

They read and write each activation once where PyTorch does so several times, and keep fewer of them for backward.
Liger's losses stay off: the model computes logits for trained positions only (see `llava.py`).
"""

import importlib.util
import logging

import torch
from transformers import PreTrainedModel

# Model types whose losses and gradients with and without the kernels were compared (tests/model/test_fused_kernels.py).
FUSABLE = ("llama", "mistral", "qwen2", "qwen3")


def choose_fused_kernels(requested: bool | None, model_type: str, device: torch.device) -> bool:
    """Whether to use the kernels: as asked, and if nothing was asked wherever they run.

    Raises:
        ValueError: they were asked for and cannot run here.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if requested is None:
        return installed and device.type == "cuda" and model_type in FUSABLE
    if requested and not installed:
        raise ValueError("--use_liger_kernel True: the package is not installed; pip install liger-kernel.")
    if requested and device.type != "cuda":
        raise ValueError(f"--use_liger_kernel True: the kernels need a GPU, this process computes on {device.type}.")
    if requested and model_type not in FUSABLE:
        raise ValueError(
            f"--use_liger_kernel True: known for models of type {', '.join(FUSABLE)}, but this one is {model_type!r}."
        )
    return bool(requested)


def use_fused_kernels(language_model: PreTrainedModel) -> None:
    """Replaces the forward of norms and MLPs in this model, and the rotary embedding of its family, in this process.

    Parameters and their names stay what they are. Works on a model that ZeRO-3 has partitioned.
    """
    import liger_kernel.transformers as liger

    # It warns of every backend for other vendors' devices that is not installed.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    apply = getattr(liger, f"apply_liger_kernel_to_{language_model.config.model_type}")
    kernels = dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    apply(model=language_model, **kernels)
