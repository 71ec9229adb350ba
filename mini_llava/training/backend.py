"""Every quirk of accelerate and DeepSpeed that a result depends on, each with its reason.

What only spares ZeRO-3 work is in `options/zero3.py`. The loop in `train.py` calls `micro_step`, `backward` and
`optimizer_step` whichever backend runs. accelerate and DeepSpeed are configured for an accumulation of 1: the loop says
which micro-batch is the last, so that a step may have any number of them.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..arguments import Arguments
from ..errors import UserError
from ..model.llava import LlavaModel
from ..processes import launched_rank
from ..words import counted

# DeepSpeed calls collectives by names that torch is renaming; a user cannot act on that.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

# Micro-batches differ in length, which fragments segments of fixed size until the allocator returns all memory to the
# driver in the middle of a step, or fails. The variable is read once, at the first CUDA call, even one that only asks
# whether bf16 is supported: hence it is set here and not in `build_accelerator`.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


# --- A step, as the loop of train.py takes it ------------------------------------------------------------------------


@contextlib.contextmanager
def micro_step(accelerator: Accelerator, model: nn.Module, is_last: bool) -> Iterator[None]:
    """Run forward and backward of one micro-batch inside; the ranks' gradients are averaged with the last of a step.

    DeepSpeed learns it from accelerate's flag (ZeRO-2 and ZeRO-3 refuse its own no_sync); DDP must know in forward.
    """
    accelerator.gradient_state._set_sync_gradients(is_last)
    unsynchronised = not is_last and not is_deepspeed(accelerator) and hasattr(model, "no_sync")
    with model.no_sync() if unsynchronised else contextlib.nullcontext():
        yield


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Add the gradient of a loss, a scalar, to those before; under DeepSpeed the last one of a step clips and steps.

    A loss that is not finite makes the whole gradient NaN: by itself an infinite loss may have a finite gradient, where
    the target's logit is -inf.
    """
    accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> tuple[torch.Tensor | float, bool]:
    """Clip the gradient and step, unless it is not finite; under DeepSpeed only say what the last backward did.

    Returns:
        The global gradient norm before clipping, on the device if the backend leaves it there (under DeepSpeed
        meaningless if not finite); and whether it was finite, the same on all ranks. The host waits for the device.
    """
    if is_deepspeed(accelerator):  # it has clipped and stepped in the last backward, or silently skipped the step
        return accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm(), not optimizer.step_was_skipped
    accelerator.unscale_gradients(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else float("inf"))
    finite = bool(norm.isfinite())
    if finite or accelerator.scaler is not None:  # the scaler skips the step itself, and lowers the scale
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def discard_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Set the accumulated gradients to zero, so that the next step is as if no backward had run before it."""
    inner = optimizer.optimizer  # accelerate's own zero_grad does nothing between two steps, nor under DeepSpeed
    inner.zero_grad(set_to_none=True)  # ZeRO-3 then overwrites with the next micro-batch instead of adding
    if zero_stage(accelerator) == 2:  # as DeepSpeed does where it skips a step
        inner.micro_step_id = -1
        for sums in (inner.averaged_gradients, inner.all_grad_tensors):
            sums.update(dict.fromkeys(sums))


def to_device(batch: dict, device: torch.device) -> dict:
    """Return the batch with its tensors on the device; the host does not wait."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


# --- Processes, precision, DeepSpeed's settings -----------------------------------------------------------------------


