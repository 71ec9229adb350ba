"""Products of the language model's linear layers in float8, on GPUs that multiply it twice as fast as bf16.

Every matrix is rounded with one scale for all of it, taken from its largest magnitude at each use ("tensorwise,
dynamic"): e4m3 (3 bits of mantissa) for inputs and weights, e5m2 (2 bits, wider range) for gradients (Micikevicius et
al. 2022, "FP8 formats for deep learning"). Products are summed and returned in higher precision: each of their terms is
off by some 4 %, independently, so the sum is off by 4 % of a random sum's size. What stays in higher precision:

- the head and the embeddings: an error of a logit is one of the loss, and is not averaged out by layers behind;
- norms, rotary embeddings, attention, residuals: they are not matrices times weights, and errors in the residual stream
  would reach all layers;
- the vision tower and the projector: little arithmetic, so nothing to gain;
- LoRA's adapters: their products are too short to gain anything. The frozen layers beside them compute in float8.

Masters, gradients of weights and the optimizer keep their dtypes. Without gradients (evaluation, generation) the
layers compute as they did before: that is the model which gets saved, and a single row of float8 would be slower.

GPUs take both operands of a float8 product with the summed dimension contiguous, so backward needs transposed copies.
What is quantised together, because the same layers read it or the same product sums it, is one matrix with one scale:
weights of q, k, v on top of each other, their gradients beside each other, gate and up alike. The kernels are Triton's;
the same in plain torch runs on CPUs, for tests.

Backward rounds inputs and weights again, with the scales of forward, and keeps what bf16 with `kernels.py` keeps.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..errors import UserError
from .kernels import FUSABLE, READERS

VALUE, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
# Fast: the tensor cores' own sums, which have some 14 bits on Hopper. Otherwise cuBLAS adds them up in fp32 every few
# steps, which is slower; gradients, which have passed many layers, and go on to more, get that.
FAST_FORWARD, FAST_BACKWARD = True, False
# A matrix of zeros gets the scale of this, so that nothing is divided by 0.
SMALLEST = 2.0**-100


def check_float8(requested: bool) -> None:
    """Raise UserError if float8 is asked for and the GPUs here have none."""
    if not requested or not torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise UserError("--fp8 True: needs an NVIDIA GPU, other vendors' have other formats.")
    if torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            f"--fp8 True: {torch.cuda.get_device_name()} does not multiply float8; GPUs of compute capability 8.9 "
            "(Ada) and 9.0 (Hopper) or later do."
        )


def choose_float8(requested: bool, model_type: str, device: torch.device) -> bool:
    """Return whether to compute in float8: if it was asked for. Raises UserError if it was and cannot run here."""
    check_float8(requested)
    if requested and device.type != "cuda":
        raise UserError(f"--fp8 True: float8 needs a GPU, this process computes on {device.type}.")
    if requested and model_type not in FUSABLE:
        raise UserError(f"--fp8 True: known for models of type {', '.join(FUSABLE)}, but this one is {model_type!r}.")
    if requested:
        check_copies(device)
    return requested


def check_copies(device: torch.device) -> None:
    """Raise UserError if the compiler here gives the transposed copy of a matrix other values than the one by rows.

    ptxas 12.9 did on Hopper, in a quarter of the values (triton-lang/triton issue 11111); see `_write_columns`.
    """
    numbers, pairs = torch.Generator(device).manual_seed(0), []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(256, 208, generator=numbers, device=device, dtype=dtype)
        pairs += [quantise([matrix], to, columns=True) for to in (VALUE, GRADIENT)]
    inner, gradient = matrix.bfloat16(), matrix[:, :104].bfloat16().contiguous()
    pairs.append(swiglu_backward(inner, gradient, swiglu(inner).scale, columns=True)[0])
    for rows, columns, _ in pairs:
        if not torch.equal(rows.view(torch.uint8).t(), columns.view(torch.uint8)):
            raise UserError(
                f"--fp8 True: Triton {triton.__version__} compiles options/float8.py wrongly for this GPU: transposed "
                "copies differ from the ones by rows. Leave out --fp8, or try another version of Triton."
            )


def use_float8(language_model: PreTrainedModel) -> None:
    """Replace the forward of all linear layers but the head, of MLPs, and of the norms in front of them.

    Comes after adapters and `use_fused_kernels`. Parameters and their names stay what they are. Works on a model that
    ZeRO-3 has partitioned.

    Raises:
        UserError: the model has no such layer that is not quantised.
    """
    head = language_model.get_output_embeddings()
    layers = {
        module
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and "lora_" not in name
        # What is contiguous in float8 must come in whole vectors of 16 bytes.
        and module.in_features % 16 == module.out_features % 16 == 0
    }
    if not layers:
        raise UserError("--fp8 True: the language model has no linear layers in 16 bits; leave out --bits or --fp8.")
    for layer in layers:
        layer.forward = functools.partial(_linear, layer)
    for module in language_model.modules():
        for name, readers in READERS.items():
            if hasattr(module, name):
                norm, readers = getattr(module, name), [module.get_submodule(reader) for reader in readers]
                readers = [getattr(reader, "base_layer", reader) for reader in readers]  # of LoRA's layers
                norm.forward = functools.partial(_norm, norm.forward, [r for r in readers if r in layers])
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        plain = all(part in layers and part.bias is None for part in parts)
        if plain and language_model.config.hidden_act == "silu":
            module.forward = functools.partial(_mlp, module, module.forward)


# --- Layers -----------------------------------------------------------------------------------------------------------


class _ForReaders:
    """What layers behind a norm need: how to make its output again, and the products that wait for them."""

    def __init__(self, norm: Callable, hidden: torch.Tensor, readers: list[nn.Linear]):
        self.norm, self.hidden, self.readers, self.products = norm, hidden, readers, {}

    def product(self, reader: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Return a reader's product; the first that asks has those of all computed, from one quantised input."""
        if reader not in self.products:
            self.products = dict(zip(self.readers, _products(self.norm, self.hidden, x, self.readers), strict=True))
        return self.products.pop(reader)


