"""How much memory a GPU needs, by part, worked out before there is a GPU: what `tools.plan` shows and refuses.

LLaVA finds out by running out. Here what lasts (weights, optimizer, buckets) is counted from shapes, and what comes and
goes is weighed: the model's own code runs forward and backward on tensors that have shapes and no memory, and every
storage counts from the operator that makes it until it is freed. Only the fused GPU kernels, which cannot run on such
tensors, are replaced, by functions that keep what the kernels keep.
"""

import functools
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig

from ..data.collator import MicroBatch
from ..guards.longest import Shape
from ..model.attention import flash_4_is_installed, torch_groups_heads
from ..model.llava import LlavaModel
from ..model.trained import numel
from ..model.vision_tower import VisionTower, has_layers
from ..options.kernels import forget_outputs_of_norms, make_mlps_keep_less
from ..options.lora import linear_layers

GIB = 2**30
# Outside of what PyTorch allocates: the CUDA context with the kernels that are loaded, and NCCL's buffers.
CONTEXT, NCCL = 0.7 * GIB, 1.0 * GIB
# Of what comes and goes, the share that the allocator holds in pieces nobody can use; with segments that grow.
FRAGMENTATION = 0.03


@dataclass(frozen=True)
class Layout:
    """What a run is spread over, and how.

    Attributes:
        zero_stage: 0 is one GPU alone, or DDP on several.
        zero: the `zero_optimization` of DeepSpeed's config, completed; empty without DeepSpeed.
        precision: `bf16`, `fp16` or `no`.
        gpu_memory: of one GPU, bytes.
    """

    gpus: int
    gpu_memory: float
    precision: str = "bf16"
    zero_stage: int = 0
    zero: dict | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[self.precision]

    @property
    def master_dtype(self) -> torch.dtype:
        """Of trained parameters in the model, as in `distributed.master_dtype`."""
        return self.compute_dtype if self.zero_stage else torch.float32

    def offloads(self, what: str) -> bool:
        """Return whether `optimizer` or `param` is in the CPU's memory."""
        part = (self.zero or {}).get(f"offload_{what}") or {}
        return part.get("device", "none") not in ("none", None)

    def __str__(self) -> str:
        kind = f"ZeRO-{self.zero_stage}" if self.zero_stage else "DDP" if self.gpus > 1 else "no distribution"
        offloaded = " with offload" if self.offloads("optimizer") or self.offloads("param") else ""
        gpus = f"{self.gpus} GPU" + ("s" if self.gpus > 1 else "")
        return f"{gpus} of {self.gpu_memory / GIB:.0f} GiB, {kind}{offloaded}, {self.precision.replace('no', 'fp32')}"


