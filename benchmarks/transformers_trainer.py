"""The same training by transformers' `Trainer`: what `against_trainer.py` measures this project against.

    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/transformers_trainer.py \
        --setup /tmp/bench --stage 2 --steps 8 --output_dir /tmp/bench/trainer

The same weights, records, tokens, global batches, optimizer, schedule and trained parts as `train.py` with these flags,
through `LlavaForConditionalGeneration` and padded batches, dealt in LLaVA's way. `log.jsonl` has `train.py`'s keys.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch.utils.data import Dataset, Sampler
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import arguments_of_the_run  # noqa: E402
from benchmarks.without import float_pixels  # noqa: E402
from mini_llava import arguments as flags  # noqa: E402
from mini_llava.data.images import ImageReader  # noqa: E402
from mini_llava.data.lengths import measure  # noqa: E402
from mini_llava.data.records import RecordStore  # noqa: E402
from mini_llava.data.sampler import GlobalBatchSampler, computed_tokens  # noqa: E402
from mini_llava.data.samples import Samples  # noqa: E402
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from mini_llava.formats.read import Source, open_source  # noqa: E402
from mini_llava.formats.tokenizers import load_tokenizer  # noqa: E402
from mini_llava.formats.towers import load_image_processor  # noqa: E402
from mini_llava.model.vision_tower import tokens_per_image  # noqa: E402
from mini_llava.options.chat_template import find_template  # noqa: E402
from mini_llava.training import backend  # noqa: E402
from mini_llava.training.order import choose_batch  # noqa: E402
from mini_llava.training.schedule import warmup_steps  # noqa: E402
from mini_llava.watch.flops import peak_flops  # noqa: E402

# The flags of train.py that mean something here; the others are refused, lest a row claim what was not done.
KNOWN = {
    *("model_name_or_path", "vision_tower", "data_path", "image_folder", "max_steps", "save_strategy", "report_to"),
    *("output_dir", "logging_steps", "attn_implementation", "image_aspect_ratio", "model_max_length", "version"),
    *("group_by_modality_length", "dataloader_num_workers", "global_batch_size", "per_device_train_batch_size"),
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "warmup_ratio"),
    *("lr_scheduler_type", "bf16", "tf32", "gradient_checkpointing", "use_liger_kernel", "seed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--steps", type=int, default=12, help="in all")
    parser.add_argument("--output_dir", type=Path, help="of the run, default SETUP/output")
    own, flags_of_train = parser.parse_known_args()
    arguments = arguments_of_the_run(own, flags_of_train)
    if unknown := sorted(arguments.explicit - KNOWN):
        sys.exit(f"transformers_trainer.py: error: --{unknown[0]} means nothing to transformers' Trainer here.")
    train(arguments)


def train(arguments: flags.Arguments) -> None:
    """Trains, and writes `log.jsonl`."""
    source = open_source(arguments.model, arguments.explicit)
    arguments = arguments.fixed_by(source)
    model_flags, data_flags, training = arguments.model, arguments.data, arguments.training
    output_dir = Path(training.output_dir)
    rank, world_size = backend.launched_rank()
    tokenizer = load_tokenizer(source.name)
    samples = Samples(
        RecordStore(data_flags.data_path, data_flags.image_folder),
        find_template(model_flags.version, tokenizer),
        tokenizer,
        data_flags.model_max_length,
        ImageReader(
            tokens_per_image(source.vision_config, source.select_feature),
            load_image_processor(model_flags.vision_tower),
            data_flags.image_aspect_ratio,
        ),
    )
    lengths = measure(samples, max(1, data_flags.dataloader_num_workers), output_dir / "cache")
    size, micro_batches, _ = choose_batch(arguments, world_size)
    micro_batch = training.per_device_train_batch_size
    if size != world_size * micro_batches * micro_batch:
        sys.exit(f"A global batch of {size} cannot be cut into {world_size} x n micro-batches of {micro_batch}.")
    grouped = data_flags.group_by_modality_length
    sampler = GlobalBatchSampler(
        lengths.length, lengths.has_image, size, world_size * micro_batches, training.seed, grouped
    )
    batches = list(sampler.batches(training.max_steps))
    check_collectives(batches, lengths.has_image, world_size, micro_batch)

    on_gpu, configured = torch.cuda.is_available(), {}
    deepspeed = deepspeed_config(training, micro_batches)
    if deepspeed and not on_gpu:  # the Trainer's own state would know of no backend, and each rank train alone
        PartialState(backend="gloo")
        configured = {"accelerator_config": {"use_configured_state": True}}
    settings = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=training.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=warmup_steps(training.warmup_ratio, training.max_steps),
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=training.bf16,
        tf32=training.tf32 if on_gpu else None,
        gradient_checkpointing=training.gradient_checkpointing,
        use_liger_kernel=bool(training.use_liger_kernel),
        deepspeed=deepspeed,
        dataloader_num_workers=data_flags.dataloader_num_workers,
        seed=training.seed,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would wait for the device after every micro-batch
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu and deepspeed is None,
        **configured,
    )
    if settings.world_size != world_size:
        sys.exit(f"{world_size} processes were launched, but the Trainer knows of {settings.world_size}.")
    if settings.n_gpu > 1:
        sys.exit("One process with several GPUs would train by DataParallel: set CUDA_VISIBLE_DEVICES to one of them.")
    model = build_model(source, training, model_flags)
    if deepspeed is None:  # fp32 masters; DeepSpeed keeps them beside the weights
        for parameter in model.parameters():
            parameter.data = parameter.float() if parameter.requires_grad else parameter.data
    clock = Clock()
    trainer = InOrder(
        model=model,
        args=settings,
        train_dataset=Records(samples, model.config.image_token_id),
        data_collator=pad,
        callbacks=[clock],
    )
    trainer.order = [index for batch in batches for index in batch]
    trainer.train()

    memory = max(gather_object([torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0]))
    if rank > 0:
        return
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    peak = peak_flops(trainer.accelerator)
    language_model = sum(getattr(p, "ds_numel", p.numel()) for p in model.model.language_model.parameters())
    language_model += getattr(model.lm_head.weight, "ds_numel", model.lm_head.weight.numel())
    with open(output_dir / "log.jsonl", "w") as log:
        for number, (batch, seconds) in enumerate(zip(batches, clock.seconds(), strict=True)):
            tokens = sum(int(lengths.length[index]) for index in batch)
            cuts = [batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)]
            values = {
                "step": number + 1,
                "loss": losses[number + 1],
                "tokens_per_second": tokens / seconds,
                "computed_tokens_per_second": sum(computed_tokens(cut, lengths.length, "padded") for cut in cuts)
                / seconds,
                "samples_per_second": len(batch) / seconds,
                "seconds_per_step": seconds,
            }
            if memory:
                values["peak_memory_gib"] = memory
            if peak:
                values["mfu_6n"] = 6 * language_model * tokens / (peak * world_size * seconds)
            log.write(json.dumps(values, default=float) + "\n")


def check_collectives(batches: list[list[int]], has_image, world_size: int, micro_batch: int) -> None:
    """Ends the program where one rank would run the tower and another would not: under ZeRO-3 they would wait forever.

    `LlavaForConditionalGeneration` leaves the tower out of a micro-batch without images.
    """
    for number, batch in enumerate(batches):
        cuts = [batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)]
        for start in range(0, len(cuts), world_size):
            with_images = [any(has_image[index] for index in cut) for cut in cuts[start : start + world_size]]
            if len(batch) % (world_size * micro_batch) or len(set(with_images)) > 1:
                sys.exit(
                    f"Global batch {number + 1} is not full, or mixes images and text so that one rank would have no "
                    "image: write more records with random_setup.py --records, or measure fewer steps."
                )


def deepspeed_config(training: flags.TrainingArguments, micro_batches: int) -> dict | None:
    """Our own settings (bucket sizes, what stays whole) for the stage that was launched; None without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
        sys.exit("transformers_trainer.py: error: offloading is not known here; take zero2.yaml or zero3.yaml.")
    config = {"zero_optimization": {"stage": int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"])}}
    backend.complete_deepspeed_config(config, "bf16" if training.bf16 else "no", training.max_grad_norm)
    # The Trainer's own cost less memory and time: gradients add up in bf16.
    del config["data_types"]
    config["train_micro_batch_size_per_gpu"] = training.per_device_train_batch_size
    config["gradient_accumulation_steps"] = micro_batches
    # accelerate refuses a config made elsewhere beside a stage of its own file, although it is the same one here.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    return config


def build_model(
    source: Source, training: flags.TrainingArguments, model_flags: flags.ModelArguments
) -> LlavaForConditionalGeneration:
    """transformers' class with the weights that `train.py` starts from, the new projector's included.

    Rank 0 alone reads values under ZeRO-3, which divides them among the ranks at once.
    """
    torch.manual_seed(training.seed)
    projector = source.load_projector().state_dict()
    names = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias"}
    names |= {"2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}
    tensors = {f"model.multi_modal_projector.{names[name]}": tensor for name, tensor in projector.items()}
    for name, tensor in read_weights(source.name).items():
        head = name.startswith("lm_head")
        tensors[name if head else "model.language_model." + name.removeprefix("model.")] = tensor
    for name, tensor in read_weights(source.vision_tower).items():
        tensors["model.vision_tower." + name.removeprefix("vision_model.")] = tensor
    # One more row for <image>, and a multiple of 64 of them, as published LLaVA models in this layout have.
    rows = -(-(source.language_config.vocab_size + 1) // 64) * 64
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        mean = tensors[name].float().mean(dim=0, keepdim=True).to(tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], mean.expand(rows - len(tensors[name]), -1)])

    text_config = source.language_config
    config = LlavaConfig(
        text_config=text_config,
        vision_config=source.vision_config,
        image_token_index=text_config.vocab_size,
        vision_feature_layer=source.select_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    config.text_config.vocab_size = rows
    if is_deepspeed_zero3_enabled() and torch.distributed.get_rank() > 0:
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    attention = "flash_attention_2" if is_flash_attn_2_available() and training.bf16 else "sdpa"
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.bfloat16 if training.bf16 else torch.float32,
        attn_implementation=model_flags.attn_implementation or attention,
        output_loading_info=True,
    )
    if unfit := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        sys.exit(f"transformers_trainer.py: error: {unfit[0]} does not fit LlavaForConditionalGeneration.")
    model.config.use_cache = False
    model.requires_grad_(not model_flags.tune_mm_mlp_adapter)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def read_weights(directory: str) -> dict[str, torch.Tensor]:
    """All tensors of a model's directory, mapped and not yet read."""
    return {
        name: tensor
        for file in sorted(Path(directory).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


class Records(Dataset):
    """A record as Trainer's users have it: ids and labels of this project's tokenization, floats of its image."""

    def __init__(self, samples: Samples, image_token_id: int):
        self.samples, self.image_token_id = samples, image_token_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples.tokenize(index)
        ids, labels = (torch.from_numpy(values).long() for values in (sample.input_ids, sample.labels))
        settings = (self.samples.image_reader.processor, self.samples.image_reader.aspect_ratio)
        pixels = [float_pixels(self.samples.store.image_folder(index), name, *settings) for name in sample.images]
        return {
            "input_ids": ids.where(ids != IMAGE_TOKEN_INDEX, self.image_token_id),
            "labels": labels,
            "pixels": pixels,
        }


def pad(samples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch as the model takes it, padded on the right to its longest sample."""

    def rows(key: str, padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([sample[key] for sample in samples], True, padding)

    mask = [torch.ones(len(sample["input_ids"]), dtype=torch.long) for sample in samples]
    batch = {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", IGNORE_INDEX),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, True, 0),
    }
    if pixels := [image for sample in samples for image in sample["pixels"]]:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


class InOrder(Trainer):
    """Takes the samples in the order of `order`, which the launcher's ranks cut into micro-batches in turn."""

    order: list[int]

    def _get_train_sampler(self, *_) -> Sampler:
        return Listed(self.order)


class Listed(Sampler):
    def __init__(self, indices: list[int]):
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class Clock(TrainerCallback):
    """When each step has ended on the device."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_begin(self, *_, **__) -> None:
        self._tick()

    def on_step_end(self, *_, **__) -> None:
        self._tick()

    def _tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


if __name__ == "__main__":
    main()
