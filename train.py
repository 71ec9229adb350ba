"""Trains a LLaVA-1.5 style vision-language model: `python train.py --stage {1,2}`.

Read it from top to bottom: arguments, data, processes, order, model, optimizer, resume, then one loop, then the result.
Stage 1 trains the projector between a frozen vision tower and a frozen language model; stage 2 trains projector and
language model. They differ in their presets only (`mini_llava/arguments.py`).
"""

import functools
import gc
import sys
import time
import traceback
from pathlib import Path

from mini_llava.guards.output_streams import drop_what_cannot_be_printed
from mini_llava.guards.preemption import EXIT_CODE, INTERRUPTED, Preemption, remove_marker, start_worker, write_marker

preemption = Preemption()
if __name__ == "__main__":
    drop_what_cannot_be_printed()
    preemption.watch()  # before the imports below, which take seconds

import torch

from mini_llava import arguments as flags
from mini_llava import demo
from mini_llava.build import build_model
from mini_llava.data.loader import RankSteps, count_skipped, log_skipped, rank_step_loader, refuse_or_report
from mini_llava.data.records import RecordStore, measure
from mini_llava.evaluation.evaluate import HeldOut, read_held_out
from mini_llava.formats import write
from mini_llava.formats.read import open_source
from mini_llava.guards import liveness, output_folder, ownership, preflight
from mini_llava.guards.early import check_output, check_what_a_run_needs
from mini_llava.guards.identity import resume_notes, run_identity
from mini_llava.guards.longest import try_longest
from mini_llava.guards.not_finite import why_not_taken
from mini_llava.inputs import choose_inputs
from mini_llava.model.trained import trainable_table, trained_in_full
from mini_llava.options import lora
from mini_llava.tools.plan import MemoryAdvice
from mini_llava.training import backend, checkpoint
from mini_llava.training.lockstep import STEPS_LOOKED_AT, Lockstep
from mini_llava.training.meter import Meter, ProgressLine, append_json_line, loss_parts, prepare_reports
from mini_llava.training.optimizer import build_adamw, learning_rates, parameter_groups, set_learning_rates
from mini_llava.training.order import choose_order
from mini_llava.training.schedule import learning_rate_factor, warmup_steps
from mini_llava.watch import first_batch
from mini_llava.watch.norms import norms_are_due, step_norms
from mini_llava.watch.summary import write_summary
from mini_llava.words import counted