@dataclass
class Estimate:
    """Bytes on one GPU when most are in use. `parts` are PyTorch's, `overhead` is what the GPU holds besides."""

    parts: dict[str, float]
    overhead: float
    cpu: float = 0.0  # on one machine, per GPU: what is offloaded

    @property
    def peak(self) -> float:
        """What `torch.cuda.max_memory_allocated`, and so `peak_memory_gib` in the log, will show."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        return self.peak + self.overhead

    def lines(self) -> list[str]:
        rows = [(f"{size / GIB:8.2f}", part) for part, size in self.parts.items() if size >= 0.005 * GIB]
        rows.append((f"{self.peak / GIB:8.2f}", "peak_memory_gib of the log"))
        rows.append((f"{self.overhead / GIB:8.2f}", "CUDA, NCCL and what the allocator cannot use"))
        rows.append((f"{self.needed / GIB:8.2f}", "GiB needed on each GPU"))
        if self.cpu:
            rows.append((f"{self.cpu / GIB:8.2f}", "GiB of the machine's own memory for each of its GPUs"))
        return [" ".join(row) for row in rows]


def estimate(model: LlavaModel, layout: Layout, shape: Shape, several: bool, fused: bool, bits: int = 16) -> Estimate:
    """Estimate the memory of a training step whose longest micro-batch has this shape.

    Args:
        model: on the meta device, with dtypes, `requires_grad`, adapters and checkpointing as in the run. Used up: its
            parameters are replaced by ones without a device.
        several: whether a step has several micro-batches, so that gradients are there while activations are.
        fused: whether norms and MLPs are Liger's kernels.
        bits: of the language model's frozen linear layers.
    """
    lasting, cpu = lasting_parts(model, layout, bits)
    coming = weigh_step(model, layout, shape, several, fused)
    overhead = CONTEXT + (NCCL if layout.gpus > 1 else 0) + FRAGMENTATION * sum(coming.values())
    return Estimate(dict(Counter(lasting) + Counter(coming)), overhead, cpu)


# --- what lasts ------------------------------------------------------------------------------------------------------


def lasting_parts(model: LlavaModel, layout: Layout, bits: int = 16) -> tuple[dict[str, float], float]:
    """Return the bytes by part that are on a GPU all the time, and bytes in the CPU's memory for each GPU."""
    quantised = {}
    if bits != 16:
        modules = dict(model.language_model.named_modules())
        layers = [modules[name] for name in linear_layers(model.language_model) if "lora_" not in name]
        quantised = {id(layer.weight) for layer in layers}
    size = layout.compute_dtype.itemsize
    weights = persistent = 0.0
    for parameter in model.parameters():
        bytes_each = parameter.dtype.itemsize
        if id(parameter) in quantised:
            # Beside the numbers a scale for every 64 of them (itself in 8 bits where it is quantised twice), or a row.
            bytes_each = 0.5 + 4 / 64 if bits == 4 else 1.01
        weights += bytes_each * numel(parameter)
        if layout.zero_stage == 3 and numel(parameter) <= layout.zero["stage3_param_persistence_threshold"]:
            persistent += bytes_each * numel(parameter)
    trained = sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)

    if not layout.zero_stage:  # gradients come with the step
        parts = {"weights": weights, "optimizer: two moments": 8.0 * trained}
        if layout.gpus > 1:
            parts["DDP's buckets, a copy of all gradients"] = 4.0 * trained
        return parts, 0.0

    share = 1 / layout.gpus
    optimizer, gradients, cpu = 12 * trained * share, 4 * trained * share, 0.0
    bucket = float(layout.zero["reduce_bucket_size"]) * size
    if layout.offloads("optimizer"):
        optimizer, gradients, cpu = 0.0, 0.0, 16 * trained * share
    parts = {"optimizer: fp32 weights and two moments": optimizer, "gradients": gradients}
    if layout.zero_stage == 2:
        buckets = bucket * (2 if layout.zero["overlap_comm"] else 1)  # one is filled while the other is sent
        return parts | {"weights": weights, "buckets to reduce gradients in": buckets}, cpu
    divided = weights * share
    if layout.offloads("param"):
        divided, cpu = 0.0, cpu + divided
    # What forward has gathered stays for backward, as far as it may, and then some more is fetched ahead.
    may_stay = layout.zero["stage3_max_live_parameters"] + layout.zero["stage3_prefetch_bucket_size"]
    parts |= {
        "weights": divided,
        "weights gathered by ZeRO-3": persistent + min(weights - persistent, may_stay * size),
        "buckets to reduce gradients in": bucket,
    }
    return parts, cpu


# --- what comes and goes ---------------------------------------------------------------------------------------------


