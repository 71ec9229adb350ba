"""Trains a LLaVA-1.5 style vision-language model: `accelerate launch train.py --stage {1,2}`.

Read it from top to bottom: arguments, data, processes, model, optimizer, order, resume, then one loop, then the result.
Stage 1 trains the projector between a frozen vision tower and a frozen language model; stage 2 trains projector and
language model. The two differ in their preset only (`mini_llava/arguments.py`).
"""

import functools
import json
import math
import os
import random
from pathlib import Path

import torch

from mini_llava import arguments as flags
from mini_llava import demo
from mini_llava.data.images import load_image, load_image_processor, pixel_values
from mini_llava.data.loader import RankSteps, rank_step_loader
from mini_llava.data.records import RecordStore, measure
from mini_llava.data.sampler import GlobalBatchSampler, deal
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import load_tokenizer, tokenize, tokenize_prompt
from mini_llava.model import formats
from mini_llava.model.freeze import apply_plan, trainable_table, trained_parts
from mini_llava.model.llava import load_llava
from mini_llava.model.vision_tower import load_vision_config, tokens_per_image
from mini_llava.training import checkpoint, distributed
from mini_llava.training.evaluation import Question, exact_match, shuffle_images
from mini_llava.training.meter import Meter, ProgressLine
from mini_llava.training.optimizer import build_adamw, parameter_groups, set_learning_rates
from mini_llava.training.schedule import learning_rate_factor, warmup_steps