def choose_precision(bf16: bool, fp16: bool, explicit: set[str]) -> str:
    """Return `bf16`, `fp16` or `no`: that of accelerate's config, else that of the flags.

    A bare `accelerate launch` exports `no` as well, so `no` counts as not set. Raises UserError for a contradiction.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = "bf16" if bf16 else "fp16" if fp16 else "no"
    if launched not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision: {launched} of the accelerate config is unknown; known: no, bf16, fp16.")
    if launched != "no":
        for name, asked in (("bf16", bf16), ("fp16", fp16)):
            if name in explicit and asked != (launched == name):
                raise UserError(f"--{name} {asked} contradicts the accelerate config's mixed_precision: {launched}.")
        wanted = launched
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"  # V100, T4
    return wanted


def start(arguments: Arguments) -> Accelerator:
    """Start the process group and accelerate, in the precision and with the trackers that the flags ask for.

    Raises:
        UserError: flags, accelerate's config and the launch contradict each other.
    """
    training = arguments.training
    precision = choose_precision(training.bf16, training.fp16, arguments.explicit)
    accelerator = build_accelerator(precision, training.max_grad_norm, training.report_to, Path(training.output_dir))
    if training.use_dora and zero_stage(accelerator) == 3:
        raise UserError(
            "--use_dora needs the whole weight of each layer, of which a rank has only a part under ZeRO-3, outside of "
            "the layer's own forward. Use accelerate_configs/zero2.yaml, or leave DoRA out."
        )
    if training.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
    return accelerator


def build_accelerator(precision: str, max_grad_norm: float, report_to: str, output_dir: Path) -> Accelerator:
    """Return the Accelerator for what was launched: one process, DDP, DeepSpeed ZeRO-2 or ZeRO-3, on GPU or CPU."""
    handlers, plugin = [], None
    launched = "WORLD_SIZE" in os.environ
    if launched:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # Without a launcher accelerate would wait for a process group that does not exist.
        handlers.append(InitProcessGroupKwargs(backend=backend))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # On CPUs it would compile, for a minute, an operator that only inference calls; asking for it takes seconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        plugin = DeepSpeedPlugin()
        complete_deepspeed_config(plugin.deepspeed_config, precision, max_grad_norm)
    accelerator = Accelerator(
        # Several processes on CPUs: without `cpu` accelerate makes a process group and never synchronises gradients.
        # Under DeepSpeed, with `cpu` it leaves DeepSpeed out.
        cpu=plugin is None and launched_rank()[1] > 1 and not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(output_dir),
    )
    # ACCELERATE_GRADIENT_ACCUMULATION_STEPS of a config file would win over the argument above.
    accelerator.gradient_accumulation_steps = 1
    _check_it_is_what_was_launched(accelerator, wants_deepspeed=plugin is not None)
    return accelerator


def _check_it_is_what_was_launched(accelerator: Accelerator, wants_deepspeed: bool) -> None:
    """Raise UserError where accelerate silently made something else of the launch."""
    if wants_deepspeed and not is_deepspeed(accelerator):
        raise UserError(
            "The accelerate config asks for DeepSpeed, but accelerate leaves it out when it is told to use the CPU: "
            "set use_cpu: false and unset ACCELERATE_USE_CPU; DeepSpeed takes the CPU by itself where there is no GPU."
        )
    launched = launched_rank()[1]
    if accelerator.num_processes != launched or (launched > 1 and accelerator.distributed_type == DistributedType.NO):
        raise UserError(f"{launched} processes were launched, but accelerate would let each of them train alone.")


def complete_deepspeed_config(config: dict, precision: str, max_grad_norm: float) -> None:
    """Set what the loop decides, in place. Raises UserError where the file contradicts it."""
    for key in ("optimizer", "scheduler"):
        if key in config:
            # LLaVA's zero3_offload.json has both, and silently replaces parameter groups and cosine by them.
            raise UserError(f"The DeepSpeed config has an entry {key!r}; remove it, the trainer brings its own.")
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", max_grad_norm):
        raise UserError(
            f"gradient_clipping {clipping} of the DeepSpeed config contradicts --max_grad_norm {max_grad_norm}: "
            "remove it there."
        )
    config["gradient_clipping"] = float(max_grad_norm)  # absent or "auto" it would be 1.0
    config["train_micro_batch_size_per_gpu"] = 1  # required, but unused: DeepSpeed never makes a batch here
    config["gradient_accumulation_steps"] = 1
    config["zero_allow_untested_optimizer"] = True
    # Its clock, which nothing here reads, has the host wait for the device before every forward.
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    # Gradients accumulate in fp32: the default is the model's dtype, and bf16 sums lose what is 256 times smaller.
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    complete_zero(config["zero_optimization"], memory)
    for name in ("bf16", "fp16"):
        config.setdefault(name, {})["enabled"] = precision == name


def complete_zero(zero: dict, gpu_memory: float | None) -> None:
    """Fill what a `zero_optimization` leaves open, in place. Raises UserError for a stage that is not supported.

    gpu_memory: bytes of one GPU; None on CPUs.
    """
    if zero["stage"] not in (2, 3):
        raise UserError(f"zero_stage: {zero['stage']} of the accelerate config is not supported; known: 2, 3.")
    # Gathered half-precision parameters may take a seventh of the GPU: those of forward that are still there need not
    # be gathered again in backward.
    keep_whole = 1_000_000_000 if gpu_memory is None else int(gpu_memory) // 7 // 2
    # "auto" would be derived from the hidden size of a `model.config` that LlavaModel does not have.
    for key, value in (
        ("reduce_bucket_size", 500_000_000),
        ("stage3_prefetch_bucket_size", 400_000_000),
        # Smaller parameters stay whole: all of CLIP-L's, 0.6 GB that would cost hundreds of gathers.
        ("stage3_param_persistence_threshold", 5_000_000),
        ("stage3_max_live_parameters", keep_whole),
        ("stage3_max_reuse_distance", keep_whole),
    ):
        if zero.get(key, "auto") == "auto" and (zero["stage"] == 3 or not key.startswith("stage3")):
            zero[key] = value
    zero.setdefault("overlap_comm", gpu_memory is not None)
    if zero["stage"] == 3:  # a copy of every gradient, which are copied once more to be sent
        zero.setdefault("contiguous_gradients", False)


def prepare(
    accelerator: Accelerator, model: LlavaModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return both as `accelerator.prepare` does, with layers as the unit that ZeRO-3 gathers and reduces.

    By default the unit is a single linear layer, whose hooks take the host longer than the GPU takes for a tower's
    layer. DeepSpeed reduces the gradients of such a unit once the gradient of its input is known. With all in front of
    the language model frozen there is none at its first layer, so its linear layers then stay the units.
    """
    if zero_stage(accelerator) == 3:
        from deepspeed.utils import set_z3_leaf_module

        tower, language_model = model.vision_tower, model.language_model
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            set_z3_leaf_module(tower, True)
        in_front = [tower, model.projector, language_model.get_input_embeddings()]
        if any(parameter.requires_grad for module in in_front for parameter in module.parameters()):
            for module in language_model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    set_z3_leaf_module(module, True)
    model, optimizer = accelerator.prepare(model, optimizer)
    create_moments(accelerator, optimizer)
    return model, optimizer


