"""Train a LLaVA-1.5 style vision-language model: `python train.py --stage {1,2}`.

Read it from top to bottom: what it starts from, data, processes, order, model, optimizer, resume, one loop, the result.
Stage 1 trains the projector between a frozen vision tower and a frozen language model; stage 2 trains projector and
language model. They differ in their presets only (`mini_llava/arguments.py`).
"""

import gc
import sys
from pathlib import Path

from mini_llava import arguments as flags
from mini_llava import demo
from mini_llava.guards import early, ownership
from mini_llava.guards.output_streams import drop_what_cannot_be_printed
from mini_llava.guards.preemption import EXIT_CODE, INTERRUPTED, Preemption, remove_marker, start_worker, write_marker
from mini_llava.processes import launched_rank

preemption = Preemption()
if __name__ == "__main__":  # before the imports below, which take seconds
    drop_what_cannot_be_printed()
    preemption.watch()
    early.look(flags.parse_arguments(), preemption)

import torch

from mini_llava.build import build_model, build_optimizer
from mini_llava.data.loader import rank_step_loader
from mini_llava.evaluation.evaluate import Evaluation
from mini_llava.formats import write
from mini_llava.formats.read import open_source
from mini_llava.guards import liveness, preflight
from mini_llava.guards.longest import try_longest
from mini_llava.guards.not_finite import why_not_taken
from mini_llava.guards.user_errors import USER_ERRORS
from mini_llava.options import background, zero3
from mini_llava.read_data import read_data
from mini_llava.saving import Saving
from mini_llava.tools.plan import MemoryAdvice
from mini_llava.training import backend
from mini_llava.training.lockstep import Lockstep
from mini_llava.training.optimizer import learning_rates, set_learning_rates
from mini_llava.training.order import choose_order
from mini_llava.training.schedule import learning_rate_factor, warmup_steps
from mini_llava.training.sharded_state import ShardedState
from mini_llava.watch import first_batch, trackers
from mini_llava.watch.flops import FlopCounter, peak_flops
from mini_llava.watch.meter import Meter, loss_parts
from mini_llava.watch.norms import norms_are_due, step_norms
from mini_llava.watch.report import Report


