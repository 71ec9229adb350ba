"""What a run will train, and whether it fits, worked out from configurations and shapes alone.

LLaVA tells by starting. Nothing heavy is read here, no weight and no image, and there need be no GPU: a laptop plans
for eight cards of 80 GB. Where memory does not suffice, in the plan or in a run, the first change that makes it fit is
named.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import arguments as flags
from .. import demo
from ..arguments import Arguments, TrainingArguments
from ..command_line import Parser, add_flags
from ..guards.early import check_files, refuse_at_once
from ..processes import launched_rank


@dataclass
class PlanArguments:
    """Plan"""

    accelerate_config: str | None = None
    """Plan for this file of accelerate_configs/. Default: what the launcher started."""

    num_gpus: int | None = flags.flag(None, positive=True)
    """Number of GPUs to plan for. Default: what accelerate_config or the launcher says."""

    gpu_memory_gib: float | None = flags.flag(None, positive=True)
    """Memory of each GPU. Default: that of the GPU here, or 79 without one (cards of 80 GB)."""

    gpu_name: str | None = None
    """Kind of GPU (A100, H100, ...) to estimate hours for. Default: the GPU here, or H100 without one."""

    expected_mfu: float = flags.flag(0.5, positive=True)
    """Share of the GPUs' peak that is used, to estimate hours: `mfu` in a run's log."""


def split_flags(command_line: Sequence[str] | None = None) -> tuple[PlanArguments, list[str]]:
    """Return what a run is planned for, and the other flags, which are train.py's."""
    parser = Parser(
        prog="python -m mini_llava.tools.plan",
        description="Shows what a run will train, its steps, memory by part, hours and disk, without reading weights "
        "or needing a GPU. What cannot fit ends with an error that names the first change that makes it fit. All other "
        "flags are those of train.py.",
        allow_abbrev=False,
    )
    add_flags(parser, PlanArguments)
    given, of_train = parser.parse_known_args(command_line)
    return PlanArguments(**vars(given)), of_train


def parse_arguments(command_line: Sequence[str] | None = None) -> tuple[Arguments, PlanArguments]:
    """Return the run's arguments, and what it is planned for. A fault ends the program with one sentence."""
    planning, of_train = split_flags(command_line)
    return flags.parse_arguments(of_train, "plan", vars(planning)), planning


def check_given(arguments: Arguments, planning: PlanArguments) -> None:
    """Raise UserError or OSError for a value that cannot be, or a file that is not there."""
    flags.check_values(planning)
    check_files(arguments, weights=False)


if __name__ == "__main__" and launched_rank()[0] == 0:  # before the imports below, which take seconds
    refuse_at_once("plan", 1, check_given, *parse_arguments())

import torch
import yaml
from accelerate import Accelerator

