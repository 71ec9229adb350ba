"""Every quirk of accelerate and DeepSpeed that the trainer has to know, each with its reason.

The loop in `train.py` uses `backward_and_step` and does not know which backend runs. Accumulation is 1 for accelerate
and for DeepSpeed: the loop says itself which micro-batch is the last, so that a step may have any number of them.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, LoggerType
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..guards import liveness
from ..model.llava import LlavaModel

# DeepSpeed calls collectives by names that torch is renaming; nobody who trains can act on that.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

# Micro-batches differ in length. In segments of fixed size their tensors leave holes, until the allocator gives
# everything back to the driver and begins again, in the middle of a step, or finds no room at all. It looks once, at
# the first question to a GPU, and be it whether that knows bf16: hence here and not in `build_accelerator`.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def launched_rank() -> tuple[int, int]:
    """(rank, number of processes), as the launcher says it, before any process group exists."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_precision(bf16: bool, fp16: bool, explicit: set[str]) -> str:
    """`bf16`, `fp16` or `no`: accelerate's config where it sets one, else the flags; a contradiction is an error.

    A bare `accelerate launch` exports `no` as well, so `no` counts as not set.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = "bf16" if bf16 else "fp16" if fp16 else "no"
    if launched not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision: {launched} of the accelerate config is unknown; known: no, bf16, fp16.")
    if launched != "no":
        asked = {"bf16": bf16, "fp16": fp16}
        contradicting = [name for name in asked if name in explicit and asked[name] != (launched == name)]
        if contradicting:
            name = contradicting[0]
            raise ValueError(f"--{name} {asked[name]} contradicts the accelerate config's mixed_precision: {launched}.")
        wanted = launched
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"  # V100, T4
    return wanted


def check_tracker(report_to: str) -> None:
    """Raises ValueError if it is not one that can report here."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("none", "all", *installed):
        # accelerate leaves out a tracker whose package is missing, and says so at level DEBUG only.
        known = ", ".join(sorted({"none", *LoggerType.list()} - {*installed}))
        raise ValueError(
            f"--report_to {report_to}: not installed or unknown. "
            f"Installed: {', '.join(installed)}; also known: {known}."
        )