@ownership.released_at_the_end()
def train(arguments: flags.Arguments, advice: MemoryAdvice | None = None) -> None:
    """Trains as the flags say. `advice` comes to know what to change if memory runs out."""
    training, output_dir = arguments.training, Path(arguments.training.output_dir)
    rank, world_size = backend.launched_rank()
    say = print if rank == 0 else lambda *_: None
    if arguments.is_demo:
        arguments, note = demo.prepare_run(arguments)
        say(note)
    check_what_a_run_needs(arguments)
    if rank == 0:
        ownership.own(output_dir)
    preemption.output_dir = output_dir
    check_output(output_dir, training.resume_from_checkpoint)

    # --- What it starts from: a language model and a tower, or a LLaVA model, which then fixes some of the flags ------
    source = open_source(arguments.model, arguments.explicit, arguments.data)
    arguments = arguments.fixed_by(source)
    model_flags, data_flags = arguments.model, arguments.data
    say(source.describe(model_flags.pretrain_mm_mlp_adapter))
    write.check_may_be_written(output_dir, model_flags, training.export_format, source.vision_config)

    # --- Data: what becomes of one record ----------------------------------------------------------------------------
    # Read and measured before the process group exists: NCCL gives up after ten minutes of waiting for one rank.
    inputs = choose_inputs(arguments, source)
    tokenizer, new_tokens = inputs.tokenizer, inputs.new_tokens
    store = RecordStore(data_flags.data_path, data_flags.image_folder, data_flags.exclude, output_dir / "cache")
    key = inputs.measurement_key
    workers = max(1, data_flags.dataloader_num_workers)
    lengths = measure(store, inputs.to_sample, workers, output_dir / "cache", key, inputs.tiling)
    for line in refuse_or_report(store, lengths.bad, data_flags.on_bad_sample):
        say(f"skipped: {line}")
    of_questions = (inputs.to_eval_sample, inputs.to_prompt, inputs.to_pixels, inputs.image_size)
    questions = read_held_out(data_flags, training.seed, *of_questions)

    # --- Processes, precision ----------------------------------------------------------------------------------------
    precision = backend.choose_precision(training.bf16, training.fp16, arguments.explicit)
    accelerator = backend.build_accelerator(precision, training.max_grad_norm, training.report_to, output_dir)
    liveness.watch_other_ranks(rank, world_size, preemption.exit_code)
    if training.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32

    # --- Order: the global batches, the micro-batches of each, and the longest of these ------------------------------
    order = choose_order(arguments, store, lengths, world_size)
    sampler, total_steps = order.sampler, order.total_steps
    held_out_tokens = max((question.tokens for question in questions[1]), default=0) if questions else 0
    for line in preflight.report(
        preflight.check_run(arguments, source, inputs, lengths, order, held_out_tokens), training.allow
    ):
        say(line)
    longest = (advice or MemoryAdvice()).longest_of(arguments, source, inputs, accelerator, lengths, order)

    # --- Model, what of it is trained, optimizer ---------------------------------------------------------------------
    torch.manual_seed(training.seed)  # the same on every rank, because new weights must be equal
    model, plan = build_model(arguments, source, tokenizer, new_tokens, accelerator)
    trained = trained_in_full(plan)
    rates = {"projector": training.mm_projector_lr, "vision_tower": training.mm_vision_tower_lr}
    rates["image_newline"] = rates["projector"]
    groups = parameter_groups(model, training.learning_rate, training.weight_decay, rates)
    table = trainable_table(model, groups, plan)
    optimizer = build_adamw(
        groups,
        (training.adam_beta1, training.adam_beta2),
        training.adam_epsilon,
        fused=accelerator.device.type == "cuda" and not backend.is_offloaded(accelerator),
    )
    model, optimizer = backend.prepare(accelerator, model, optimizer)
    checkpoint.create_moments(accelerator, optimizer)
    model.train()

    # --- Resume ------------------------------------------------------------------------------------------------------
    torch.manual_seed((training.seed << 16) + rank)  # from here on each rank has dropout masks of its own
    if note := output_folder.check_shared(accelerator, output_dir):
        say(note)
    identity = run_identity(
        accelerator,
        model,
        arguments.as_dict(),
        store,
        lengths.has_image,
        sampler.state_dict(),
        (questions[0].store, questions[1]) if questions else None,
        tokenizer,
        inputs.image_processor,
        total_steps,
        slots=sampler.slots,
    )
    resume_from = checkpoint.find_checkpoint(accelerator, output_dir, training.resume_from_checkpoint, say)
    if resume_from:
        manifest = checkpoint.load_checkpoint(
            accelerator, model, optimizer, resume_from, identity, training.resume_ignore
        )
        sampler.load_state_dict(manifest["sampler"], order_may_differ=bool(training.resume_ignore))
        for note in resume_notes(manifest, identity):
            say(note)
    described = dict(
        model=accelerator.unwrap_model(model),
        projector_type=model_flags.mm_projector_type,
        vision_tower_name=model_flags.vision_tower,
        version=model_flags.version,
        image_aspect_ratio=data_flags.image_aspect_ratio,
        model_max_length=data_flags.model_max_length,
        is_main_process=accelerator.is_main_process,
    )
    whole_model = bool(trained - {"projector", "new_tokens", "image_newline"}) and not training.lora_enable
    save_trained = write.save_projector_only
    if training.lora_enable:
        save_trained = functools.partial(lora.save_lora, tokenizer=tokenizer)

    # --- What a person sees ------------------------------------------------------------------------------------------
    say(f"\n{backend.describe(accelerator)}\n\n{table}\n")
    saves = total_steps // training.save_steps - sampler.step // training.save_steps
    saves = saves if training.save_strategy == "steps" else 0
    room = (saves, training.save_total_limit, whole_model)
    disk_note = output_folder.disk_note(accelerator, model, output_dir, *room)
    mixture = sampler.describe_mixture(store.source_names())
    for note in (order.note, mixture, backend.memory_note(accelerator, model), disk_note):
        if note:
            say(note)
    say(
        f"{counted(len(store), 'record')}, {int(lengths.has_image.sum()):,} with images, "
        f"{counted(int(lengths.length.sum()), 'token')}; {counted(total_steps, 'step')} of "
        f"{counted(sampler.global_batch_size, 'sample')}, {order.layout}."
        + (f" Resumed from {resume_from} at step {sampler.step}." if resume_from else "")
    )
    if accelerator.is_main_process:
        for note in output_folder.remove_leftovers(output_dir, sampler.step, training.save_total_limit):
            say(note)
        flags.save_arguments(arguments, output_dir / "arguments.yaml", backend.versions())
        preemption.forget_earlier()
        if note := prepare_reports(output_dir, sampler.step if resume_from else None):
            say(note)
        if not resume_from:
            with backend.never_fatal(f"{output_dir}/skipped.jsonl lacks entries"):
                log_skipped(store, lengths.bad.items(), output_dir / "skipped.jsonl")
    backend.start_trackers(accelerator, arguments.as_dict(), sampler.step if resume_from else None, table)

    # --- The longest micro-batch once, before anything takes time: if memory does not suffice, it shows here ---------
    how = (inputs.to_sample, inputs.to_pixels, inputs.image_size)
    rank_steps = RankSteps(store, *how, data_flags.packing, data_flags.on_bad_sample)
    first_batch.show(accelerator, rank_steps, order.dealt_batches(), tokenizer, sampler.step + 1)
    if training.longest_batch_first and sampler.step < total_steps:
        say(try_longest(accelerator, model, optimizer, rank_steps, longest))
    max_skipped = data_flags.max_skipped_share * STEPS_LOOKED_AT * sampler.global_batch_size
    lockstep = Lockstep(accelerator, preemption, max_skipped)
    held_out = HeldOut(arguments, accelerator, model, questions, tokenizer, inputs.eval_template, total_steps, lockstep)
    # Before step 1, and where a kill came between a save and its evaluation.
    if held_out.is_due(sampler.step) and not held_out.evaluate(sampler.step, say):
        lockstep.raise_fault()

    # --- The loop ----------------------------------------------------------------------------------------------------
    loader = rank_step_loader(
        rank_steps,
        ([of_ranks[rank] for of_ranks in dealt] for dealt in order.dealt_batches()),
        data_flags.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=start_worker,
        patience=data_flags.dataloader_timeout,
        stop_waiting=lambda: preemption.asked,
    )
    warmup = warmup_steps(training.warmup_ratio, total_steps)
    progress = ProgressLine(total_steps, sampler.step, enabled=rank == 0)
    meter = Meter(accelerator, accelerator.unwrap_model(model), loss_parts(store.source_names(), lengths.has_image))
    saved_step = sampler.step  # what a resumed run knows is on disk, and a fresh one can make again

    def save() -> None:
        nonlocal saved_step
        description = {"stage": arguments.stage, "sampler": sampler.state_dict(), "arguments": arguments.as_dict()}
        saved = checkpoint.save_or_warn(
            accelerator,
            model,
            optimizer,
            output_dir,
            sampler.step,
            description | {"identity": identity},
            None if lockstep.fault else training.save_total_limit,  # a state that a fault has ended replaces none
            write_weights=functools.partial(save_trained, **described),
        )
        saved_step = sampler.step if saved.is_whole else saved_step
        progress.say(saved.text)
        meter.pause_ends(save_seconds=saved.seconds)

    gc.collect()
    gc.freeze()  # model and libraries stay: collections in the loop need not look through them again
    preemption.heed()

    for work in meter.waiting_for(lockstep.steps(loader)):
        factor = learning_rate_factor(training.lr_scheduler_type, sampler.steps_taken, total_steps, warmup)
        set_learning_rates(optimizer, factor)  # before the last backward, inside which DeepSpeed steps

        def losses(work=work):
            parts = zip(work.micro_batches, work.trained_tokens, work.loss_groups, strict=True)
            for batch, own_tokens, groups in parts:
                token_losses = model(**backend.to_device(batch, accelerator.device), reduction="none")
                meter.add_token_losses(token_losses, groups)
                sum_of_losses = token_losses.sum()
                if training.loss_normalization == "global_batch":
                    loss = sum_of_losses / lockstep.trained_tokens.float().clamp(min=1)
                else:  # LLaVA's mean of means, blind to how many tokens a micro-batch trains
                    loss = sum_of_losses / (max(own_tokens, 1) * len(work.micro_batches) * world_size)
                meter.add_loss(loss)
                yield loss * world_size  # every backend averages the ranks' gradients

        if lockstep.samples:
            gradient_norm, finite = backend.backward_and_step(
                accelerator, model, optimizer, losses(), len(work.micro_batches), training.max_grad_norm
            )
            if not finite and lockstep.stop(
                why_not_taken(accelerator, meter, sampler.step + 1, work, store, output_dir)
            ):
                break
            meter.add_step(work)
        else:  # every sample of the global batch was skipped: AdamW would still decay and move the weights
            sampler.empty_steps += 1
        sampler.step += 1
        with backend.never_fatal(f"{output_dir}/skipped.jsonl lacks entries"):
            log_skipped(store, work.skipped, output_dir / "skipped.jsonl")

        stopping = lockstep.read()
        saving = training.save_strategy == "steps" and sampler.step % training.save_steps == 0
        evaluating = held_out.is_due(sampler.step)
        logging = sampler.step % training.logging_steps == 0 or sampler.step == total_steps
        if (logging or saving or evaluating or stopping) and meter.steps:
            values = meter.read()  # here the host waits for the device
            values |= {"learning_rate": training.learning_rate * factor, "gradient_norm": float(gradient_norm)}
            values |= learning_rates(optimizer)
            if finite and norms_are_due(sampler.step, total_steps):
                values |= step_norms(accelerator, model, optimizer)
            values["epoch"] = sampler.step / sampler.steps_per_epoch
            backend.log(accelerator, values, sampler.step)
            progress.update(sampler.step, values, held_out.in_a_word())
            if rank == 0:
                append_json_line(output_dir / "log.jsonl", {"step": sampler.step, **values})
        if saving:
            save()
            stopping = lockstep.agree()  # asked during a save, the run ends with that one
        if evaluating and not stopping:
            stopping = not held_out.evaluate(sampler.step, progress.say)
            meter.pause_ends()
        if stopping:
            break
    progress.close()

    def end_early() -> None:
        """Save what is not saved yet and end the process, with an error if the data is why."""
        if sampler.step != saved_step:
            save()
        if lockstep.fault and lockstep.ahead:  # too much was skipped, and its last step is not in the list yet
            with backend.never_fatal(f"{output_dir}/skipped.jsonl lacks entries"):
                log_skipped(store, lockstep.ahead.skipped, output_dir / "skipped.jsonl")
        lockstep.raise_fault()
        if accelerator.is_main_process and not lockstep.interrupted:  # a person is there; nothing shall start it again
            write_marker(output_dir, sampler.step, total_steps)
        say(f"Stopped after step {sampler.step} as asked; --resume_from_checkpoint latest goes on.")
        backend.end_training(accelerator, model)
        sys.exit(INTERRUPTED if lockstep.interrupted else EXIT_CODE)

    if lockstep.stopping:
        end_early()

    # --- The result --------------------------------------------------------------------------------------------------
    with output_folder.writing_the_result(output_dir):
        if training.lora_enable:
            say(save_trained(output_dir, **described))
        elif not whole_model:
            write.save_projector_only(output_dir, **described)
            say(f"The projector is in {output_dir}/mm_projector.bin; stage 2 takes it as --pretrain_mm_mlp_adapter.")
        else:
            # A tower that is not quite the one of its name: trained, now or in the model that the run started from.
            with_tower = training.save_vision_tower or "vision_tower" in trained or "vision_tower" in source.stored
            layout, dtype = training.export_format, backend.compute_dtype(accelerator)
            saved_with = (inputs.image_processor, inputs.template)
            whole = (output_dir, tokenizer, *saved_with, layout, with_tower, dtype)
            say(write.save_whole_model(*whole, **described))
    with backend.never_fatal(f"{output_dir}/skipped.jsonl cannot be counted"):
        for line in count_skipped(output_dir / "skipped.jsonl"):
            say(f"skipped: {line}")
    if not held_out.evaluate(total_steps, say):
        end_early()
    if accelerator.is_main_process:
        say(write_summary(output_dir, training.logging_steps, meter.pauses, store))
        if arguments.is_demo:
            say(demo.table_of_scores(arguments.stage, output_dir, model_flags.pretrain_mm_mlp_adapter))
    backend.end_training(accelerator, model)