class Scale(TorchDispatchMode):
    """Weighs every storage that operators make, from then until it is freed, each under the label of its time.

    Attributes:
        at_peak: bytes by label when the sum of all was largest.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.label, self.live, self.at_peak, self.peak = "activations", Counter(), Counter(), 0.0
        self.storages: dict[int, tuple[int, str]] = {}
        self.of_parameters = {parameter.untyped_storage()._cdata for parameter in parameters}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        # A parameter that an operator copies is autocast's: kept until its layer's backward has used it.
        is_cast = function is torch.ops.aten._to_copy.default and self._key(arguments[0]) in self.of_parameters
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in self.of_parameters:
                self._weigh(tensor, "weights in half precision, for autocast" if is_cast else self.label)
        return outputs

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        key = self._key(tensor)
        size, before = self.storages[key]
        self.storages[key] = size, label
        self.live[before] -= size
        self.live[label] += size

    def _weigh(self, tensor: torch.Tensor, label: str) -> None:
        key = self._key(tensor)
        if key in self.storages:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // 512) * 512  # the allocator's smallest unit
        self.storages[key] = size, label
        self.live[label] += size
        weakref.finalize(storage, self._forget, key)
        if (total := sum(self.live.values())) > self.peak:
            self.peak, self.at_peak = total, Counter(self.live)

    def _forget(self, key: int) -> None:
        size, label = self.storages.pop(key)
        self.live[label] -= size

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata


def weigh_step(model: LlavaModel, layout: Layout, shape: Shape, several: bool, fused: bool) -> dict[str, float]:
    """Return bytes by part, at the peak of a step, of what is made and freed in it. Arguments: see `estimate`."""
    keep_what_kernels_keep(model, fused)
    with FakeTensorMode():
        # The CPU's, so that no GPU is needed; what differs between the two in autocast is corrected below.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        model.language_model.tie_weights()
        model.vision_tower.pixel_table = torch.empty(3, 256)
        parameters = list(model.parameters())
        scale = Scale(parameters)
        batch = _empty_batch(model, shape)
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(_gradient_is_there, scale, layout))
        head = model.language_model.get_output_embeddings()
        head.register_forward_pre_hook(functools.partial(_logits_begin, scale))
        half = layout.compute_dtype != torch.float32
        if several and not layout.zero_stage:  # those of the micro-batch before
            scale.label = "gradients"
            with scale:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        scale.label = "activations"
        # accelerate's autocast; under DeepSpeed the weights themselves are in half precision.
        with scale, torch.autocast("cpu", torch.bfloat16, enabled=half and not layout.zero_stage):
            loss = model(**batch)
        with scale:
            loss.backward()
    in_order = sorted(scale.at_peak.items(), key=lambda part: part[0] == "gradients")  # last, as a step makes them
    return {label: float(size) for label, size in in_order if size > 0}


def float8_copies(config: PretrainedConfig, shape: Shape) -> float:
    """Return the bytes that the backward of one MLP in float8 has beside what bf16's has: its copies, one byte each.

    Those are the gradients of gate and up, by rows and by columns, and their product, less what Liger's kernels have in
    bf16; the MLP's input and gradient; its three weights.
    """
    width, inner = config.hidden_size, config.intermediate_size
    return 3.0 * (shape.tokens * (inner + width) + inner * width)


def kept_of_a_picture(tower: VisionTower) -> float:
    """Return about how many numbers a trained tower keeps of one picture until backward.

    tower: on the meta device. Used up, as `estimate` uses its model.
    """
    with FakeTensorMode():
        tower._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        tower.pixel_table = torch.empty(3, 256)
        _attend_as_kernels_do(tower)
        scale = Scale(list(tower.requires_grad_(True).parameters()))
        with scale:
            features = tower.train()(torch.empty(1, 3, tower.image_size, tower.image_size, dtype=torch.uint8))
        return scale.live.total() / features.element_size()


def _gradient_is_there(scale: Scale, layout: Layout, parameter: nn.Parameter) -> None:
    if layout.zero_stage:
        parameter.grad = None  # DeepSpeed has moved it into its bucket
    else:
        scale.relabel(parameter.grad, "gradients")


def _logits_begin(scale: Scale, head: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    scale.label = "logits and their loss"
    if inputs[0].requires_grad:
        inputs[0].register_hook(lambda _: setattr(scale, "label", "activations"))


def _empty_batch(model: LlavaModel, shape: Shape) -> MicroBatch:
    tower, rows = model.vision_tower, (shape.rows, shape.columns)
    whole_numbers = functools.partial(torch.empty, dtype=torch.int64)
    image_tokens = min(shape.images * tower.tokens_per_image, shape.tokens)
    four = (4,) if model.tiling and model.tiling.interpolates else ()
    return {
        "input_ids": whole_numbers(rows),
        "position_ids": whole_numbers(rows),
        "attention_mask": None if shape.packed else torch.empty(rows, dtype=torch.bool),
        "cu_seqlens": torch.empty(2, dtype=torch.int32) if shape.packed else None,
        "max_seqlen": shape.columns,
        "pixel_values": torch.empty(shape.images, 3, tower.image_size, tower.image_size, dtype=torch.uint8),
        "image_positions": whole_numbers(image_tokens),
        "feature_rows": whole_numbers(image_tokens, *four) if model.tiling else None,
        "feature_weights": torch.empty(image_tokens, *four) if four else None,
        "logit_positions": whole_numbers(shape.logits),
        "targets": whole_numbers(shape.rows, shape.logits),
    }


# --- what the GPU's kernels keep -------------------------------------------------------------------------------------


def keep_what_kernels_keep(model: LlavaModel, fused: bool) -> None:
    """Replace attention, and if `fused` norms and MLPs, by functions that keep tensors of the same sizes."""
    asked = model.language_model.config._attn_implementation
    weighed = asked if asked in ("varlen", "sdpa", "eager") else "grouped"
    model.language_model.set_attn_implementation(f"weighed_{weighed}")
    _attend_as_kernels_do(model.vision_tower)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = functools.partial(_layer_norm, module)
        elif isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = functools.partial(_dropout, module)
    for module in model.language_model.modules() if fused else ():
        if "RMSNorm" in type(module).__name__:
            module.forward = functools.partial(_rms_norm, module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = functools.partial(_mlp, module)
    if fused:
        make_mlps_keep_less(model.language_model, _GatedProduct.apply)
        forget_outputs_of_norms(model.language_model)


def _attend_as_kernels_do(tower: VisionTower) -> None:
    if has_layers(tower.model.config):  # FastViTHD's few attentions are PyTorch's own, which run as they are
        tower.model.set_attn_implementation("weighed_grouped")


class _Attention(torch.autograd.Function):
    """FlashAttention's, which PyTorch's and the memory-efficient one resemble: inputs, output, a sum for each row."""

    @staticmethod
    def forward(context, query, key, value, *others):
        batch, heads, length, size = query.shape
        output = query.new_empty(batch, length, heads, size)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, sums, *others)
        return output

    @staticmethod
    def backward(context, gradient):
        query, key, value, *others = context.saved_tensors
        query.new_empty(query.shape, dtype=torch.float32)  # the query's gradient is summed in fp32
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *[None] * (len(others) - 2)


def _flash(module, query, key, value, attention_mask, **keywords):
    return _Attention.apply(query, key, value), None


def _varlen(module, query, key, value, attention_mask, **keywords):
    """Keys and values for each head of the queries, where torch's kernel does not share them (`model/attention.py`)."""
    if not (torch_groups_heads() or flash_4_is_installed()):
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return _Attention.apply(query, key, value), None