def build_accelerator(precision: str, max_grad_norm: float, report_to: str, output_dir: Path) -> Accelerator:
    """The Accelerator for what the launcher started: one process, DDP, DeepSpeed ZeRO-2 or ZeRO-3, on GPU or CPU."""
    check_tracker(report_to)
    handlers, plugin = [], None
    launched = "WORLD_SIZE" in os.environ
    if launched:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # Only in launched runs: without a launcher accelerate would look for a process group that is not there.
        handlers.append(InitProcessGroupKwargs(backend=backend))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        plugin = DeepSpeedPlugin()
        complete_deepspeed_config(plugin.deepspeed_config, precision, max_grad_norm)
    accelerator = Accelerator(
        # Several processes on CPUs: without being told, accelerate makes a process group and then never synchronises
        # gradients. Told so under DeepSpeed, it leaves DeepSpeed out.
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
    """Raises ValueError where accelerate made something else of the launch, which it does without a word."""
    if wants_deepspeed and not is_deepspeed(accelerator):
        raise ValueError(
            "The accelerate config asks for DeepSpeed, but accelerate leaves it out when it is told to use the CPU: "
            "set use_cpu: false and unset ACCELERATE_USE_CPU; DeepSpeed takes the CPU by itself where there is no GPU."
        )
    launched = launched_rank()[1]
    if accelerator.num_processes != launched or (launched > 1 and accelerator.distributed_type == DistributedType.NO):
        raise ValueError(f"{launched} processes were launched, but accelerate would let each of them train alone.")


def complete_deepspeed_config(config: dict, precision: str, max_grad_norm: float) -> None:
    """Fills what the loop decides, in place. Raises ValueError where the file says something else."""
    for key in ("optimizer", "scheduler"):
        if key in config:
            # LLaVA's zero3_offload.json has both, and silently replaces parameter groups and cosine by them.
            raise ValueError(f"The DeepSpeed config has an entry {key!r}; remove it, the trainer brings its own.")
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", max_grad_norm):
        raise ValueError(
            f"gradient_clipping {clipping} of the DeepSpeed config contradicts --max_grad_norm {max_grad_norm}: "
            "remove it there."
        )
    config["gradient_clipping"] = float(max_grad_norm)  # left out or "auto" it would be 1.0
    config["train_micro_batch_size_per_gpu"] = 1  # of no effect: batches are never made by DeepSpeed
    config["gradient_accumulation_steps"] = 1
    config["zero_allow_untested_optimizer"] = True
    # Micro-batches add up in fp32: the default is the model's dtype, and bf16 sums drop what is 256 times smaller.
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    complete_zero(config["zero_optimization"], memory)
    for name in ("bf16", "fp16"):
        config.setdefault(name, {})["enabled"] = precision == name


def complete_zero(zero: dict, gpu_memory: float | None) -> None:
    """Fills what a `zero_optimization` leaves open, in place. Raises ValueError for a stage that is not supported.

    gpu_memory: of one GPU, bytes; None on CPUs.
    """
    if zero["stage"] not in (2, 3):
        raise ValueError(f"zero_stage: {zero['stage']} of the accelerate config is not supported; known: 2, 3.")
    # Half-precision parameters may stay gathered until they are used again in a seventh of the GPU: what was gathered
    # in forward then need not be gathered again in backward.
    keep_whole = 1_000_000_000 if gpu_memory is None else int(gpu_memory) // 7 // 2
    # "auto" would be derived from the hidden size of a `model.config` that LlavaModel does not have.
    for key, value in (
        ("reduce_bucket_size", 500_000_000),
        ("stage3_prefetch_bucket_size", 400_000_000),
        # Smaller parameters are never partitioned: all of CLIP-L's, whose hundreds of gathers cost more than 0.6 GB.
        ("stage3_param_persistence_threshold", 5_000_000),
        ("stage3_max_live_parameters", keep_whole),
        ("stage3_max_reuse_distance", keep_whole),
    ):
        if zero.get(key, "auto") == "auto" and (zero["stage"] == 3 or not key.startswith("stage3")):
            zero[key] = value
    zero.setdefault("overlap_comm", gpu_memory is not None)


def prepare(
    accelerator: Accelerator, model: LlavaModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, with layers as the unit in which ZeRO-3 gathers weights and reduces gradients.

    By default the unit is a single linear layer, and its hooks cost more of the host's time than a tower's layer takes
    on the GPU. DeepSpeed reduces the gradients of such a unit once the gradient of the unit's input is known, so the
    input must have one: it has, if anything in front of the language model is trained.
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
    return accelerator.prepare(model, optimizer)


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    """0 without DeepSpeed."""
    return accelerator.deepspeed_plugin.zero_stage if is_deepspeed(accelerator) else 0


def parameter_dtypes(accelerator: Accelerator, trained: set[str]) -> dict[str, torch.dtype]:
    """The dtype to load each part of the model in.

    Trained parameters always have fp32 masters: DeepSpeed keeps them in its optimizer beside half-precision working
    weights; otherwise the parameters themselves are the masters, and autocast computes in half precision.
    """
    compute, master = compute_dtype(accelerator), master_dtype(accelerator)
    return {part: master if part in trained else compute for part in ("vision_tower", "projector", "language_model")}


def master_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype that trained parameters have in the model: DeepSpeed has their fp32 masters elsewhere."""
    return compute_dtype(accelerator) if is_deepspeed(accelerator) else torch.float32


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[accelerator.mixed_precision]


def check_bitsandbytes(bits: int) -> None:
    """Raises ValueError if weights are to be quantised and the package is not installed."""
    if bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--bits {bits} needs the package bitsandbytes: pip install bitsandbytes.")


def quantisation(accelerator: Accelerator, bits: int, double_quant: bool, quant_type: str) -> dict:
    """What transformers' `from_pretrained` needs to read the language model in 4 or 8 bits; nothing for 16.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if bits == 16:
        return {}
    check_bitsandbytes(bits)
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype(accelerator),
        # ZeRO-3 divides the parameters of one dtype, so the packed bytes pass for numbers of the computation's.
        bnb_4bit_quant_storage=compute_dtype(accelerator) if zero_stage(accelerator) == 3 else torch.uint8,
    )
    return {"quantization_config": config}


def describe(accelerator: Accelerator) -> str:
    """`2 processes, DeepSpeed ZeRO-3, bf16, cuda`"""
    count = f"{accelerator.num_processes} process" + ("es" if accelerator.num_processes > 1 else "")
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{count}, {backend(accelerator)}, {precision}, {accelerator.device.type}"


def backend(accelerator: Accelerator) -> str:
    """`DeepSpeed ZeRO-3`, `DDP`, `no distribution`"""
    if is_deepspeed(accelerator):
        return f"DeepSpeed ZeRO-{zero_stage(accelerator)}"
    return "DDP" if accelerator.num_processes > 1 else "no distribution"


def memory_note(accelerator: Accelerator, model: nn.Module) -> str | None:  # pragma: no cover, needs a GPU
    """What a bare `accelerate launch` on several GPUs, which is DDP, costs on each of them; None elsewhere."""
    if accelerator.distributed_type != DistributedType.MULTI_GPU:
        return None
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(
        parameter.numel() * parameter.element_size() for parameter in parameters if not parameter.requires_grad
    )
    # fp32 weights, gradients, DDP's copy of them in its buckets, and two moments.
    return (
        f"DDP keeps all weights, gradients and moments on every GPU, {(20 * trained + frozen) / 2**30:.1f} GiB each "
        "before activations; --config_file accelerate_configs/zero3.yaml divides them among the GPUs."
    )


def is_offloaded(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed keeps the optimizer in CPU memory; accelerate then replaces AdamW by DeepSpeed's for CPUs."""
    return is_deepspeed(accelerator) and accelerator.deepspeed_plugin.offload_optimizer_device not in (None, "none")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "tokenizers", "pillow")
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def backward_and_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterator[torch.Tensor],
    count: int,
    max_grad_norm: float,
) -> tuple[torch.Tensor | float, bool]:
    """Backward for each of `count` losses, gradients synchronised with the last one, clip, step.

    A loss that is not finite makes the whole gradient so, on all ranks, and a gradient that is not finite takes no
    step. The host waits for the device here, once, before the optimizer.

    Args:
        losses: yields the losses lazily, so that each forward runs right before its backward.

    Returns:
        The global gradient norm before clipping (without a meaning if not finite under DeepSpeed), on the device where
        the backend leaves it there; and whether it was finite, the same on all ranks.
    """
    deepspeed = is_deepspeed(accelerator)
    unsynchronised = getattr(model, "no_sync", contextlib.nullcontext)
    for number in range(1, count + 1):
        last = number == count
        # DeepSpeed is told through accelerate's flag (its own no_sync is refused by ZeRO-2 and ZeRO-3); DDP has to know
        # already in forward.
        accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last or deepspeed else unsynchronised():
            loss = next(losses)
            # An infinite loss may have a finite gradient: where the target's logit is -inf, softmax has no fault.
            accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
    if deepspeed:  # clipped and stepped inside the last backward, or left out without a word
        return accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm(), not optimizer.step_was_skipped
    accelerator.unscale_gradients(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else float("inf"))
    finite = bool(norm.isfinite())
    if finite or accelerator.scaler is not None:  # the scaler leaves the step out by itself, and lowers the scale
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def forward_and_backward(accelerator: Accelerator, model: nn.Module, batch: dict) -> None:
    """Like any micro-batch of a step but the last: gradients are added up, nothing is synchronised or stepped."""
    accelerator.gradient_state._set_sync_gradients(False)
    unsynchronised = contextlib.nullcontext if is_deepspeed(accelerator) else getattr(model, "no_sync", None)
    with (unsynchronised or contextlib.nullcontext)():
        accelerator.backward(model(**to_device(batch, accelerator.device)))