def _norm(forward: Callable, readers: list[nn.Linear], hidden: torch.Tensor) -> torch.Tensor:
    output = forward(hidden)
    if torch.is_grad_enabled():
        output.for_readers = _ForReaders(forward, hidden.detach(), readers)
    return output


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    # The hooks of a unit of ZeRO-3 may have put another tensor in the place of the norm's.
    if hasattr(x, "for_readers") and layer in x.for_readers.readers:
        return x.for_readers.product(layer, x)
    return _products(_same, x.detach(), x, [layer])[0]


def _mlp(mlp: nn.Module, forward: Callable, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    norm, hidden = (x.for_readers.norm, x.for_readers.hidden) if hasattr(x, "for_readers") else (_same, x.detach())
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return _Mlp.apply(norm, hidden, _dtype(x), x, *weights)


def _products(norm: Callable, hidden: torch.Tensor, x: torch.Tensor, layers: list[nn.Linear]) -> tuple:
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return _Linears.apply(norm, hidden, _dtype(x), x, *weights, *biases)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _dtype(x: torch.Tensor) -> torch.dtype:
    """Return what a linear layer would give."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Linears(torch.autograd.Function):
    """`x @ weight.T + bias` of layers that read the same x = norm(hidden)."""

    @staticmethod
    def forward(ctx, norm, hidden, dtype, x, *weights_and_biases):
        number = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:number], weights_and_biases[number:]
        matrix = quantise([_matrix(x)], VALUE)
        stacked = quantise(weights, VALUE)
        ctx.norm, ctx.dtype, ctx.shape = norm, dtype, x.shape
        # A frozen layer needs its input no more.
        hidden = hidden if any(ctx.needs_input_grad[4 : 4 + number]) else None
        ctx.save_for_backward(hidden, matrix.scale, stacked.scale, *weights)
        outputs = []
        for rows, bias in zip(stacked.rows.split([len(weight) for weight in weights]), biases, strict=True):
            output = multiply((matrix.rows, matrix.scale), (rows, stacked.scale), dtype, FAST_FORWARD, bias)
            outputs.append(output.view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        hidden, of_x, of_weights, *weights = ctx.saved_tensors
        _, _, _, x_needed, *needed = ctx.needs_input_grad
        needed, biases_needed = needed[: len(weights)], needed[len(weights) :]
        gradients = [_matrix(gradient) for gradient in gradients]
        gradient = quantise(gradients, GRADIENT, dim=1, rows=x_needed, columns=any(needed))
        x_gradient, weight_gradients = None, [None] * len(weights)
        if x_needed:
            stacked = quantise(weights, VALUE, scale=of_weights, rows=False, columns=True)
            x_gradient = multiply(
                (gradient.rows, gradient.scale), (stacked.columns, of_weights), ctx.dtype, FAST_BACKWARD
            )
            x_gradient = x_gradient.view(ctx.shape)
        if any(needed):
            x = quantise([_matrix(ctx.norm(hidden))], VALUE, scale=of_x, rows=False, columns=True)
            dtype = weights[0].dtype
            together = multiply((gradient.columns, gradient.scale), (x.columns, of_x), dtype, FAST_BACKWARD)
            weight_gradients = together.split([len(weight) for weight in weights])
        bias_gradients = [g.sum(0) if wanted else None for g, wanted in zip(gradients, biases_needed, strict=True)]
        return None, None, None, x_gradient, *weight_gradients, *bias_gradients


class _Mlp(torch.autograd.Function):
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T` with x = norm(hidden). Keeps hidden and the two inner products.

    What SwiGLU gives, forward and backward, is never written in more than 8 bits.
    """

    @staticmethod
    def forward(ctx, norm, hidden, dtype, x, gate, up, down):
        matrix, gate_and_up = quantise([_matrix(x)], VALUE), quantise([gate, up], VALUE)
        # [M, 2 * intermediate]: gate and up beside each other
        inner = multiply((matrix.rows, matrix.scale), (gate_and_up.rows, gate_and_up.scale), dtype, FAST_FORWARD)
        product, of_down = swiglu(inner), quantise([down], VALUE)
        ctx.norm, ctx.dtype, ctx.shape = norm, dtype, x.shape
        scales = matrix.scale, gate_and_up.scale, product.scale, of_down.scale
        hidden = hidden if any(ctx.needs_input_grad[4:]) else None
        ctx.save_for_backward(hidden, inner, gate, up, down, *scales)
        output = multiply((product.rows, product.scale), (of_down.rows, of_down.scale), dtype, FAST_FORWARD)
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, inner, gate, up, down, of_x, of_gate_and_up, of_product, of_down = ctx.saved_tensors
        _, _, _, x_needed, *needed = ctx.needs_input_grad
        trained = any(needed)
        gradient = quantise([_matrix(gradient)], GRADIENT, columns=trained)
        weight = quantise([down], VALUE, scale=of_down, rows=False, columns=True)
        of_swiglu = multiply((gradient.rows, gradient.scale), (weight.columns, of_down), ctx.dtype, FAST_BACKWARD)
        inner, product = swiglu_backward(inner, of_swiglu, of_product, columns=trained)
        del of_swiglu
        x_gradient, weight_gradients = None, (None, None, None)
        if trained:
            dtype = down.dtype
            down = multiply((gradient.columns, gradient.scale), (product, of_product), dtype, FAST_BACKWARD)
            x = quantise([_matrix(ctx.norm(hidden))], VALUE, scale=of_x, rows=False, columns=True)
            together = multiply((inner.columns, inner.scale), (x.columns, of_x), dtype, FAST_BACKWARD)
            weight_gradients = *together.chunk(2), down
        if x_needed:
            weight = quantise([gate, up], VALUE, scale=of_gate_and_up, rows=False, columns=True)
            x_gradient = multiply((inner.rows, inner.scale), (weight.columns, of_gate_and_up), ctx.dtype, FAST_BACKWARD)
            x_gradient = x_gradient.view(ctx.shape)
        return None, None, None, x_gradient, *weight_gradients


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


# --- Matrices in float8 -----------------------------------------------------------------------------------------------


class Float8(NamedTuple):
    """A matrix [M, N], its values divided by `scale`."""

    rows: torch.Tensor | None  # float8 [M, N]
    columns: torch.Tensor | None  # float8 [N, M padded with zeros to a multiple of 16]: to be summed over M
    scale: torch.Tensor  # fp32 scalar


def multiply(
    left: tuple[torch.Tensor, torch.Tensor],
    right: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    fast: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `left @ right.T + bias` in `dtype`, [M, N].

    Args:
        left, right: float8 [M, K] and [N, K], K and N multiples of 16, each with its scale.
    """
    fused = None if bias is None or dtype == torch.float32 else bias.to(dtype)  # cuBLAS adds a bias in half precision
    options = dict(scale_a=left[1], scale_b=right[1], bias=fused, out_dtype=dtype, use_fast_accum=fast)
    output = torch._scaled_mm(left[0], right[0].t(), **options)
    return output if bias is None or fused is not None else output + bias


def quantise(
    matrices: Sequence[torch.Tensor],
    dtype: torch.dtype,
    dim: int = 0,
    scale: torch.Tensor | None = None,
    rows: bool = True,
    columns: bool = False,
) -> Float8:
    """Round matrices, concatenated in `dim`, to float8 with one scale, which comes from the largest magnitude.

    Args:
        matrices: contiguous; on top of each other (dim 0) all but the last must have a multiple of 16 rows.
            Each is read once for the scale, if none is given, and once for all copies.
        rows, columns: which copies to write.
    """
    scale = largest_scale(matrices, dtype) if scale is None else scale
    height, width = matrices[0].shape
    sizes = [matrix.shape[dim] for matrix in matrices]
    height, width = (sum(sizes), width) if dim == 0 else (height, sum(sizes))
    by_rows = matrices[0].new_empty(height, width, dtype=dtype) if rows else None
    by_columns = matrices[0].new_empty(width, _padded(height), dtype=dtype) if columns else None
    for matrix, size, end in zip(matrices, sizes, itertools.accumulate(sizes), strict=True):
        start, padded_size = end - size, size if dim == 1 else _padded(size)
        cast(
            matrix,
            scale,
            by_rows.narrow(dim, start, size) if rows else None,
            by_columns.narrow(1 - dim, start, padded_size) if columns else None,
        )
    return Float8(by_rows, by_columns, scale)


def _padded(height: int) -> int:
    return -(-height // 16) * 16


def largest_scale(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the scale, fp32 scalar, that puts the largest magnitude in contiguous matrices at float8's largest value.

    It is NaN or infinite if one of their values is, and so is then all that is computed with it.
    """
    largest = torch.full((), SMALLEST, dtype=torch.float32, device=matrices[0].device)
    for matrix in matrices:
        if matrix.is_cuda:
            grid = (-(-matrix.numel() // LARGEST_BLOCK),)
            _largest_kernel[grid](matrix, matrix.numel(), largest.view(torch.int32), LARGEST_BLOCK, num_warps=8)
        else:
            largest = torch.maximum(largest, matrix.abs().max().float())
    return largest / torch.finfo(dtype).max


def cast(matrix: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    """Write a contiguous matrix [M, N] divided by the scale into float8 `rows` [M, N], and `columns` [N, M padded]."""
    height, width = matrix.shape
    if matrix.is_cuda:
        grid = (-(-width // CAST_TILE), -(-height // CAST_TILE))
        _cast_kernel[grid](
            matrix,
            scale,
            matrix if rows is None else rows,
            matrix if columns is None else columns,
            height,
            width,
            _padded(height),
            1 if rows is None else rows.stride(0),
            1 if columns is None else columns.stride(0),
            rows is not None,
            columns is not None,
            CAST_TILE,
            num_warps=CAST_WARPS,
        )
        return
    values = matrix.float() * scale.reciprocal()
    if rows is not None:
        rows.copy_(values)
    if columns is not None:
        columns.copy_(F.pad(values.t(), (0, _padded(height) - height)))


def swiglu(inner: torch.Tensor) -> Float8:
    """Return silu(gate) * up in float8, by rows: [M, 2 * width], gate and up beside each other -> [M, width]."""
    height, width = inner.shape[0], inner.shape[1] // 2
    if inner.is_cuda:
        largest = torch.full((), SMALLEST, dtype=torch.float32, device=inner.device)
        rows = inner.new_empty(height, width, dtype=VALUE)
        grid = (-(-width // SWIGLU_COLUMNS), -(-height // SWIGLU_ROWS))
        sizes = height, width, SWIGLU_ROWS, SWIGLU_COLUMNS
        _swiglu_kernel[grid](inner, largest.view(torch.int32), rows, *sizes, False, num_warps=SWIGLU_WARPS)
        scale = largest / torch.finfo(VALUE).max
        _swiglu_kernel[grid](inner, scale, rows, *sizes, True, num_warps=SWIGLU_WARPS)
        return Float8(rows, None, scale)
    gate, up = inner.float().chunk(2, dim=1)
    return quantise([F.silu(gate) * up], VALUE)


def swiglu_backward(
    inner: torch.Tensor, gradient: torch.Tensor, product_scale: torch.Tensor, columns: bool
) -> tuple[Float8, torch.Tensor | None]:
    """Return the gradient of `inner` in float8, by rows and `columns`, and the product of forward, by columns.

    Args:
        inner: [M, 2 * width] as in `swiglu`; gradient: of the product, [M, width]; product_scale: of forward.
    """
    height, width = gradient.shape
    if inner.is_cuda:
        largest = torch.full((), SMALLEST, dtype=torch.float32, device=inner.device)
        rows = inner.new_empty(height, 2 * width, dtype=GRADIENT)
        by_columns, product = rows, rows  # nothing is written to them
        if columns:
            by_columns = inner.new_empty(2 * width, _padded(height), dtype=GRADIENT)
            product = inner.new_empty(width, _padded(height), dtype=VALUE)
        grid = (-(-width // SWIGLU_COLUMNS), -(-height // SWIGLU_ROWS))
        outputs = rows, by_columns, product
        sizes = height, width, _padded(height), SWIGLU_ROWS, SWIGLU_COLUMNS
        kernel = functools.partial(_swiglu_backward_kernel[grid], num_warps=SWIGLU_WARPS)
        kernel(inner, gradient, largest.view(torch.int32), product_scale, *outputs, *sizes, False, columns)
        scale = largest / torch.finfo(GRADIENT).max
        kernel(inner, gradient, scale, product_scale, *outputs, *sizes, True, columns)
        return Float8(rows, by_columns if columns else None, scale), product if columns else None
    gate, up = inner.float().chunk(2, dim=1)
    of_product, sigmoid = gradient.float(), gate.sigmoid()
    of_gate = of_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_both = torch.cat([of_gate, of_product * F.silu(gate)], dim=1)
    product = quantise([F.silu(gate) * up], VALUE, scale=product_scale, rows=False, columns=True).columns
    return quantise([of_both], GRADIENT, columns=columns), product if columns else None


# --- The same on GPUs -------------------------------------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:  # which torch for CPUs does without
    triton = None

# Values that one program takes, and its warps: `benchmarks/float8_layers.py` times others.
LARGEST_BLOCK = 16384
CAST_TILE, CAST_WARPS = 64, 8
SWIGLU_ROWS, SWIGLU_COLUMNS, SWIGLU_WARPS = 64, 64, 8

if triton is not None:
    # Offsets are 64 bits wide: long micro-batches have more than 2**31 values. The number of rows changes from one
    # micro-batch to the next, which must not have Triton compile anew for those that are multiples of 16.

    @triton.jit
    def _keep_largest(largest, values):
        # Bits of magnitudes are ordered as they are, with NaN on top: `tl.max` of floats would pass over it.
        bits = tl.abs(values).to(tl.int32, bitcast=True)
        tl.atomic_max(largest, tl.max(bits), sem="relaxed")

    @triton.jit
    def _largest_kernel(x, size, largest, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _keep_largest(largest, tl.load(x + at, mask=at < size, other=0.0).to(tl.float32))

    @triton.jit
    def _write_columns(output, values, rows, columns, height, width, stride):
        # Of values that nothing else stores: where the same ones are also written by rows, ptxas 12.9 on Hopper gets a
        # quarter of the transposed ones wrong (`check_copies`). So the scale is loaded again for these, by a volatile
        # load, whose value the compiler cannot take for that of the first.
        at = columns.to(tl.int64)[:, None] * stride + rows[None, :]
        inside = (columns[:, None] < width) & (rows[None, :] < height)
        tl.store(output + at, tl.trans(values).to(output.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["height"])
    def _cast_kernel(
        x,
        scale,
        by_rows,
        by_columns,
        height,
        width,
        padded,
        rows_stride,
        columns_stride,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
        columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
        start = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        values = tl.load(x + start * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if ROWS:
            rounded = (values * tl.div_rn(1.0, tl.load(scale))).to(by_rows.dtype.element_ty)
            tl.store(by_rows + start * rows_stride + columns[None, :], rounded, mask=inside)
        if COLUMNS:
            values = values * tl.div_rn(1.0, tl.load(scale, volatile=True))
            _write_columns(by_columns, values, rows, columns, padded, width, columns_stride)

    @triton.jit(do_not_specialize=["height"])
    def _swiglu_kernel(
        inner,
        largest_or_scale,
        output,
        height,
        width,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        WRITE: tl.constexpr,
    ):
        rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = (rows < height) & (columns < width)
        at = rows * (2 * width) + columns
        gate = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(inner + at + width, mask=inside, other=0.0).to(tl.float32)
        product = gate * tl.sigmoid(gate) * up
        if WRITE:
            product = product * tl.div_rn(1.0, tl.load(largest_or_scale))
            tl.store(output + rows * width + columns, product.to(output.dtype.element_ty), mask=inside)
        else:
            _keep_largest(largest_or_scale, product)

    @triton.jit(do_not_specialize=["height"])
    def _swiglu_backward_kernel(
        inner,
        gradient,
        largest_or_scale,
        product_scale,
        by_rows,
        by_columns,
        product_by_columns,
        height,
        width,
        padded,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        WRITE: tl.constexpr,
        TRAINED: tl.constexpr,
    ):
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        start = rows.to(tl.int64)[:, None]
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        at = start * (2 * width) + columns[None, :]
        gate = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(inner + at + width, mask=inside, other=0.0).to(tl.float32)
        of_product = tl.load(gradient + start * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        of_gate = of_product * up * sigmoid * (1 + gate * (1 - sigmoid))
        of_up = of_product * silu
        if WRITE:
            factor = tl.div_rn(1.0, tl.load(largest_or_scale))
            tl.store(by_rows + at, (of_gate * factor).to(by_rows.dtype.element_ty), mask=inside)
            tl.store(by_rows + at + width, (of_up * factor).to(by_rows.dtype.element_ty), mask=inside)
            if TRAINED:
                factor = tl.div_rn(1.0, tl.load(largest_or_scale, volatile=True))
                of_gate, of_up = of_gate * factor, of_up * factor
                product = silu * up * tl.div_rn(1.0, tl.load(product_scale))
                _write_columns(by_columns, of_gate, rows, columns, padded, width, padded)
                up_columns = by_columns + width.to(tl.int64) * padded
                _write_columns(up_columns, of_up, rows, columns, padded, width, padded)
                _write_columns(product_by_columns, product, rows, columns, padded, width, padded)
        else:
            _keep_largest(largest_or_scale, of_gate)
            _keep_largest(largest_or_scale, of_up)
