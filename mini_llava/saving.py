"""When and what a run saves: training states, from one of which it may go on, and the result."""

import functools
from collections.abc import Callable
from pathlib import Path

from .arguments import Arguments
from .build import plan_of
from .formats import write
from .formats.read import Source
from .guards import output_folder
from .guards.checkpoints import complete_checkpoints, find_checkpoint, refuse_another_run, remove_oldest
from .guards.identity import differences, resume_notes, run_identity
from .guards.ownership import check_still_owned
from .model.trained import trained_in_full
from .options import lora
from .read_data import Data
from .training import backend, checkpoint
from .training.order import Order, steps_between_states
from .training.sharded_state import ShardedState


class Saving:
    """Writes training states and the result of a run, and resumes it.

    Attributes:
        saved_step: the step of the newest state on disk; before any, that at which the run began.
    """

    def __init__(self, arguments: Arguments, state: ShardedState, source: Source, data: Data, order: Order):
        self.arguments, self.flags, self.state = arguments, arguments.training, state
        accelerator, model = state.accelerator, state.model
        self.sampler, self.total_steps = order.sampler, order.total_steps
        self.every = steps_between_states(self.flags, order)
        self.output_dir, trained = Path(self.flags.output_dir), trained_in_full(plan_of(arguments, source))
        trains_more = bool(trained - {"projector", "new_tokens", "image_newline"})
        self.kind = "adapters" if self.flags.lora_enable else "whole model" if trains_more else "projector"
        self.shared_note = output_folder.check_shared(accelerator, self.output_dir)
        self.identity = run_identity(accelerator, model, arguments, data, order)
        # A tower that is not quite the one of its name: trained, now or in the model that the run started from.
        tower_differs = "vision_tower" in trained or "vision_tower" in source.stored
        self.bare = accelerator.unwrap_model(model)
        self.description = write.Description(
            projector_type=arguments.model.mm_projector_type,
            vision_tower_name=arguments.model.vision_tower,
            version=arguments.model.version,
            image_aspect_ratio=arguments.data.image_aspect_ratio,
            model_max_length=arguments.data.model_max_length,
            template=data.samples.template,
            tokenizer=data.samples.tokenizer,
            image_processor=data.samples.image_reader.processor,
            export_format=self.flags.export_format,
            include_vision_tower=self.flags.save_vision_tower or tower_differs,
            dtype=backend.compute_dtype(accelerator),
        )
        self.saved_step = self.sampler.step

    def resume(self, log: Callable[[str], None]) -> Path | None:
        """Load the state that `--resume_from_checkpoint` names, and return its directory; None for a new run.

        Raises:
            CheckpointError: it is torn, or this run is not the one that wrote it.
        """
        wanted, ignored = self.flags.resume_from_checkpoint, self.flags.resume_ignore or []

        def check(manifest: dict) -> None:
            differing = differences(manifest["identity"], self.identity, ignored)
            refuse_another_run(*differing, self.state.shapes(), manifest["parameters"])

        found = find_checkpoint(self.state.accelerator, self.output_dir, wanted, log)
        if found:
            manifest = checkpoint.load_checkpoint(self.state, found, check)
            self.sampler.load_state_dict(manifest["sampler"], order_may_differ=bool(ignored))
            self.saved_step = self.sampler.step
            for note in resume_notes(manifest, self.identity):
                log(note)
        return found

    def disk_note(self) -> str | None:
        """Return a sentence if the disk has no room for what this run will write."""
        every, step = self.every, self.sampler.step
        saves = self.total_steps // every - step // every if every else 0
        kept = (self.output_dir, saves, self.flags.save_total_limit, self.kind == "whole model")
        itemsize = backend.compute_dtype(self.state.accelerator).itemsize
        return output_folder.disk_needs(self.bare, itemsize, *kept).warning(self.output_dir)

    def is_due(self, step: int) -> bool:
        """Return whether a state belongs after this step."""
        return self.every is not None and step % self.every == 0

    def save(self, removes_old: bool = True) -> str:
        """Write a training state with loadable weights, and return a sentence about it. All ranks must call it.

        A failure is a warning, because a full disk must not cost the work that is still in memory.

        removes_old: the oldest states are removed as `--save_total_limit` says.
        """
        step = self.sampler.step
        save_trained = lora.save_lora if self.kind == "adapters" else write.save_projector_only
        try:
            sentence = checkpoint.save_checkpoint(
                self.state,
                self.output_dir,
                step,
                {
                    "stage": self.arguments.stage,
                    "sampler": self.sampler.state_dict(),
                    "arguments": self.arguments.as_dict(),
                    "identity": self.identity,
                },
                write_weights=functools.partial(save_trained, model=self.bare, description=self.description),
                check_owner=check_still_owned,
            )
            self.saved_step = step
            if removes_old and self.state.accelerator.is_main_process:
                sentence = "\n".join([sentence, *remove_oldest(self.output_dir, step, self.flags.save_total_limit)])
            return sentence
        except (OSError, checkpoint.CheckpointError) as error:
            present = complete_checkpoints(self.output_dir)
            return (
                f"Warning: {error} The run goes on, and the next save is the next try; a crash before it loses the "
                f"work since {present[-1].name if present else 'the beginning'}."
            )

    def write_result(self) -> str:
        """Write what the run was for, in the layout that `--export_format` asks for, and return a line about it."""
        result = (self.output_dir, self.bare, self.description)
        with output_folder.writing_the_result(self.output_dir):
            if self.kind == "adapters":
                return lora.save_lora(*result)
            if self.kind == "whole model":
                return write.save_whole_model(*result)
            write.save_projector_only(*result)
            return (
                f"The projector is in {self.output_dir}/mm_projector.bin; stage 2 takes it as "
                "--pretrain_mm_mlp_adapter."
            )