def main() -> None:
    """The program: what the person at the terminal can fix ends it with a sentence, a bug with its traceback."""
    arguments, advice = flags.parse_arguments(), MemoryAdvice()
    try:
        train(arguments, advice)
    except (ValueError, ImportError, OSError, checkpoint.CheckpointError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(Path(__file__).resolve().parent / "mini_llava")
        if isinstance(error, (ValueError, ImportError)) and not (ours and last.line.startswith("raise ")):
            raise  # nobody has written a sentence about it
        rank, _ = backend.launched_rank()
        if not isinstance(error, BlockingIOError):  # of another run, which owns the directory
            remove_marker(Path(arguments.training.output_dir))  # started again, it would end like this again
        if rank > 0:
            time.sleep(5)  # mostly rank 0 has said the same by then, and the launcher has ended this process
        sys.exit(f"train.py: error{f' on rank {rank}' if rank else ''}: {error}")
    except RuntimeError as error:
        if sentence := advice.sentence(error):
            remove_marker(Path(arguments.training.output_dir))
            sys.exit(f"train.py: error on rank {backend.launched_rank()[0]}: {sentence}")
        liveness.wait_for_the_sentence()
        raise
    finally:
        liveness.leave("failed")  # unless it has left already, finished


if __name__ == "__main__":
    main()
