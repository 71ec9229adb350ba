"""One decoder layer of Llama 7B in bf16 and in float8, and its parts: products, casts, time, memory, distance.

    python benchmarks/float8_layers.py                    # on a GPU that multiplies float8; under a minute
    python benchmarks/float8_layers.py --device cpu --positions 100 --hidden 64 --intermediate 176    # that it runs

18,500 packed positions, what a micro-batch of LLaVA-1.5 on an H200 has. bf16 is with the memory savers of `kernels.py`
(and Liger's kernels where they are installed), as the trainer runs it.
"""

import argparse
import copy
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attention import milliseconds  # noqa: E402
from mini_llava.options import float8  # noqa: E402
from mini_llava.options.attention import choose_attention  # noqa: E402
from mini_llava.options.float8 import GRADIENT, VALUE  # noqa: E402
from mini_llava.options.kernels import (  # noqa: E402
    forget_outputs_of_norms,
    make_mlps_keep_less,
    use_fused_kernels,
)

LAYERS = 32


def check_kernels(device: torch.device, rows: int = 1000) -> None:
    """Compare the kernels with the same in plain torch, on the CPU, for matrices of so many rows."""
    torch.manual_seed(0)
    x = [torch.randn(rows, 208).bfloat16(), 3 * torch.randn(rows, 96).bfloat16()]
    weights = [torch.randn(48, 208), torch.randn(32, 208)]
    inner, gradient = torch.randn(rows, 352).bfloat16(), torch.randn(rows, 176).bfloat16()

    def results(device):
        found = {str(t): float8.quantise([m.to(device) for m in x], t, dim=1, columns=True) for t in (VALUE, GRADIENT)}
        found["weights"] = float8.quantise([m.to(device) for m in weights], VALUE, columns=True)
        found["swiglu"] = float8.swiglu(inner.to(device))
        scale = found["swiglu"].scale
        found["swiglu backward"], product = float8.swiglu_backward(inner.to(device), gradient.to(device), scale, True)
        return found | {"product": [product]}

    mine, plain = results(device), results(torch.device("cpu"))
    matrices = {str(VALUE): torch.cat(x, 1), str(GRADIENT): torch.cat(x, 1), "weights": torch.cat(weights)}
    for name, matrix in matrices.items():
        check_nearest(matrix, mine.pop(name), plain.pop(name).scale)
    for name in plain:
        for got, expected in zip(mine[name], plain[name], strict=True):
            if expected is None:
                continue
            got, expected = got.cpu().float(), expected.float()
            if got.dim() == 0:  # a scale, whose division may round the last bit another way
                assert abs(got - expected) <= 2.0**-22 * expected, name
                continue
            different = (got != expected).sum().item()
            # The exponentials of SwiGLU are others: a value between two of float8 may go to either.
            assert different <= 1 + 0.01 * got.numel(), (name, different)
            assert ((got - expected).abs() <= expected.abs() / 4 + 1e-6 * expected.abs().max()).all(), name
    print("The kernels give what plain torch gives.\n")


def check_nearest(matrix: torch.Tensor, got: float8.Float8, expected_scale: torch.Tensor) -> None:
    """Compare both copies with the values divided by the scale, of which they must be the nearest in float8.

    Not value by value with another device's: a scale whose last bit is another one moves all that lie between two.
    """
    scale = got.scale.double().cpu()
    assert abs(scale - expected_scale) <= 2.0**-22 * expected_scale
    exact = matrix.double() / scale
    columns = got.columns.cpu().float().t()
    assert not columns[len(matrix) :].any()
    for which, values in (("rows", got.rows.cpu().float()), ("columns", columns[: len(matrix)])):
        error, least = (values - exact).abs(), (exact.float().to(got.rows.dtype).float() - exact).abs()
        assert (error <= least + 2.0**-20 * exact.abs()).all(), which