from ..build import plan_of, trainable_table
from ..data.lengths import Lengths, measure_some
from ..data.samples import Samples
from ..errors import UserError
from ..formats.read import Source, assemble, empty_parts, open_source
from ..formats.write import check_may_be_written
from ..guards import preflight
from ..guards.longest import Longest, kept_of_a_position, longest_micro_batch
from ..guards.output_folder import disk_needs
from ..guards.user_errors import USER_ERRORS
from ..inputs import open_samples
from ..model.llava import LlavaModel
from ..model.trained import apply_plan, trained_in_full
from ..options import lora
from ..options.attention import CAPPED, choose_attention
from ..options.image_tokens import add_token_rows
from ..options.kernels import FUSABLE, choose_fused_kernels
from ..options.token_rows import TokenRows, trained_ids
from ..read_data import Data
from ..training.backend import choose_precision, complete_zero, zero_stage
from ..training.optimizer import parameter_groups
from ..training.order import Order, choose_order, steps_between_states
from ..watch.flops import PEAK_FLOPS, FlopCounter
from ..words import counted
from .memory import GIB, Estimate, Layout, estimate, float8_copies, kept_of_a_picture, lasting_parts

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
    samples: Samples
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
        """Return what `build_model` builds, on the meta device, and its freeze plan."""
        model_flags, training = self.arguments.model, self.arguments.training
        plan, parts = plan_of(self.arguments, self.source), empty_parts(self.source)
        model = assemble(self.source, parts | {"vision_tower": self.source.as_tower(parts["vision_tower"])})
        for name, part in model.named_children():
            part.to(self.layout.master_dtype if name in trained_in_full(plan) else self.layout.compute_dtype)
        if training.lora_enable:
            name, dtype = model_flags.model_name_or_path, self.layout.master_dtype
            lora.add_lora(model.language_model, name, training, dtype)
        if training.lora_vision_tower:
            lora.add_tower_lora(model.vision_tower, training, self.layout.master_dtype)
        marks = model_flags.mm_use_im_start_end, model_flags.mm_use_im_patch_token
        tokenizer, dtype = self.samples.tokenizer, self.layout.master_dtype
        add_token_rows(model, tokenizer, self.samples.new_tokens, marks)
        if "new_tokens" in plan:
            ids = trained_ids(self.arguments, tokenizer)
            model.new_tokens = TokenRows(model.language_model, ids, dtype, with_head=training.lora_enable)
        apply_plan(model, plan)
        family = self.source.language_config.model_type
        half, packing = self.layout.precision != "no", self.arguments.data.packing
        standard = "eager" if family in CAPPED else "varlen" if half and packing else "sdpa"
        attention = model_flags.attn_implementation or standard
        # FlashAttention need not be installed here; it keeps for backward what PyTorch's does.
        to_check = "eager" if attention.startswith("flash") else attention
        choose_attention(to_check, family, packing, torch.device("cuda"), half)  # it may refuse
        model.language_model.config._attn_implementation = attention
        if self.share:
            model.gradient_checkpointing_enable(self.share)
        return model.train(), plan

    def estimate(self, tokens: int | None = None) -> Estimate:
        """Return the memory it needs, with its longest micro-batch or one of so many tokens."""
        shape = self.longest.shape if tokens is None else self.longest.shape.of_tokens(tokens)
        training, several = self.arguments.training, self.longest.several or tokens is not None
        found = estimate(self.model()[0], self.layout, shape, several, self.fused, training.bits)
        if training.fp8:
            found.parts["float8 copies of an MLP"] = float8_copies(self.source.language_config, shape)
        return found

    def first_change(self, limit: float) -> str | None:
        """Return the change that costs least speed of those that make it fit `limit` bytes; None if none does."""
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


def recomputed_share(training: TrainingArguments) -> float:
    """Return the share of the language model's layers that are recomputed in backward."""
    return training.gradient_checkpointing * training.gradient_checkpointing_share


def longest_of(
    arguments: Arguments, source: Source, lengths: Lengths, order: Order, steps: int | None = None
) -> Longest:
    """Return the micro-batch of a run, or of so many of its steps, that takes most memory."""
    of_a_position = kept_of_a_position(source.language_config, recomputed_share(arguments.training))
    logits_weigh, pictures_weigh = 3 * source.language_config.get_text_config().vocab_size / of_a_position, 0.0
    if plan_of(arguments, source)["vision_tower"] != "frozen":  # which keeps nothing
        tower = source.as_tower(empty_parts(source)["vision_tower"])
        pictures_weigh = kept_of_a_picture(tower) / of_a_position
    return longest_micro_batch(order.dealt_batches(steps), lengths, order.layout, logits_weigh, pictures_weigh)


# --- what it is to run on --------------------------------------------------------------------------------------------