def inner_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that steps, inside accelerate's and DeepSpeed's."""
    return optimizer.optimizer.optimizer if is_deepspeed(accelerator) else optimizer.optimizer


def create_moments(accelerator: Accelerator, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    """Give AdamW its moments, zeros where there are none yet, as after `step` steps.

    By itself it would allocate them at the end of the first step, in the holes between activations, where they stay and
    fragment the free memory: LoRA of a 13B model then found no 88 MB among 23 GB.
    """
    inner = inner_optimizer(accelerator, optimizer)
    if is_deepspeed(accelerator):
        flat = "fp32_partitioned_groups_flat" if zero_stage(accelerator) == 3 else "single_partition_of_fp32_groups"
        masters = getattr(optimizer.optimizer, flat)
    else:
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    on_cpu = type(inner).__name__ == "DeepSpeedCPUAdam"
    for master in masters:
        # torch's fused AdamW wants the count beside the parameter, the plain one on the CPU, DeepSpeed's a number.
        device = master.device if inner.defaults.get("fused") else "cpu"
        state = inner.state[master]
        state["step"] = step if on_cpu else torch.tensor(float(step), dtype=torch.float32, device=device)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(master.data)


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    """Return 2 or 3, or 0 without DeepSpeed."""
    return accelerator.deepspeed_plugin.zero_stage if is_deepspeed(accelerator) else 0


def parameter_dtypes(accelerator: Accelerator, trained: set[str]) -> dict[str, torch.dtype]:
    """Return the dtype to load each part of the model in.

    Trained parameters always have fp32 masters: DeepSpeed keeps them in its optimizer besides half-precision working
    weights; otherwise the parameters themselves are the masters, and autocast computes in half precision.
    """
    compute, master = compute_dtype(accelerator), master_dtype(accelerator)
    return {part: master if part in trained else compute for part in ("vision_tower", "projector", "language_model")}


def master_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype that trained parameters have in the model: DeepSpeed has their fp32 masters elsewhere."""
    return compute_dtype(accelerator) if is_deepspeed(accelerator) else torch.float32


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[accelerator.mixed_precision]


def describe(accelerator: Accelerator) -> str:
    """Return a line such as `2 processes, DeepSpeed ZeRO-3, bf16, cuda`."""
    count, precision = counted(accelerator.num_processes, "process"), accelerator.mixed_precision.replace("no", "fp32")
    return f"{count}, {backend(accelerator)}, {precision}, {accelerator.device.type}"


def backend(accelerator: Accelerator) -> str:
    """Return `DeepSpeed ZeRO-2`, `DeepSpeed ZeRO-3`, `DDP` or `no distribution`."""
    if is_deepspeed(accelerator):
        return f"DeepSpeed ZeRO-{zero_stage(accelerator)}"
    return "DDP" if accelerator.num_processes > 1 else "no distribution"


def is_offloaded(accelerator: Accelerator) -> bool:
    """Return whether the optimizer is in CPU memory; accelerate then replaces AdamW by DeepSpeed's for CPUs."""
    return is_deepspeed(accelerator) and accelerator.deepspeed_plugin.offload_optimizer_device not in (None, "none")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    found = {}
    for name in ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "tokenizers", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def end_training(accelerator: Accelerator, model: nn.Module) -> None:
    """End the process group; a model that was wrapped for DDP cannot be trained any further."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # They would keep the process group until the model is freed, and free it while holding the GIL, for which one
        # of gloo's threads may wait: a deadlock (pytorch issue 56297). The Python object of the process group releases
        # the GIL first.
        del model.logger, model.reducer
    accelerator.trackers = []  # `watch/trackers.py` has ended them, with failures as warnings
    accelerator.end_training()


def sum_over_ranks(accelerator: Accelerator, value: torch.Tensor | float | list) -> torch.Tensor:
    """Return numbers or a tensor summed over all ranks, fp64, on the device: one all-reduce; the host does not wait."""
    if torch.is_tensor(value):
        tensor = value.detach().to(accelerator.device, torch.float64, copy=True)
    else:  # from pinned memory, because a copy from any other makes the host wait for the device
        pinned = torch.tensor(value, dtype=torch.float64, pin_memory=accelerator.device.type == "cuda")
        tensor = pinned.to(accelerator.device, non_blocking=True)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_from_ranks(accelerator: Accelerator, mine: object) -> list:
    """Return the objects of all ranks, in order, on every rank. A collective: all ranks must call it."""
    if accelerator.num_processes == 1:
        return [mine]
    gathered = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, mine)
    return gathered