def discard_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Forgets what backward has added up since the last step, so that the next step is as if it had not run."""
    inner = optimizer.optimizer  # accelerate's own zero_grad does nothing between two steps, nor under DeepSpeed
    inner.zero_grad(set_to_none=True)  # ZeRO-3 then overwrites with the next micro-batch instead of adding
    if zero_stage(accelerator) == 2:  # as DeepSpeed does where it leaves a step out
        inner.micro_step_id = -1
        for sums in (inner.averaged_gradients, inner.all_grad_tensors):
            sums.update(dict.fromkeys(sums))


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


@contextlib.contextmanager
def never_fatal(consequence: str) -> Iterator[None]:
    """What fails inside costs a warning, the first time that it has this consequence, and never the run."""
    try:
        yield
    except Exception as error:  # trackers raise whatever their networks and libraries raise
        _warn_once(f"{consequence}; the run goes on", f"{type(error).__name__}: {error}")


_told: set[str] = set()


def _warn_once(consequence: str, reason: str) -> None:
    # Python's own "once" begins anew whenever somebody changes the filters, as reading an image does.
    if consequence not in _told:
        _told.add(consequence)
        warnings.warn(f"{consequence} ({reason}).", stacklevel=2)


def start_trackers(accelerator: Accelerator, values: dict, resumed_at: int | None = None, table: str = "") -> None:
    """Starts the trackers of `--report_to` with all arguments as text, TensorBoard with the trainable table too.

    resumed_at: the step a resumed run goes on from; TensorBoard then hides what the run before logged beyond it.
    """
    text = {key: str(value) for key, value in values.items()}
    # TensorBoard would file a configuration under hyper-parameters, as two more runs; as text it is read.
    config = None if accelerator.log_with == [LoggerType.TENSORBOARD] else text
    purge_step = 0 if resumed_at is None else resumed_at + 1
    names = ", ".join(str(tracker) for tracker in accelerator.log_with)
    try:
        accelerator.init_trackers("runs", config=config, init_kwargs={"tensorboard": {"purge_step": purge_step}})
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard" and accelerator.is_main_process:
                rows = "\n".join(f"| {key} | {value} |" for key, value in text.items())
                tracker.writer.add_text("arguments", f"| flag | value |\n|---|---|\n{rows}")
                tracker.writer.add_text("what is trained", f"```\n{table}\n```")
    except Exception as error:
        accelerator.trackers = []
        _warn_once(f"{names} could not be started; log.jsonl has the same values", f"{type(error).__name__}: {error}")


# TensorBoard makes a page of the names with the same beginning and opens the first two, which are then held-out values
# and losses. In log.jsonl names are short.
PAGES = {
    "norms": ("gradient_norm", "update_norm", "parameter_norm"),
    "speed": (
        *("tokens_per_second", "computed_tokens_per_second", "samples_per_second", "seconds_per_step", "mfu", "mfu_6n"),
        *("data_wait", "padding", "peak_memory_gib", "save_seconds", "epoch"),
    ),
}


def name_on_page(name: str) -> str:
    """The name that trackers know a value of log.jsonl by: `speed/mfu`, `rates/projector`, `loss/image_samples`."""
    for page, names in PAGES.items():
        if name in names:
            return f"{page}/{name}"
    if name.startswith("learning_rate"):
        return f"rates/{name.removeprefix('learning_rate/')}"
    if name.startswith("loss_by_modality/"):
        return f"loss/{name.removeprefix('loss_by_modality/')}_samples"
    return name


def log(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Gives the values of a step to the trackers, sorted into pages."""
    values = {name_on_page(name): value for name, value in values.items()}
    for tracker in accelerator.trackers:
        with never_fatal(f"{tracker.name} lacks entries, which log.jsonl has"):
            tracker.log(values, step=step)