def read_layout(planning: PlanArguments, training: TrainingArguments, explicit: set[str]) -> Layout:
    """Return what `--accelerate_config` or the launcher says, for the GPUs of `--num_gpus` and `--gpu_memory_gib`.

    Raises:
        UserError: the file is none of accelerate's, or asks for something that is not supported.
    """
    if planning.gpu_memory_gib is not None:
        memory = planning.gpu_memory_gib * GIB
    else:
        memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else CARD_OF_80_GB
    if planning.accelerate_config is not None:
        gpus, deepspeed = _read_accelerate_config(planning.accelerate_config)
    else:
        gpus, deepspeed = launched_rank()[1], _launched_deepspeed()
    gpus = planning.num_gpus or gpus
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
        raise UserError(
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
    """Return the layout that this process runs on."""
    on_gpu = accelerator.device.type == "cuda"
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory if on_gpu else CARD_OF_80_GB
    stage = zero_stage(accelerator)
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"] if stage else None
    return Layout(accelerator.num_processes, memory, accelerator.mixed_precision, stage, zero)


# --- the plan of a run -----------------------------------------------------------------------------------------------


def plan(arguments: Arguments, planning: PlanArguments) -> None:
    """Print the plan of a run. Nothing is written but the lengths of records, into their cache.

    Raises:
        OSError, UserError: as `print_run`, and a change to make where it does not fit.
    """
    planned = print_run(arguments, planning)
    print_memory(planned, planned.estimate())


def print_run(arguments: Arguments, planning: PlanArguments) -> Planned:
    """Print what a run trains, its steps, hours and disk, and return it as far as its memory goes.

    Raises:
        OSError: a file that the flags name is not there.
        UserError: its parts do not belong together; the sentence names what to change.
    """
    flags.check_values(planning)
    training, output_dir = arguments.training, Path(arguments.training.output_dir)
    if arguments.is_demo:
        arguments, note = demo.prepare_run(arguments)
        print(note)
    check_files(arguments, weights=False)
    source = open_source(arguments.model, arguments.explicit, arguments.data)
    arguments = arguments.fixed_by(source)
    print(source.describe(arguments.model.pretrain_mm_mlp_adapter))
    check_may_be_written(output_dir, arguments.model, training.export_format, source.vision_config)
    layout = read_layout(planning, training, arguments.explicit)
    samples = open_samples(arguments, source, output_dir / "cache")
    lengths, measured = measure_some(samples, output_dir / "cache", MEASURED_AT_MOST)
    order = choose_order(arguments, samples.store, lengths, layout.gpus)
    print(*preflight.report(preflight.check_run(arguments, source, samples, lengths, order), training.allow), sep="\n")
    # One epoch: in the others the same samples meet others, which hardly makes a micro-batch longer.
    longest = longest_of(arguments, source, lengths, order, min(order.total_steps, order.sampler.steps_per_epoch))
    planned = Planned(arguments, source, samples, layout, longest, recomputed_share(training))
    model, parts = planned.model()
    rates = {"projector": training.mm_projector_lr, "vision_tower": training.mm_vision_tower_lr}
    rates["image_newline"] = rates["projector"]
    groups = parameter_groups(model, training.learning_rate, training.weight_decay, rates)

    print(f"\n{layout}\n\n{trainable_table(model, groups, parts)}\n")
    if order.note:
        print(order.note)
    _print_steps(samples, lengths, measured, order, longest)
    epochs = order.total_steps / order.sampler.steps_per_epoch
    print(_time(FlopCounter(model).of_lengths(lengths) * epochs, layout, planning))
    print(_disk(planned, model, order))
    return planned


def _print_steps(samples: Samples, lengths: Lengths, measured: int, order: Order, longest: Longest) -> None:
    sampler, steps = order.sampler, order.total_steps
    dealt = order.dealt_batches(min(steps, sampler.steps_per_epoch))
    counts = [len(micro_batches) for micro_batches in dealt]
    print(
        f"Global batch: {counted(sampler.global_batch_size, 'sample')} on {counted(order.ranks, 'GPU')}, on each in "
        f"{sum(counts) / len(counts):.1f} micro-batches a step (at most {max(counts)}), {order.layout}. "
        f"Longest micro-batch: {counted(longest.shape.tokens, 'token')}, "
        f"{counted(longest.shape.images, 'image')} through the tower."
    )
    guessed = "" if measured == len(samples) else f" (as {measured:,} of them say)"
    print(
        f"{counted(len(samples), 'record')}, {int(lengths.has_image.sum()):,} with images, "
        f"{counted(int(lengths.length.sum()), 'token')}{guessed}: {counted(steps, 'step')}, "
        f"{steps / sampler.steps_per_epoch:.2f} epochs."
    )


def _disk(planned: Planned, model: LlavaModel, order: Order) -> str:
    training, output_dir = planned.arguments.training, Path(planned.arguments.training.output_dir)
    trained = trained_in_full(plan_of(planned.arguments, planned.source))
    whole_model = bool(trained - {"projector", "new_tokens", "image_newline"}) and not training.lora_enable
    every = steps_between_states(training, order)
    saves = order.total_steps // every if every else 0
    sizes = (planned.layout.compute_dtype.itemsize, output_dir, saves, training.save_total_limit, whole_model)
    needs, folder = disk_needs(model, *sizes), output_dir.resolve()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    short = "" if needs.bytes <= free else " Too little: make room, or keep fewer with --save_total_limit."
    return f"Disk: {output_dir} needs {needs}; {free / 1e9:,.0f} GB are free here.{short}"


def print_memory(planned: Planned, found: Estimate) -> None:
    """Print the memory by part, as `planned` needs it. Raises UserError with a change to make where it does not fit."""
    memory = planned.layout.gpu_memory
    kernels = "Liger's kernels" if planned.fused else "no fused kernels (--use_liger_kernel True plans with them)"
    recomputed = f"{planned.share:.0%} of the layers recomputed" if planned.share else "nothing recomputed"
    print(f"\nMemory of each GPU, GiB, when most is in use ({recomputed}, {kernels}):")
    print("\n".join(found.lines()) + "\n")
    if found.needed > memory:
        raise UserError(
            f"It does not fit: {found.needed / GIB:.1f} GiB are needed and a GPU has {memory / GIB:.1f}. "
            f"{_advice(planned, memory)}"
        )
    print(f"It fits: {(memory - found.needed) / GIB:.1f} of {memory / GIB:.1f} GiB are left.")


def _time(operations: float, layout: Layout, planning: PlanArguments) -> str:
    name = planning.gpu_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "H100")
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part.lower() in name.lower()), None)
    if peak is None:
        if planning.gpu_name:
            raise UserError(f"--gpu_name {name}: its peak is not known here; known: {', '.join(PEAK_FLOPS)}.")
        return f"Time: the peak of a {name} is not known here; --gpu_name takes one of {', '.join(PEAK_FLOPS)}."
    seconds = operations / (layout.gpus * peak * planning.expected_mfu)
    hours = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return (
        f"Time: {hours}, if {planning.expected_mfu:.0%} of the {peak / 1e12:,.0f} TFLOP/s of each {name} go "
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
class MemoryAdvice:
    """What to change when a run has no memory left.

    Attributes:
        planned: the run, once its longest micro-batch is known.
    """

    planned: Planned | None = None

    def longest_of(
        self, arguments: Arguments, source: Source, data: Data, accelerator: Accelerator, order: Order
    ) -> Longest:
        """Return the micro-batch of the run that takes most memory. The run is what the advice is about from then."""
        longest = longest_of(arguments, source, data.lengths, order)
        layout, share = running_layout(accelerator), recomputed_share(arguments.training)
        self.planned = Planned(arguments, source, data.samples, layout, longest, share)
        return longest

    def sentence(self, error: RuntimeError) -> str | None:
        """Return the first change that makes the run fit, in a sentence; None where no memory has run out."""
        first_line = str(error).splitlines()[0] if str(error) else ""
        marks = ("DefaultCPUAllocator: ", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(error, torch.OutOfMemoryError) and not any(mark in str(error) for mark in marks):
            return None
        said = f"Memory has run out ({first_line.split('. ')[0]})."
        if self.planned is None:
            return (
                f"{said} It was not the training: look what else is in memory; python -m mini_llava.tools.plan shows "
                "what the run needs."
            )
        # The estimate says it would fit, or it would have been refused; so it is wrong, or others use the memory too.
        limit = 0.9 * min(self.planned.estimate().needed, self.planned.layout.gpu_memory)
        tokens = self.planned.longest.shape.tokens
        return (
            f"{said} The longest micro-batch has {tokens:,} tokens. {_advice(self.planned, limit)} The same flags with "
            "python -m mini_llava.tools.plan show what needs how much."
        )


# --- the tool --------------------------------------------------------------------------------------------------------


def main(command_line: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    if launched_rank()[0] > 0:  # the first one plans for all
        return 0
    try:
        plan(*parse_arguments(command_line))
    except USER_ERRORS as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
