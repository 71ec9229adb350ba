"""Stands in for the package flash-attn by the FlashAttention 2 kernels that PyTorch holds (`varlen_attn`).

`against_llama_factory.py` puts this file in the package's place where that is not installed: what transformers calls in
training, with the package's own names. Without a GPU each sequence goes through SDPA, so that it can be tested.
"""

import inspect
import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

__version__ = "2.8.3"


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """Attention of [batch, length, heads, width], in that shape."""
    _refuse(dropout_p, window_size, softcap, deterministic)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, **grouped).transpose(1, 2)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """Attention of [tokens, heads, width], in that shape, within the sequences that int32 `cu_seqlens` bound."""
    _refuse(dropout_p, window_size, softcap, deterministic)
    if not q.is_cuda:
        bounds = cu_seqlens_q.tolist()
        parts = [[tensor[None, a:b] for tensor in (q, k, v)] for a, b in itertools.pairwise(bounds)]
        return torch.cat([flash_attn_func(*part, softmax_scale=softmax_scale, causal=causal)[0] for part in parts])
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11 and before
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    window = (-1, 0) if causal else (-1, -1)
    limits = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    return varlen_attn(q, k, v, *limits, scale=softmax_scale, window_size=window, **grouped)


def flash_attn_with_kvcache(*_, **__):
    raise NotImplementedError("For training alone.")


def _refuse(dropout_p: float, window_size: tuple[int, int], softcap: float, deterministic: bool) -> None:
    if dropout_p or tuple(window_size) != (-1, -1) or softcap or deterministic:
        raise NotImplementedError(
            "No dropout, window, softcap or fixed order here: PyTorch's kernel is not asked for one."
        )


def distance_to_fp32(device: str, heads: int = 14, key_heads: int = 2, width: int = 64) -> float:
    """The largest relative distance of output and gradients in bf16 to SDPA in fp32, for four packed sequences."""
    torch.manual_seed(0)
    lengths = [300, 17, 1000, 683]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    shapes = [(sum(lengths), count, width) for count in (heads, key_heads, key_heads)]
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], device=device)
    output = flash_attn_varlen_func(*tensors, bounds, bounds, max(lengths), max(lengths), causal=True)
    got = [output, *torch.autograd.grad((output * weight).sum(), tensors)]
    exact = [tensor.float()[None].transpose(1, 2).split(lengths, dim=2) for tensor in tensors]
    parts = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in zip(*exact, strict=True)]
    output = torch.cat(parts, dim=2).transpose(1, 2)[0]
    wanted = [output, *torch.autograd.grad((output * weight).sum(), tensors)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


if __name__ == "__main__":
    machine = "cuda" if torch.cuda.is_available() else "cpu"
    distance = max(distance_to_fp32(machine), distance_to_fp32(machine, 4, 4, 128))
    print(f"PyTorch's kernel in flash-attn's place: at most {distance:.4f} from fp32")
    if not distance < 0.02:
        raise SystemExit("That is too far: its figures would mean nothing.")