def show(accelerator: Accelerator, name: str, picture: np.ndarray, text: str, step: int) -> None:
    """Gives TensorBoard alone a picture, uint8 [H, W, 3], and a text in Markdown. Raises whatever its writer raises."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard" and accelerator.is_main_process:
            tracker.writer.add_image(name, picture, step, dataformats="HWC")
            tracker.writer.add_text(name, text, step)
            tracker.writer.flush()


def end_training(accelerator: Accelerator, model: nn.Module) -> None:
    """Ends trackers and process group; a model that was wrapped for DDP cannot be trained any further."""
    liveness.leave("finished")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # They would keep the process group until the model goes, and drop it while holding Python's lock, for which one
        # of gloo's threads may wait to let go of its last collective: a deadlock (pytorch issue 56297). The process
        # group's own Python object lets go of the lock first.
        del model.logger, model.reducer
    for tracker in accelerator.trackers:
        with never_fatal(f"{tracker.name} lacks entries, which log.jsonl has"):
            tracker.finish()
    accelerator.trackers = []
    accelerator.end_training()


def sum_over_ranks(accelerator: Accelerator, value: torch.Tensor | float | list) -> torch.Tensor:
    """Numbers or a tensor summed over all ranks in fp64, left on the device: one collective, and no wait for it."""
    if torch.is_tensor(value):
        tensor = value.detach().to(accelerator.device, torch.float64, copy=True)
    else:  # from pinned memory, because a copy from any other makes the host wait for the device
        pinned = torch.tensor(value, dtype=torch.float64, pin_memory=accelerator.device.type == "cuda")
        tensor = pinned.to(accelerator.device, non_blocking=True)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_from_ranks(accelerator: Accelerator, mine: object) -> list:
    """An object of every rank, by rank, on every rank. A collective: all ranks must call it."""
    if accelerator.num_processes == 1:
        return [mine]
    gathered = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, mine)
    return gathered
