"""`--dry_run`: what a run will train, and whether it fits, worked out from configurations and shapes alone.

LLaVA tells by starting. Nothing heavy is read here, no weight and no image, and there need be no GPU: a laptop plans
for eight cards of 80 GB. Where memory does not suffice, in the plan or in a run, the first change that makes it fit is
named.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..arguments import Arguments, TrainingArguments
from ..build import plan_of, trainable_table
from ..data.lengths import Lengths, measure_some
from ..formats.read import Source, assemble, empty_parts
from ..guards import preflight
from ..guards.longest import Longest, kept_of_a_position, longest_micro_batch
from ..guards.output_folder import disk_needs
from ..inputs import open_samples
from ..model.llava import LlavaModel
from ..model.trained import apply_plan, trained_in_full
from ..options import lora
from ..options.attention import CAPPED, choose_attention
from ..options.image_tokens import add_token_rows
from ..options.kernels import FUSABLE, choose_fused_kernels
from ..training.backend import choose_precision, complete_zero, launched_rank, zero_stage
from ..training.optimizer import parameter_groups
from ..training.order import choose_order
from ..watch.flops import PEAK_FLOPS, FlopCounter
from ..words import counted
from .memory import GIB, Estimate, Layout, estimate, kept_of_a_picture, lasting_parts

MEASURED_AT_MOST = 2000  # records, where the lengths of all are not in the cache
CARD_OF_80_GB = 79 * GIB


# --- a model without memory ------------------------------------------------------------------------------------------


@dataclass
class Planned:
    """A run as far as its memory goes.

    Attributes:
        share: of the language model's layers that are recomputed in backward.
    """

    arguments: Arguments
    source: Source
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    layout: Layout
    longest: Longest
    share: float

    @property
    def fused(self) -> bool:
        """Whether norms and MLPs will be Liger's: as asked; if nothing is, where the package is installed here."""
        family, asked = self.source.language_config.model_type, self.arguments.training.use_liger_kernel
        if asked is not None:
            return asked and family in FUSABLE
        return choose_fused_kernels(None, family, torch.device("cuda"))

    def model(self) -> tuple[LlavaModel, dict[str, str]]:
        """What `build_model` builds, on the meta device, and its freeze plan."""
        flags, training = self.arguments.model, self.arguments.training
        plan, parts = plan_of(self.arguments, self.source), empty_parts(self.source)
        model = assemble(self.source, parts | {"vision_tower": self.source.as_tower(parts["vision_tower"])})
        for name, part in model.named_children():
            part.to(self.layout.master_dtype if name in trained_in_full(plan) else self.layout.compute_dtype)
        if training.lora_enable:
            lora.add_lora(
                model.language_model,
                flags.model_name_or_path,
                training.lora_r,
                training.lora_alpha,
                training.lora_dropout,
                training.lora_bias,
                self.layout.master_dtype,
                training.seed,
            )
        marks = flags.mm_use_im_start_end, flags.mm_use_im_patch_token
        trains_rows = "new_tokens" in plan
        add_token_rows(model, self.tokenizer, self.new_tokens, *marks, None, trains_rows, self.layout.master_dtype)
        apply_plan(model, plan)
        family = self.source.language_config.model_type
        half, packing = self.layout.precision != "no", self.arguments.data.packing
        standard = "eager" if family in CAPPED else "varlen" if half and packing else "sdpa"
        attention = flags.attn_implementation or standard
        # FlashAttention need not be installed here; it keeps for backward what PyTorch's does.
        to_check = "eager" if attention.startswith("flash") else attention
        choose_attention(to_check, family, packing, torch.device("cuda"), half)  # it may refuse
        model.language_model.config._attn_implementation = attention
        if self.share:
            model.gradient_checkpointing_enable(self.share)
        return model.train(), plan

    def estimate(self, tokens: int | None = None) -> Estimate:
        """The memory it needs, with its longest micro-batch or one of so many tokens."""
        shape = self.longest.shape if tokens is None else self.longest.shape.of_tokens(tokens)
        bits = self.arguments.training.bits
        several = self.longest.several or tokens is not None
        return estimate(self.model()[0], self.layout, shape, several, self.fused, bits)

    def first_change(self, limit: float) -> str | None:
        """The change that costs least speed of those after which it needs at most `limit` bytes; None if none does."""
        now, least = self.longest.shape.tokens, self.longest.longest_sample
        for words, changed in self._changes():
            if sum(lasting_parts(changed.model()[0], changed.layout, self.arguments.training.bits)[0].values()) > limit:
                continue
            with_one_sample = changed.estimate(least).needed
            if with_one_sample > limit:
                continue
            with_all = changed.estimate(now).needed
            if words and with_all <= limit:
                return " and ".join(words)
            # In between memory grows evenly with the tokens; a tenth less, because some samples train more of theirs.
            share = (limit - with_one_sample) / max(1.0, with_all - with_one_sample)
            most = max(least, int(least + 0.9 * share * (now - least)) // 100 * 100)
            if most < now:
                return " and ".join([*words, f"--max_tokens_per_micro_batch {most}"])
        return None

    def _changes(self) -> Iterator[tuple[list[str], "Planned"]]:
        """Other ways to run it, the fastest first, each as words and as a plan; the first is the run as it is."""
        yield [], self
        recompute = ["--gradient_checkpointing True"] + (
            ["--gradient_checkpointing_share 1"] if 0 < self.share < 1 else []
        )
        if self.share < 1:
            yield recompute, replace(self, share=1.0)
        divided = replace(self, layout=_zero3(self.layout, self.layout.gpus, offload=False))
        config = ["--config_file accelerate_configs/zero3.yaml"]
        if self.layout.gpus > 1 and self.layout.zero_stage != 3:
            yield config, divided
            if self.share < 1:
                yield [*config, *recompute], replace(divided, share=1.0)
        all_of_it = recompute if self.share < 1 else []
        offloaded = replace(divided, share=1.0, layout=_zero3(self.layout, self.layout.gpus, offload=True))
        yield ["--config_file accelerate_configs/zero3_offload.yaml", *all_of_it], offloaded
        for gpus in (2, 4, 8, 16, 32, 64):
            if gpus > self.layout.gpus:
                more = replace(divided, share=1.0, layout=_zero3(self.layout, gpus, offload=False))
                yield [f"{gpus} GPUs", *config, *all_of_it], more


def _zero3(layout: Layout, gpus: int, offload: bool) -> Layout:
    """The same GPUs, or more of them, as `zero3.yaml` and `zero3_offload.yaml` use them."""
    device = {"device": "cpu" if offload else "none"}
    zero = {"stage": 3, "offload_optimizer": device, "offload_param": device}
    complete_zero(zero, layout.gpu_memory)
    return replace(layout, gpus=gpus, zero_stage=3, zero=zero)


def planned_run(
    arguments: Arguments,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    devices: Layout,
    lengths: Lengths,
    layout: str,
    dealt_batches: Iterable[list[list[list[int]]]],
) -> Planned:
    """A run on these devices. `new_tokens`: see `build_model`; the last three: see `longest_micro_batch`."""
    share = arguments.training.gradient_checkpointing * arguments.training.gradient_checkpointing_share
    of_a_position = kept_of_a_position(source.language_config, share)
    logits_weigh, pictures_weigh = 3 * source.language_config.get_text_config().vocab_size / of_a_position, 0.0
    if "vision_tower" in trained_in_full(plan_of(arguments, source)):  # a frozen one keeps nothing
        tower = source.as_tower(empty_parts(source)["vision_tower"])
        pictures_weigh = kept_of_a_picture(tower) / of_a_position
    longest = longest_micro_batch(dealt_batches, lengths, layout, logits_weigh, pictures_weigh)
    return Planned(arguments, source, tokenizer, new_tokens, devices, longest, share)


# --- what it is to run on --------------------------------------------------------------------------------------------


def read_layout(training: TrainingArguments, explicit: set[str]) -> Layout:
    """What `--accelerate_config` or the launcher says, for the GPUs of `--num_gpus` and `--gpu_memory_gib`.

    Raises:
        ValueError: the file is none of accelerate's, or asks for something that is not supported.
    """
    if training.gpu_memory_gib is not None:
        memory = training.gpu_memory_gib * GIB
    else:
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else CARD_OF_80_GB
    if training.accelerate_config is not None:
        gpus, deepspeed = _read_accelerate_config(training.accelerate_config)
    else:
        gpus, deepspeed = launched_rank()[1], _launched_deepspeed()
    gpus = training.num_gpus or gpus
    precision = choose_precision(training.bf16, training.fp16, explicit)
    if deepspeed is None:
        return Layout(gpus, memory, precision)
    if file := deepspeed.get("deepspeed_config_file"):
        zero = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
    else:
        zero = {"stage": int(deepspeed["zero_stage"])}
        for part in ("optimizer", "param"):
            zero[f"offload_{part}"] = {"device": deepspeed.get(f"offload_{part}_device") or "none"}
    complete_zero(zero, memory)
    return Layout(gpus, memory, precision, zero["stage"], zero)


def _read_accelerate_config(file: str) -> tuple[int, dict | None]:
    """The number of processes, and what is said of DeepSpeed."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        kind, gpus = config["distributed_type"], int(config["num_processes"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"--accelerate_config {file} is no config file of accelerate ({type(error).__name__}: {error}); "
            "accelerate_configs/ has one for each way to run."
        ) from None
    return gpus, config["deepspeed_config"] if kind == "DEEPSPEED" else None


def _launched_deepspeed() -> dict | None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    names = ("zero_stage", "offload_optimizer_device", "offload_param_device")
    found = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}") for name in names}
    return found | {"deepspeed_config_file": os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")}


def running_layout(accelerator: Accelerator) -> Layout:
    """What this process runs on."""
    on_gpu = accelerator.device.type == "cuda"
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory if on_gpu else CARD_OF_80_GB
    stage = zero_stage(accelerator)
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"] if stage else None
    return Layout(accelerator.num_processes, memory, accelerator.mixed_precision, stage, zero)


# --- the plan of a run -----------------------------------------------------------------------------------------------


def plan_run(arguments: Arguments, source: Source) -> None:
    """Print the plan.

    Raises:
        ValueError: its parts do not belong together, or it cannot fit; the sentence names what to change.
    """
    training = arguments.training
    output_dir = Path(training.output_dir)
    layout = read_layout(training, arguments.explicit)
    samples = open_samples(arguments, source, output_dir / "cache")
    lengths, measured = measure_some(samples, output_dir / "cache", MEASURED_AT_MOST)
    order = choose_order(arguments, samples.store, lengths, layout.gpus)
    sampler, steps = order.sampler, order.total_steps
    # One epoch: in the others the same samples meet others, which hardly makes a micro-batch longer.
    dealt = list(order.dealt_batches(min(steps, sampler.steps_per_epoch)))
    print(*preflight.report(preflight.check_run(arguments, source, samples, lengths, order), training.allow), sep="\n")
    parts = (samples.tokenizer, samples.new_tokens)
    planned = planned_run(arguments, source, *parts, layout, lengths, order.layout, dealt)
    longest = planned.longest
    model, plan = planned.model()
    rates = {"projector": training.mm_projector_lr, "vision_tower": training.mm_vision_tower_lr}
    rates["image_newline"] = rates["projector"]
    groups = parameter_groups(model, training.learning_rate, training.weight_decay, rates)

    print(f"\n{layout}\n\n{trainable_table(model, groups, plan)}\n")
    if order.note:
        print(order.note)
    counts = [len(micro_batches) for micro_batches in dealt]
    print(
        f"Global batch: {counted(sampler.global_batch_size, 'sample')} on {counted(layout.gpus, 'GPU')}, on each in "
        f"{sum(counts) / len(counts):.1f} micro-batches a step (at most {max(counts)}), {order.layout}. "
        f"Longest micro-batch: {counted(longest.shape.tokens, 'token')}, "
        f"{counted(longest.shape.images, 'image')} through the tower."
    )
    guessed = "" if measured == len(samples) else f" (as {measured:,} of them say)"
    epochs = steps / sampler.steps_per_epoch
    print(
        f"{counted(len(samples), 'record')}, {int(lengths.has_image.sum()):,} with images, "
        f"{counted(int(lengths.length.sum()), 'token')}{guessed}: {counted(steps, 'step')}, {epochs:.2f} epochs."
    )
    print(_time(model, lengths, epochs, layout, training))
    trained = trained_in_full(plan)
    whole_model = bool(trained - {"projector", "new_tokens", "image_newline"}) and not training.lora_enable
    saves = steps // training.save_steps if training.save_strategy == "steps" else 0
    sizes = (layout.compute_dtype.itemsize, output_dir, saves, training.save_total_limit, whole_model)
    needs, folder = disk_needs(model, *sizes), output_dir.resolve()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    short = "" if needs.bytes <= free else " Too little: make room, or keep fewer with --save_total_limit."
    print(f"Disk: {output_dir} needs {needs}; {free / 1e9:,.0f} GB are free here.{short}")

    found = planned.estimate()
    kernels = "Liger's kernels" if planned.fused else "no fused kernels (--use_liger_kernel True plans with them)"
    recomputed = f"{planned.share:.0%} of the layers recomputed" if planned.share else "nothing recomputed"
    print(f"\nMemory of each GPU, GiB, when most is in use ({recomputed}, {kernels}):")
    print("\n".join(found.lines()) + "\n")
    if found.needed <= layout.gpu_memory:
        left = layout.gpu_memory - found.needed
        print(f"It fits: {left / GIB:.1f} of {layout.gpu_memory / GIB:.1f} GiB are left.")
        return
    raise ValueError(
        f"It does not fit: {found.needed / GIB:.1f} GiB are needed and a GPU has {layout.gpu_memory / GIB:.1f}. "
        f"{_advice(planned, layout.gpu_memory)}"
    )


def _time(model: LlavaModel, lengths: Lengths, epochs: float, layout: Layout, training: TrainingArguments) -> str:
    name = training.gpu_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H100")
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part.lower() in name.lower()), None)
    if peak is None:
        if training.gpu_name:
            raise ValueError(f"--gpu_name {name}: its peak is not known here; known: {', '.join(PEAK_FLOPS)}.")
        return f"Time: the peak of a {name} is not known here; --gpu_name takes one of {', '.join(PEAK_FLOPS)}."
    operations = epochs * FlopCounter(model).of_lengths(lengths)
    seconds = operations / (layout.gpus * peak * training.expected_mfu)
    hours = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return (
        f"Time: {hours}, if {training.expected_mfu:.0%} of the {peak / 1e12:,.0f} TFLOP/s of each {name} go "
        "into arithmetic (--expected_mfu; `mfu` in the log of a run), without evaluation and saving."
    )


def _advice(planned: Planned, limit: float) -> str:
    if change := planned.first_change(limit):
        return f"The first change that makes it fit: {change}."
    return (
        "Nothing that changes only the speed makes it fit, up to 64 GPUs and offload; train less (--lora_enable True) "
        "or a smaller model, or cut the samples (--model_max_length)."
    )


# --- a run that has run out ------------------------------------------------------------------------------------------


@dataclass
class Advice:
    """What to change when a run has no memory left.

    Attributes:
        planned: the run, once its longest micro-batch is known.
    """

    planned: Planned | None = None

    def if_memory_has_run_out(self, error: RuntimeError) -> str | None:
        """A sentence with the first change that makes it fit; None for any other error."""
        first_line = str(error).splitlines()[0] if str(error) else ""
        marks = ("DefaultCPUAllocator: ", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, torch.OutOfMemoryError) and not any(mark in str(error) for mark in marks):
            return None
        said = f"Memory has run out ({first_line.split('. ')[0]})."
        if self.planned is None:
            return f"{said} It was not the training: look what else is in memory; --dry_run shows what the run needs."
        # The estimate says it would fit, or it would have been refused; so it is wrong, or others use the memory too.
        limit = 0.9 * min(self.planned.estimate().needed, self.planned.layout.gpu_memory)
        tokens = self.planned.longest.shape.tokens
        return (
            f"{said} The longest micro-batch has {tokens:,} tokens. {_advice(self.planned, limit)} The same flags with "
            "--dry_run True show what needs how much."
        )