def main(command_line: list[str] | None = None) -> None:
    arguments = flags.parse_arguments(command_line)
    model_flags, data_flags, training = arguments.model, arguments.data, arguments.training
    output_dir = Path(training.output_dir)
    rank, world_size = distributed.local_world()
    say = print if rank == 0 else lambda *_: None
    if arguments.is_demo:
        say(demo.prepare_and_describe(arguments))

    # --- Data: what one record becomes -------------------------------------------------------------------------------
    # Read and measured before the process group exists: NCCL gives up after ten minutes of waiting for one rank.
    template = get_template(model_flags.version)
    tokenizer = load_tokenizer(model_flags.model_name_or_path)
    image_processor = load_image_processor(model_flags.vision_tower)
    vision_config = load_vision_config(model_flags.vision_tower)
    image_tokens = tokens_per_image(vision_config, model_flags.mm_vision_select_feature)
    to_sample = functools.partial(
        tokenize,
        template=template,
        tokenizer=tokenizer,
        tokens_per_image=image_tokens,
        max_length=data_flags.model_max_length,
    )
    to_pixels = functools.partial(open_pixels, processor=image_processor, aspect_ratio=data_flags.image_aspect_ratio)
    store = RecordStore(data_flags.data_path, data_flags.image_folder or [])
    lengths = measure(
        store,
        to_sample,
        num_workers=max(1, training_workers(data_flags)),
        cache_folder=output_dir,
        key=json.dumps(
            [model_flags.model_name_or_path, model_flags.version, image_tokens, data_flags.model_max_length]
        ),
    )
    if lengths.bad and data_flags.on_bad_sample == "error":
        raise SystemExit(flags.report_bad_records(store, lengths.bad))

    # --- Processes, precision, seed ----------------------------------------------------------------------------------
    precision = distributed.choose_precision(training.bf16, training.fp16, arguments.explicit)
    tracker = None if training.report_to == "none" else training.report_to
    accelerator = distributed.build_accelerator(precision, training.max_grad_norm, tracker, str(output_dir))
    if training.tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(training.seed)  # the same on every rank: new weights must be equal

    # --- Model, what of it is trained, optimizer ---------------------------------------------------------------------
    trained_dtype, compute_dtype = distributed.parameter_dtypes(accelerator)
    parts = trained_parts(
        model_flags.tune_mm_mlp_adapter,
        model_flags.freeze_mm_mlp_adapter,
        model_flags.freeze_backbone,
        model_flags.unfreeze_mm_vision_tower,
    )
    model = load_llava(
        model_flags,
        packing=data_flags.packing,
        dtypes={part: trained_dtype if part in parts else compute_dtype for part in flags.PARTS},
        device=accelerator.device,
    )
    apply_plan(model, parts)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    groups = parameter_groups(
        model,
        training.learning_rate,
        training.weight_decay,
        {"projector": training.mm_projector_lr, "vision_tower": training.mm_vision_tower_lr},
    )
    table = trainable_table(model, groups)
    optimizer = build_adamw(
        groups,
        training.adam_beta1,
        training.adam_beta2,
        training.adam_epsilon,
        fused=accelerator.device.type == "cuda" and not distributed.is_offloaded(accelerator),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    # --- Order: global batches, and this rank's micro-batches of each ------------------------------------------------
    global_batch_size, micro_batches, batch_note = flags.choose_batch(arguments, world_size)
    sampler = GlobalBatchSampler(
        lengths.length,
        lengths.has_image,
        global_batch_size,
        slots=world_size * micro_batches,
        seed=training.seed,
        group_by_modality_length=data_flags.group_by_modality_length,
        recorded=json.loads(Path(data_flags.sample_order).read_text()) if data_flags.sample_order else None,
    )
    total_steps = training.max_steps
    if total_steps <= 0:
        total_steps = math.ceil(training.num_train_epochs * sampler.steps_per_epoch)
    last_step = min(total_steps, training.stop_at_step or total_steps)
    layout = "packed" if data_flags.packing else "padded"
    if training.loss_normalization == "micro_batch":
        layout = "in_order"  # LLaVA's own micro-batches, which its loss depends on

    def rank_plans():
        for batch in sampler.batches(last_step):
            good = [index for index in batch if index not in lengths.bad]
            dealt = deal(good, lengths.length, world_size, micro_batches, layout, data_flags.max_tokens_per_micro_batch)
            yield [micro_batch[rank] for micro_batch in dealt]

    # --- Resume ------------------------------------------------------------------------------------------------------
    torch.manual_seed((training.seed << 16) + rank)  # from here on each rank has dropout masks of its own
    resumed_from = checkpoint.find_checkpoint(output_dir, training.resume_from_checkpoint)
    if resumed_from:
        manifest = checkpoint.load_checkpoint(accelerator, model, optimizer, resumed_from)
        sampler.load_state_dict(manifest["sampler"])
    save_state = functools.partial(
        checkpoint.save_checkpoint, accelerator, model, optimizer, output_dir, keep=training.save_total_limit
    )
    save_weights = functools.partial(
        save_loadable_weights,
        accelerator=accelerator,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        arguments=arguments,
    )

    # --- What a person sees ------------------------------------------------------------------------------------------
    say(f"\n{distributed.describe(accelerator)}\n\n{table}\n")
    if batch_note:
        say(batch_note)
    if ddp_note := distributed.memory_note(accelerator, model):
        say(ddp_note)
    say(
        f"{len(store):,} records ({int(lengths.has_image.sum()):,} with images), {int(lengths.length.sum()):,} tokens; "
        f"{total_steps:,} steps of {global_batch_size} samples, {layout}"
        + (f"; goes on after step {sampler.step} of {resumed_from}" if resumed_from else "")
    )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        flags.save_arguments(arguments, output_dir / "arguments.yaml", distributed.versions())
    accelerator.init_trackers("runs")
    log_text(accelerator, "arguments", (output_dir / "arguments.yaml"))
    evaluate = build_evaluation(
        arguments, accelerator, model, tokenizer, template, image_tokens, vision_config, to_pixels
    )
    results = {"before": evaluate()} if sampler.step == 0 else {}
    say_results(say, "Before training", results.get("before"))

    # --- The loop ----------------------------------------------------------------------------------------------------
    loader = rank_step_loader(
        RankSteps(store, to_sample, to_pixels, vision_config.image_size, data_flags.packing, skip_bad(data_flags)),
        rank_plans(),
        data_flags.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    warmup = warmup_steps(training.warmup_ratio, total_steps)
    meter = Meter()
    progress = ProgressLine(total_steps, sampler.step, enabled=accelerator.is_main_process)
    window_loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    window_steps = 0

    for work in loader:
        trained_tokens, tokens, samples = distributed.sum_over_ranks(
            accelerator, sum(work.trained_tokens), work.tokens, work.samples
        )
        factor = learning_rate_factor(training.lr_scheduler_type, sampler.step, total_steps, warmup)
        set_learning_rates(optimizer, factor)  # before the last backward, inside which DeepSpeed steps

        def losses(work=work, trained_tokens=trained_tokens):
            for batch, own_tokens in zip(work.micro_batches, work.trained_tokens, strict=True):
                token_losses = model(**to_device(batch, accelerator.device))
                if training.loss_normalization == "global_batch":
                    share = token_losses / trained_tokens.clamp(min=1).float()
                else:  # the original's mean of means, blind to how many tokens a micro-batch has
                    share = token_losses / (max(own_tokens, 1) * len(work.micro_batches) * world_size)
                window_loss.add_(share.detach())
                yield share * world_size  # the backends average gradients over the ranks

        gradient_norm = distributed.backward_and_step(
            accelerator, model, optimizer, losses(), len(work.micro_batches), training.max_grad_norm
        )
        sampler.step += 1
        window_steps += 1
        log_skipped(output_dir, store, work.skipped)

        saving = checkpoint_due(training, sampler.step, last_step)
        if sampler.step % training.logging_steps == 0 or saving or sampler.step == last_step:
            # Here the host waits for the device.
            loss = distributed.sum_over_ranks(accelerator, window_loss).item() / window_steps
            meter.lap(tokens.item(), samples.item(), steps=window_steps)
            values = {
                "loss": loss,
                "learning_rate": training.learning_rate * factor,
                "gradient_norm": float(gradient_norm),
                "epoch": sampler.step / sampler.steps_per_epoch,
                "trained_tokens": trained_tokens.item(),
                **meter.read(),
            }
            stop_if_not_finite(values, precision, sampler.step, store, work.records)
            accelerator.log(values, step=sampler.step)
            progress.update(sampler.step, values)
            window_loss.zero_()
            window_steps = 0
        if saving:
            description = {"stage": arguments.stage, "sampler": sampler.state_dict(), "arguments": arguments.as_dict()}
            path = save_state(step=sampler.step, description=description, write_weights=save_weights)
            progress.say(f"Training state of step {sampler.step} written to {path}")
            meter.resume()
    progress.close()

    # --- The result --------------------------------------------------------------------------------------------------
    if sampler.step < total_steps:
        say(f"Stopped at step {sampler.step} of {total_steps}; --resume_from_checkpoint latest goes on.")
    else:
        results["after"] = evaluate()
        save_weights(output_dir, final=True)
        say_results(say, "After training", results["after"])
        say(formats.how_to_use(output_dir))
    accelerator.end_training()


if __name__ == "__main__":
    main()
