"""Causal attention inside each sample of a packed row, by kernels for sequences of varying length.

transformers calls it by the name `varlen` (registered in `options/attention.py`). FlashAttention 4 computes it
where that is installed, torch's own kernel elsewhere.
"""

import functools
import importlib.util
import inspect
import warnings

import torch
from torch.nn.attention.varlen import varlen_attn

from ..errors import UserError


def varlen_attention(  # pragma: no cover, needs a GPU
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options,
) -> tuple[torch.Tensor, None]:
    """Return the attention output, called as transformers calls its attention functions.

    Args:
        query: [1, heads, L, head size], bf16 or fp16; key and value may have fewer heads.
        options: `cu_seq_lens_q`, int32 [samples + 1], bounds of the samples; `max_length_q`, the length of the longest
            sample, known on the host so that nothing waits for the device; `scaling`, `dropout`, `sliding_window`.

    Returns:
        [1, L, heads, head size], and no attention weights.
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None:
        raise RuntimeError("The varlen attention runs on packed batches only; generate with sdpa instead.")
    if options.get("dropout"):
        raise UserError("The varlen attention has no dropout: set attention_dropout to 0 or use sdpa.")
    # Rotary embeddings may have left queries and keys in fp32; the kernels take half precision only.
    tensors = [tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    longest, window = options["max_length_q"], options.get("sliding_window")
    if _has_flash_4():
        from flash_attn.cute import flash_attn_varlen_func

        limits = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest)
        windowed = {"window_size": (window - 1, 0)} if window else {}
        output = flash_attn_varlen_func(
            *tensors, **limits, softmax_scale=options.get("scaling"), causal=True, **windowed
        )
        # Some versions return the log-sum-exp of each row too.
        return (output[0] if isinstance(output, tuple) else output).unsqueeze(0), None

    query, key, value = tensors
    grouped = {}
    if key.shape[1] != query.shape[1]:
        if torch_groups_heads():
            grouped = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    window_size = (window - 1 if window else -1, 0)
    limits = (bounds, bounds, longest, longest)
    output = varlen_attn(query, key, value, *limits, scale=options.get("scaling"), window_size=window_size, **grouped)
    return output.unsqueeze(0), None


@functools.cache
def torch_groups_heads() -> bool:
    """Return whether torch's kernel takes fewer heads of keys than of queries; up to torch 2.11 they are repeated."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_4_is_installed() -> bool:
    """Return whether the package flash-attn-4 is there; that the GPU can run it is another question."""
    return all(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn.cute"))


@functools.cache
def _has_flash_4() -> bool:  # pragma: no cover, needs a GPU
    """Return whether flash-attn-4, written for Hopper and Blackwell, can be used: 1.6 times as fast as torch's."""
    if not flash_4_is_installed():
        return False
    # Its compiler warns about one of its own arguments at every new kernel, in the middle of the progress line.
    warnings.filterwarnings("ignore", message=".* cannot be converted to a JitArgument")
    return torch.cuda.get_device_capability()[0] in (9, 10)
