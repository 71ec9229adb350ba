"""Attention for packed batches: which implementation runs here, and torch's variable-length kernel for transformers.

A packed row holds several samples, and attention must never cross their bounds. These keep them apart:
`flash_attention_2` where its package is installed; `varlen`, registered here, on any recent GPU, with FlashAttention 4
where that is installed and torch's own kernel elsewhere; `sdpa` everywhere else, for which transformers builds a
block-diagonal mask from the restarting positions (a mask of L x L, so it is meant for CPUs and short rows).
"""

import functools
import importlib.util
import inspect
import warnings

import torch
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

# Families whose packed logits were compared with the unpacked ones; others (OPT, MPT) ignore the bounds without a word.
PACKABLE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# They cap attention scores, which torch's kernels cannot.
CAPPED = ("gemma2",)


def choose_attention(
    requested: str | None, model_type: str, packing: bool, device: torch.device, half_precision: bool
) -> str | None:
    """The `attn_implementation` to load the language model with; None: what transformers takes for this family.

    Raises:
        ValueError: the request cannot run here, or this family of models cannot be packed.
    """
    if packing and model_type not in PACKABLE:
        raise ValueError(
            f"Packing is not known to keep samples apart in models of type {model_type!r} (it is for "
            f"{', '.join(PACKABLE)}): use --packing False."
        )
    on_gpu = device.type == "cuda" and half_precision
    if requested is None:
        if not packing:
            return None
        if not on_gpu:
            return "eager" if model_type in CAPPED else "sdpa"
        if model_type in CAPPED and not is_flash_attn_2_available():
            raise ValueError(
                f"To pack samples for models of type {model_type!r} on a GPU takes the package flash-attn: torch's "
                f"kernels cannot cap attention scores, and eager attention would hold those of a whole row. Install it "
                f"or use --packing False."
            )
        return "flash_attention_2" if is_flash_attn_2_available() else "varlen"
    if requested in ("sdpa", "varlen") and model_type in CAPPED:
        raise ValueError(
            f"--attn_implementation {requested} cannot cap attention scores as models of type {model_type!r} do: use "
            f"eager or flash_attention_2."
        )
    check_flash_attention(requested)
    if requested in ("flash_attention_2", "varlen") and not on_gpu:
        raise ValueError(f"--attn_implementation {requested} needs a GPU and --bf16 True or --fp16 True.")
    if requested == "varlen" and not packing:
        raise ValueError("--attn_implementation varlen is for packed batches: use --packing True or sdpa.")
    return requested


def check_flash_attention(requested: str | None) -> None:
    """Raises ValueError if FlashAttention 2 is asked for and not installed."""
    if requested == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("--attn_implementation flash_attention_2: the package flash-attn is not installed.")


def varlen_attention(  # pragma: no cover, needs a GPU
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample of a packed row, with transformers' signature.

    Args:
        query: [1, heads, L, head size], bf16 or fp16; key and value may have fewer heads.
        cu_seq_lens_q: int32 [samples + 1], bounds of the samples.
        max_length_q: the longest sample; known on the host, so that nothing waits for the device.

    Returns:
        [1, L, heads, head size], and no attention weights.
    """
    if cu_seq_lens_q is None:
        raise RuntimeError("The varlen attention runs on packed batches only; generate with sdpa instead.")
    if dropout:
        raise ValueError("The varlen attention has no dropout: set attention_dropout to 0 or use sdpa.")
    # Rotary embeddings may have left queries and keys in fp32; the kernels take half precision only.
    tensors = [tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    kernel = _flash_4 if _has_flash_4() else _flash_2
    window = None if sliding_window is None else sliding_window - 1
    return kernel(*tensors, cu_seq_lens_q, max_length_q, scaling, window).unsqueeze(0), None


@functools.cache
def _has_flash_4() -> bool:  # pragma: no cover, needs a GPU
    """Whether flash-attn-4, which is written for Hopper and Blackwell, is there: 1.6 times as fast as torch's."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return False
    # Its compiler remarks on an argument of its own, at every new kernel, in the middle of the progress line.
    warnings.filterwarnings("ignore", message=".* cannot be converted to a JitArgument")
    return torch.cuda.get_device_capability()[0] in (9, 10)


def _flash_4(query, key, value, bounds, longest, scaling, window) -> torch.Tensor:  # pragma: no cover, needs a GPU
    from flash_attn.cute import flash_attn_varlen_func

    bounds = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest)
    windowed = {} if window is None else {"window_size": (window, 0)}
    output = flash_attn_varlen_func(query, key, value, **bounds, softmax_scale=scaling, causal=True, **windowed)
    return output[0] if isinstance(output, tuple) else output  # some versions give the sums of the rows as well


def _flash_2(query, key, value, bounds, longest, scaling, window) -> torch.Tensor:  # pragma: no cover, needs a GPU
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11 and before
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    window = (-1 if window is None else window, 0)
    limits = (bounds, bounds, longest, longest)
    return varlen_attn(query, key, value, *limits, scale=scaling, window_size=window, **grouped)


AttentionInterface.register("varlen", varlen_attention)