def _masked(module, query, key, value, attention_mask, **keywords):
    """PyTorch's with a mask: each layer makes numbers of it, and keeps them for backward."""
    mask = query.new_empty(query.shape[0], 1, query.shape[2], query.shape[2])
    return _Attention.apply(query, key, value, mask), None


def _eager(module, query, key, value, attention_mask, **keywords):
    """The softmax in fp32, and what is multiplied with the values."""
    weights = query.new_empty(*query.shape[:3], query.shape[2])
    return _Attention.apply(query, key, value, weights.float(), weights), None


for _name, _function in (("grouped", _flash), ("varlen", _varlen), ("sdpa", _masked), ("eager", _eager)):
    AttentionInterface.register(f"weighed_{_name}", _function)


class _RmsNorm(torch.autograd.Function):
    """Liger's: keeps input, weight and a number for each row; the gradient of the input replaces the output's."""

    @staticmethod
    def forward(context, hidden, weight):
        context.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(context, gradient):
        return gradient, torch.empty_like(context.saved_tensors[1])


class _GatedProduct(torch.autograd.Function):
    """Liger's SwiGLU: keeps both inputs, whose gradients replace them."""

    @staticmethod
    def forward(context, gate, up):
        context.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(context, gradient):
        return context.saved_tensors


def _rms_norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(hidden, module.weight)


def _mlp(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_GatedProduct.apply(module.gate_proj(hidden), module.up_proj(hidden)))


def _dropout(module: nn.Dropout, hidden: torch.Tensor) -> torch.Tensor:
    """As on GPUs, with a byte of mask for a number; the CPU's keeps the mask in the numbers' dtype."""
    return torch.native_dropout(hidden, module.p, module.training)[0]


def _layer_norm(module: nn.LayerNorm, hidden: torch.Tensor) -> torch.Tensor:
    """As under CUDA's autocast, in fp32; the CPU's leaves the dtype as it is."""
    if torch.is_autocast_enabled("cpu"):
        hidden = hidden.float()
    return nn.functional.layer_norm(hidden, module.normalized_shape, module.weight, module.bias, module.eps)
