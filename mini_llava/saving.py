"""When and what a run saves: training states, from one of which it may go on, and the result."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from .arguments import Arguments
from .build import plan_of
from .formats import write
from .formats.read import Source
from .guards import output_folder
from .guards.checkpoints import complete_checkpoints, remove_oldest
from .guards.identity import differences, resume_notes, run_identity
from .guards.ownership import check_still_owned
from .guards.resume import find_checkpoint, refuse_another_run
from .model.trained import trained_in_full
from .options import lora
from .options.background import BackgroundWriter
from .read_data import Data
from .training import backend, checkpoint
from .training.order import Order, steps_between_states
from .training.sharded_state import KINDS, ShardedState

FAILURES = (OSError, checkpoint.CheckpointError)


class Saving:
    """Writes training states and the result of a run, and resumes it.

    Attributes:
        saved_step: the step of the newest state on disk; before any, that at which the run began.
        writing: what will be said of the state that is being written behind the steps; None if none is.
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
        self.background = BackgroundWriter(accelerator)
        self.writing: Future | None = None

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

    def memory_note(self) -> str | None:
        """Take memory to write states behind the steps, if any will be; return a sentence if there is too little."""
        every, step = self.every, self.sampler.step
        if not self.flags.background_save or not every:
            return None
        if (self.total_steps - 1) // every <= step // every:  # the last step's is not written behind any
            return None
        return self.background.reserve(len(KINDS) * sum(p.own.stop - p.own.start for p in self.state.pieces()))

    def is_due(self, step: int) -> bool:
        """Return whether a state belongs after this step."""
        return bool(self.every) and step % self.every == 0

    def save(self, behind: bool = False, removes_old: bool = True) -> str:
        """Write a training state with loadable weights, and return a sentence about it. All ranks must call it.

        A failure is a warning, because a full disk must not cost the work that is still in memory.

        Args:
            behind: if there is memory for it, copy the state and have it written behind the next steps, of which there
                must be one; `news` or `finish` says what became of it. One state is written at a time.
            removes_old: the oldest states are then removed as `--save_total_limit` says.
        """
        said, step = [self.finish()], self.sampler.step
        save_trained = lora.save_lora if self.kind == "adapters" else write.save_projector_only
        behind = behind and self.background.buffer is not None and step < self.total_steps
        removes_old = removes_old and self.state.accelerator.is_main_process

        def write_state(tensors: Iterable[checkpoint.Tensors], gather: checkpoint.Gather) -> str:
            sentences = [begun.write(tensors, gather) + " The run went on meanwhile." * behind]
            self.saved_step = step
            if removes_old:
                sentences += remove_oldest(self.output_dir, step, self.flags.save_total_limit)
            return "\n".join(sentences)

        try:
            begun = checkpoint.begin_checkpoint(
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
            if behind:
                copies = self.background.copied(begun.tensors())
                self.writing = self.background.start(functools.partial(write_state, copies, self.background.gather))
            else:
                said.append(write_state(begun.tensors(), backend.gather_from_ranks))
        except FAILURES as error:
            said.append(self._warning(error))
        return "\n".join(filter(None, said))

    def news(self) -> str | None:
        """Return what became of the state that is written behind the steps, once that is known."""
        return self._outcome() if self.writing and self.writing.done() else None

    def finish(self) -> str | None:
        """Wait for the state that is written behind the steps, and return what became of it. All ranks must call it."""
        said = self._outcome() if self.writing else None
        backend.gather_from_ranks(self.state.accelerator, None)  # none goes on while another's thread needs it
        return said

    def _outcome(self) -> str:
        writing, self.writing = self.writing, None
        try:
            return writing.result()
        except FAILURES as error:
            return self._warning(error)

    def _warning(self, error: Exception) -> str:
        present = complete_checkpoints(self.output_dir)
        return (
            f"Warning: {error} The run goes on and the next save tries again; a crash before that loses the work "
            f"since {present[-1].name if present else 'the beginning'}."
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