def product_rates(positions: int, hidden: int, intermediate: int, device: torch.device) -> None:
    """Print how fast each product of a layer is."""
    padded = -(-positions // 16) * 16
    products = {  # [M, K] x [K, N]: M, N, K, and whether the left one is a gradient
        "q, k, v, o": (positions, hidden, hidden, False),
        "gate and up": (positions, 2 * intermediate, hidden, False),
        "down": (positions, hidden, intermediate, False),
        "dx of q, k, v": (positions, hidden, 3 * hidden, True),
        "dx of o": (positions, hidden, hidden, True),
        "dx of gate and up": (positions, hidden, 2 * intermediate, True),
        "dx of down": (positions, intermediate, hidden, True),
        "dw of q, k, v": (3 * hidden, hidden, padded, True),
        "dw of o": (hidden, hidden, padded, True),
        "dw of gate and up": (2 * intermediate, hidden, padded, True),
        "dw of down": (hidden, intermediate, padded, True),
    }
    print("| product | M | N | K | bf16 | float8, fast sums | float8, exact sums | TFLOP/s\n" + "|---" * 7 + "|")
    one = torch.ones((), device=device)
    for name, (m, n, k, of_gradient) in products.items():
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        times = [milliseconds(lambda left=left, right=right: left @ right.t())]
        left, right = left.to(GRADIENT if of_gradient else VALUE), right.to(VALUE)
        for fast in (True, False):
            run = functools.partial(float8.multiply, (left, one), (right, one), torch.bfloat16, fast)
            times.append(milliseconds(run))
        rates = " | ".join(f"{2 * m * n * k / t / 1e9:.0f} ({t:.2f} ms)" for t in times)
        print(f"| {name} | {m} | {n} | {k} | {rates} |")


def kernel_rates(positions: int, hidden: int, intermediate: int, device: torch.device) -> None:
    """Print how fast the kernels that round are, with the sizes of their programs that might be better ones."""
    x = torch.randn(positions, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(2 * intermediate, hidden, device=device, dtype=torch.bfloat16)
    inner = torch.randn(positions, 2 * intermediate, device=device, dtype=torch.bfloat16)
    gradient = torch.randn(positions, intermediate, device=device, dtype=torch.bfloat16)
    scale, product_scale = float8.largest_scale([x], VALUE), float8.swiglu(inner).scale

    def row(name: str, run: Callable[[], object], read_and_written: float) -> None:
        took = milliseconds(run)
        print(f"| {name} | {took:.3f} ms | {read_and_written / took / 1e6:.0f} GB/s |")

    print("\n| kernel | time | rate |\n" + "|---" * 3 + "|")
    for block in (8192, 16384, 32768):
        float8.LARGEST_BLOCK = block
        row(f"largest, [M, hidden], {block} values", lambda: float8.largest_scale([x], VALUE), 2 * x.numel())
    float8.LARGEST_BLOCK = 16384
    own = float8.CAST_TILE, float8.CAST_WARPS
    for tile, warps in dict.fromkeys((own, (64, 4), (64, 8), (128, 16))):
        float8.CAST_TILE, float8.CAST_WARPS = tile, warps
        for rows, columns in ((True, True), (True, False), (False, True)):
            quantise = functools.partial(float8.quantise, [x], VALUE, 0, scale, rows, columns)
            name = " and ".join(["rows"] * rows + ["columns"] * columns)
            row(
                f"cast, [M, hidden], {name}, {tile} x {tile}, {warps} warps", quantise, (2 + rows + columns) * x.numel()
            )
    float8.CAST_TILE, float8.CAST_WARPS = own
    quantise = functools.partial(float8.quantise, [weight], VALUE, 0, scale, False, True)
    row("cast, weights of gate and up, columns", quantise, 3 * weight.numel())
    own = float8.SWIGLU_ROWS, float8.SWIGLU_COLUMNS, float8.SWIGLU_WARPS
    for sizes in dict.fromkeys((own, (64, 64, 8), (128, 64, 16), (64, 128, 16))):
        float8.SWIGLU_ROWS, float8.SWIGLU_COLUMNS, float8.SWIGLU_WARPS = sizes
        name = "{} x {}, {} warps".format(*sizes)
        row(f"swiglu (both passes), {name}", lambda: float8.swiglu(inner), 4.5 * inner.numel())
        backward = functools.partial(float8.swiglu_backward, inner, gradient, product_scale, True)
        row(f"swiglu backward (both passes), {name}", backward, (4 + 2 + 2 + 0.5) * inner.numel())
    float8.SWIGLU_ROWS, float8.SWIGLU_COLUMNS, float8.SWIGLU_WARPS = own


def packed_layer(positions: int, hidden: int, intermediate: int, device: torch.device) -> tuple:
    """Return a language model of one layer, and the keywords that its layer takes in packed training."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=max(1, hidden // 128), max_position_embeddings=4096,
    )  # fmt: skip
    attention = choose_attention(None, "llama", True, device, half_precision=True)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    pattern, lengths = [616, 640, 655, 680, 700, 720, 740, 760, 780, 810, 850, 900, 980, 1100, 1193, 1276], []
    while (left := positions - sum(lengths)) > 0:
        lengths.append(min(left, pattern[len(lengths) % len(pattern)]))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    embeddings = model.model.rotary_emb(torch.empty(1, dtype=torch.bfloat16, device=device), positions)
    packing = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(lengths), max_length_k=max(lengths))
    return model, dict(position_embeddings=embeddings, position_ids=positions, attention_mask=None, **packing)


def layer_row(name: str, model, keywords: dict, hidden_states: torch.Tensor, gradient: torch.Tensor) -> tuple:
    """Print time and memory of the layer; return milliseconds forward and backward, and all its gradients, fp32."""
    layer, on_gpu, memory = model.model.layers[0], hidden_states.is_cuda, {}

    def forward():
        return layer(hidden_states.detach().requires_grad_(), **keywords)

    def both():
        layer.zero_grad()
        x = hidden_states.detach().requires_grad_()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        output = layer(x, **keywords)
        memory["kept"] = torch.cuda.memory_allocated() - before - output.nbytes if on_gpu else 0
        output.backward(gradient)
        return x

    took_forward, took = milliseconds(forward), milliseconds(both)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    x = both()
    host = 1000 * (time.perf_counter() - begin)  # without waiting for the device
    peak = torch.cuda.max_memory_allocated() - base if on_gpu else 0
    print(
        f"| {name} | {took_forward:.2f} ms | {took - took_forward:.2f} ms | {took:.2f} ms | {host:.1f} ms | "
        f"{memory['kept'] / hidden_states.shape[1]:.0f} | {peak / 2**30:.2f} GiB |"
    )
    return took, [x.grad.float(), *(parameter.grad.float() for parameter in layer.parameters())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--positions", type=int, default=18_500)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11_008)
    flags = parser.parse_args()
    device, shape = torch.device(flags.device), (flags.positions, flags.hidden, flags.intermediate)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {flags.positions} positions\n")
    check_kernels(device)
    product_rates(*shape, device)
    kernel_rates(*shape, device)

    torch.manual_seed(0)
    model, keywords = packed_layer(*shape, device)
    hidden_states = torch.randn(1, flags.positions, flags.hidden, device=device, dtype=torch.bfloat16)
    gradient = torch.randn_like(hidden_states)
    in_float8 = copy.deepcopy(model)
    with_liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    for changed in (model, in_float8):
        if with_liger:
            use_fused_kernels(changed)
        else:
            make_mlps_keep_less(changed, lambda gate, up: torch.nn.functional.silu(gate) * up)
            forget_outputs_of_norms(changed)
    float8.use_float8(in_float8)
    print("\n| layer | forward | backward | both | host | kept, bytes a position | peak |\n" + "|---" * 7 + "|")
    kernels = "Liger's kernels and savers" if with_liger else "savers, without Liger's kernels"
    arguments = keywords, hidden_states, gradient
    bf16, exact = layer_row(f"bf16, {kernels}", model, *arguments)
    float8.FAST_BACKWARD = True
    layer_row("float8, fast sums in backward too", in_float8, *arguments)
    float8.FAST_BACKWARD = False
    both, mine = layer_row(f"float8, {kernels}", in_float8, *arguments)
    distances = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, exact, strict=True)]
    names = ["x", *(name.removesuffix(".weight") for name, _ in model.model.layers[0].named_parameters())]
    print(
        f"\n{bf16 / both:.2f} times as fast; {LAYERS} layers: {LAYERS * (bf16 - both) / 1000:.3f} s a micro-batch less."
    )
    print("Gradients' distance to bf16's: " + ", ".join(f"{n} {d:.3f}" for n, d in zip(names, distances, strict=True)))


if __name__ == "__main__":
    main()
