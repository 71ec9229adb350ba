"""Attention of one packed 7B layer, forward and backward, by every kernel that is there: time and distance to fp32.

    python benchmarks/attention.py

13,400 tokens in samples of 616 to 1,976 with 32 heads of 128, as one micro-batch of LLaVA-1.5 has them.
"""

import statistics
import time

import torch
from torch.nn.attention.varlen import varlen_attn

HEADS, HEAD_SIZE = 32, 128
LENGTHS = [616, 640, 655, 680, 700, 720, 740, 760, 780, 810, 850, 900, 980, 1100, 1193, 1276]


def flash_2(query, key, value, bounds):
    longest = max(LENGTHS)
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0))


def flash_2_package(query, key, value, bounds):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, bounds, bounds, max(LENGTHS), max(LENGTHS), causal=True)


def flash_4_package(query, key, value, bounds):
    from flash_attn.cute import flash_attn_varlen_func

    packing = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS))
    output = flash_attn_varlen_func(query, key, value, **packing, causal=True)
    return output[0] if isinstance(output, tuple) else output


def by_sample(query, key, value, bounds):
    """fp32 mathematics, one sample after the other."""
    pieces = []
    for q, k, v in zip(*(tensor.split(LENGTHS) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(pieces)


def outputs(function, tensors, bounds, gradient):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*tensors, bounds)
    output.backward(gradient.to(output.dtype))
    return torch.cat([output.float().flatten()] + [tensor.grad.float().flatten() for tensor in tensors])


def milliseconds(run, repeats: int = 10) -> float:
    """Median of the time on the device (on a CPU: of the call)."""
    times = []
    for _ in range(3 + repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


def main() -> None:
    torch.manual_seed(0)
    shape = (sum(LENGTHS), HEADS, HEAD_SIZE)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    reference = outputs(by_sample, [tensor.float() for tensor in tensors], bounds, gradient)
    # 2 products of L x L x width forward, half of them masked; 2.5 times as much backward.
    flops = 2 * sum(length**2 for length in LENGTHS) * HEADS * HEAD_SIZE
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    for function in (flash_2, flash_2_package, flash_4_package):
        try:
            difference = (outputs(function, tensors, bounds, gradient) - reference).norm() / reference.norm()
            forward = milliseconds(lambda function=function: function(*tensors, bounds))
            both = milliseconds(lambda function=function: outputs_only(function, tensors, bounds, gradient))
        except (RuntimeError, ImportError) as error:
            print(f"{function.__name__}: {str(error).splitlines()[0]}")
            continue
        print(
            f"{function.__name__}: forward {forward:.2f} ms ({flops / forward / 1e9:.0f} TFLOP/s), "
            f"forward and backward {both:.2f} ms ({3.5 * flops / both / 1e9:.0f}), distance to fp32 {difference:.1e}"
        )


def outputs_only(function, tensors, bounds, gradient):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    function(*tensors, bounds).backward(gradient)


if __name__ == "__main__":
    main()
