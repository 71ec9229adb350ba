"""Reports of a run: the terminal, log.jsonl, skipped.jsonl, trackers and the summary."""

from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator

from .. import demo
from ..arguments import Arguments, save_arguments
from ..data.templates import TEMPLATES
from ..guards import output_folder
from ..guards.never_fatal import never_fatal
from ..read_data import Data
from ..training import backend
from ..training.order import Order
from ..words import counted
from . import trackers
from .json_lines import append_json_line, truncate_lines
from .progress import ProgressLine
from .skipped import count_skipped, log_skipped
from .summary import write_summary


class Report:
    """Reports what a run does. Only rank 0 prints and writes."""

    def __init__(self, arguments: Arguments, rank: int):
        self.arguments, self.is_first = arguments, rank == 0
        self.output_dir = Path(arguments.training.output_dir)
        self.progress: ProgressLine | None = None

    def log(self, text: str | None) -> None:
        """Print a text, if any, above the progress line."""
        if text and self.is_first:
            print(text) if self.progress is None else self.progress.log(text)

    def begin(
        self,
        accelerator: Accelerator,
        data: Data,
        order: Order,
        table: str,
        notes: Iterable[str | None],
        resumed: Path | None,
    ) -> None:
        """Print what is trained on what, save the arguments, start log and trackers. A collective.

        Args:
            table: of what is trained.
            notes: sentences to print below it.
            resumed: the training state that the run continues.
        """
        self.accelerator, self.data, self.order = accelerator, data, order
        sampler, lengths = order.sampler, data.lengths
        self.log(f"\n{backend.describe(accelerator)}\n\n{table}\n")
        for note in (order.note, sampler.describe_mixture(data.samples.store.source_names()), *notes):
            self.log(note)
        self.log(
            f"{counted(len(data.samples.store), 'record')}, {int(lengths.has_image.sum()):,} with images, "
            f"{counted(int(lengths.length.sum()), 'token')}; {counted(order.total_steps, 'step')} of "
            f"{counted(sampler.global_batch_size, 'sample')}, {order.layout}."
            + (f" Resumed from {resumed} at step {sampler.step}." if resumed else "")
        )
        resumed_at = sampler.step if resumed else None
        if self.is_first:
            keep = self.arguments.training.save_total_limit
            for note in output_folder.remove_leftovers(self.output_dir, sampler.step, keep):
                self.log(note)
            save_arguments(self.arguments, self.output_dir / "arguments.yaml", backend.versions())
            self.log(prepare_reports(self.output_dir, resumed_at))
            if not resumed:
                self.skipped(lengths.bad.items())
        trackers.start(accelerator, self.arguments.as_dict(), resumed_at, table)

    def start_progress_line(self) -> None:
        """Show the progress line."""
        template = TEMPLATES.get(self.arguments.model.version)  # None: the tokenizer's own
        # The plain template drops the questions, so that what is predicted are captions.
        loss = "caption loss" if template and template.captions_only else "answer loss"
        self.progress = ProgressLine(self.order.total_steps, self.order.sampler.step, self.is_first, loss)

    def is_due(self, step: int) -> bool:
        """Return whether this step is logged."""
        return step % self.arguments.training.logging_steps == 0 or step == self.order.total_steps

    def step(self, step: int, values: dict[str, float], evaluation: str) -> None:
        """Report a step's values, and in the progress line the newest evaluation."""
        values["epoch"] = step / self.order.sampler.steps_per_epoch
        trackers.log(self.accelerator, values, step)
        self.progress.update(step, values, evaluation)
        if self.is_first:
            append_json_line(self.output_dir / "log.jsonl", {"step": step, **values})

    def skipped(self, records: Iterable[tuple[int, str]]) -> None:
        """Append this rank's skipped records with their reasons to `skipped.jsonl`."""
        with never_fatal(f"{self.output_dir}/skipped.jsonl lacks entries"):
            log_skipped(self.data.samples.store, records, self.output_dir / "skipped.jsonl")

    def end_progress_line(self) -> None:
        """Close the progress line."""
        self.progress.close()
        self.progress = None

    def count_skipped(self) -> None:
        """Print how many records were skipped in the whole run, by reason."""
        with never_fatal(f"{self.output_dir}/skipped.jsonl cannot be counted"):
            for line in count_skipped(self.output_dir / "skipped.jsonl"):
                self.log(f"skipped: {line}")

    def summarise(self, pauses: dict[str, float]) -> None:
        """Write and print the summary, of the demo with its table of scores, and draw the curves.

        pauses: seconds after the last entry of the log, see `write_summary`.
        """
        if self.is_first:
            every, store = self.arguments.training.logging_steps, self.data.samples.store
            projector = self.arguments.model.pretrain_mm_mlp_adapter
            is_demo = self.arguments.is_demo
            scores = demo.table_of_scores(self.arguments.stage, self.output_dir, projector) if is_demo else ""
            self.log(write_summary(self.output_dir, every, pauses, store, scores))


def prepare_reports(output_dir: Path, resumed_at: int | None) -> str | None:
    """Remove the reports of an earlier run, or truncate them to the step that this one resumes from.

    Entries beyond that step belong to work that was lost. Returns a sentence about it if there are any.
    """
    skipped, samples, log = (output_dir / f"{name}.jsonl" for name in ("skipped", "eval_samples", "log"))
    if resumed_at is None:
        for file in (log, samples, skipped):
            with never_fatal(f"{file} holds entries of an earlier run"):
                file.unlink(missing_ok=True)
        return None
    for file in (skipped, samples, log):
        last = {}
        with never_fatal(f"{file} holds torn lines or entries of steps that are done again"):
            last = truncate_lines(file, keep=lambda entry: entry.get("step", 0) <= resumed_at) or {}
    again = last.get("step", 0) - resumed_at
    if again <= 0:
        return None
    return f"The run had reached step {last['step']}: {again} of its steps {'is' if again == 1 else 'are'} done again."