@ownership.released_at_the_end()
@background.finished_at_the_end()
def train(arguments: flags.Arguments, advice: MemoryAdvice | None = None) -> None:
    """Train as the flags say. `advice` comes to know what to change if memory runs out."""
    training, output_dir = arguments.training, Path(arguments.training.output_dir)
    rank, world_size = launched_rank()
    report = Report(arguments, rank)
    if arguments.is_demo:
        arguments, note = demo.prepare_run(arguments)
        report.log(note)
    early.check_run(arguments, preemption)

    # --- What it starts from: a language model and a tower, or a LLaVA model, which then fixes some of the flags ------
    source = open_source(arguments.model, arguments.explicit, arguments.data)
    arguments = report.arguments = arguments.fixed_by(source)
    report.log(source.describe(arguments.model.pretrain_mm_mlp_adapter))
    write.check_may_be_written(output_dir, arguments.model, training.export_format, source.vision_config)

    # --- Data, processes, and the order: the global batches, the micro-batches of each, the longest of these ----------
    data = read_data(arguments, source, report.log)
    accelerator = backend.start(arguments)
    liveness.watch_other_ranks(rank, world_size, preemption.exit_code)
    order = choose_order(arguments, data.samples.store, data.lengths, world_size)
    sampler, total_steps = order.sampler, order.total_steps
    findings = preflight.check_run(arguments, source, data.samples, data.lengths, order, data.longest_held_out)
    for line in preflight.report(findings, training.allow):
        report.log(line)
    longest = (advice or MemoryAdvice()).longest_of(arguments, source, data, accelerator, order)

    # --- Model, what of it is trained, optimizer ---------------------------------------------------------------------
    torch.manual_seed(training.seed)  # the same on every rank, because new weights must be equal
    model, plan = build_model(arguments, source, data.samples.tokenizer, data.samples.new_tokens, accelerator)
    optimizer, table = build_optimizer(arguments, model, plan, accelerator)
    model, optimizer = backend.prepare(accelerator, model, optimizer)
    zero3.do_less(accelerator, model, optimizer)
    model.train()
    torch.manual_seed((training.seed << 16) + rank)  # from here on each rank has dropout masks of its own

    # --- Resume, and what is seen and tried before step 1 ------------------------------------------------------------
    saving = Saving(arguments, ShardedState(accelerator, model, optimizer), source, data, order)
    report.log(saving.shared_note)
    resumed = saving.resume(report.log)
    if rank == 0:
        preemption.forget_earlier()
    notes = preflight.ddp_memory_note(accelerator, model), saving.disk_note(), saving.memory_note()
    report.begin(accelerator, data, order, table, notes, resumed)
    first_batch.show(accelerator, data.samples, order.dealt_batches(), sampler.step + 1)
    if training.longest_batch_first and sampler.step < total_steps:  # its gradients are discarded: only memory is tried
        report.log(try_longest(accelerator, model, optimizer, data.rank_steps, longest))
    lockstep = Lockstep(accelerator, preemption, arguments.data.max_skipped_share * sampler.global_batch_size)
    evaluation = Evaluation(arguments, model, data.held_out, data.questions, total_steps, lockstep)
    # Before step 1, and where a kill came between a save and its evaluation.
    if evaluation.is_due(sampler.step) and not evaluation.evaluate(sampler.step, report.log):
        lockstep.raise_fault()

    # --- The loop ----------------------------------------------------------------------------------------------------
    loader = rank_step_loader(
        data.rank_steps,
        order.batches_of_rank(rank),
        arguments.data,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=start_worker,
        stop_waiting=lambda: preemption.asked,
    )
    warmup = warmup_steps(training.warmup_ratio, total_steps, training.warmup_steps)
    flops = FlopCounter(accelerator.unwrap_model(model), peak_flops(accelerator))
    meter = Meter(accelerator, flops, loss_parts(data.samples.store.source_names(), data.lengths.has_image))
    report.start_progress_line()
    gc.collect()
    gc.freeze()  # model and libraries stay: collections in the loop need not look through them again
    preemption.heed()

    for rank_step in meter.waiting_for(lockstep.steps(loader)):
        if lockstep.global_samples:
            factor = learning_rate_factor(training.lr_scheduler_type, sampler.steps_taken, total_steps, warmup)
            set_learning_rates(optimizer, factor)  # before the last backward, inside which DeepSpeed steps
            for micro_batch in rank_step:
                with backend.micro_step(accelerator, model, micro_batch.is_last):
                    batch = backend.to_device(micro_batch.batch, accelerator.device)
                    token_losses = model(**batch, reduction="none")
                    if training.loss_normalization == "global_batch":
                        loss = token_losses.sum() / lockstep.global_trained_tokens.float().clamp(min=1)
                    else:  # LLaVA's mean of means, blind to how many tokens a micro-batch trains
                        count = max(micro_batch.trained_tokens, 1) * len(rank_step.micro_batches) * world_size
                        loss = token_losses.sum() / count
                    # The divisor is the whole global batch's, so gradients are to be summed; every backend averages.
                    backend.backward(accelerator, loss * world_size)
                meter.add(micro_batch, token_losses, loss)
            gradient_norm, finite = backend.optimizer_step(accelerator, optimizer, training.max_grad_norm)
            if not finite and lockstep.stop(why_not_taken(accelerator, meter, sampler, rank_step, data.samples.store)):
                break
            meter.add_step(rank_step)
        else:  # every sample of the global batch was skipped: AdamW would still decay and move the weights
            sampler.empty_steps += 1
        sampler.step = step = sampler.step + 1
        report.skipped(rank_step.skipped)

        lockstep.read()
        report.log(saving.news())
        is_reported = report.is_due(step) or saving.is_due(step) or evaluation.is_due(step) or lockstep.stopping
        if is_reported and meter.steps:
            values = meter.read()  # here the host waits for the device
            values |= {"learning_rate": training.learning_rate * factor, "gradient_norm": float(gradient_norm)}
            values |= learning_rates(optimizer)
            if finite and norms_are_due(step, total_steps):
                with meter.paused("norm_seconds"):
                    values |= step_norms(accelerator, model, optimizer)
            report.step(step, values, evaluation.in_a_word())
        if saving.is_due(step):
            with meter.paused("save_seconds"):
                # A state that a fault has ended replaces none.
                report.log(saving.save(behind=not lockstep.stopping, removes_old=not lockstep.has_fault))
            lockstep.agree()  # asked during a save, the run ends with that one
        if evaluation.is_due(step) and not lockstep.stopping:
            with meter.paused():
                evaluation.evaluate(step, report.log)  # in which it may be asked to stop
        if lockstep.stopping:
            break
    with meter.paused("save_seconds"):
        report.log(saving.finish())
    report.end_progress_line()

    # --- The result; or the state of a run that ends before it has one, or in its last evaluation ---------------------
    if not lockstep.stopping:
        report.log(saving.write_result())
        report.count_skipped()
        evaluation.evaluate(total_steps, report.log)
    if lockstep.stopping:  # from the loop, or asked to in the last evaluation
        if sampler.step != saving.saved_step:
            report.log(saving.save(removes_old=not lockstep.has_fault))
        if lockstep.fault and lockstep.ahead:  # too much was skipped, and its last step is not in the list yet
            report.skipped(lockstep.ahead.skipped)
        lockstep.raise_fault()
        if rank == 0 and not lockstep.interrupted:  # a person is there; nothing shall start it again
            write_marker(output_dir, sampler.step, total_steps)
        report.log(f"Stopped after step {sampler.step} as asked; --resume_from_checkpoint latest goes on.")
    else:
        report.summarise(meter.pauses)
    liveness.leave("finished")
    trackers.end(accelerator)
    backend.end_training(accelerator, model)
    if lockstep.stopping:
        sys.exit(INTERRUPTED if lockstep.interrupted else EXIT_CODE)


def main() -> None:
    """Run the program: what the person at the terminal can fix ends it with a sentence, a bug with its traceback."""
    arguments, advice = flags.parse_arguments(), MemoryAdvice()
    try:
        train(arguments, advice)
    except USER_ERRORS as error:
        early.end_refused(error, Path(arguments.training.output_dir))
    except RuntimeError as error:
        if sentence := advice.sentence(error):
            remove_marker(Path(arguments.training.output_dir))
            sys.exit(f"train.py: error on rank {launched_rank()[0]}: {sentence}")
        liveness.wait_for_the_sentence()
        raise
    finally:
        liveness.leave("failed")  # unless it has left already, finished


if __name__ == "__main__":
    main()
