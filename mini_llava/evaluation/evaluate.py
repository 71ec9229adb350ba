"""Held-out records while a model trains: their loss, and greedy answers to their last questions.

LLaVA's training has no evaluation. The questions are also asked with the images shuffled: what a model still gets right
then, it did not see. An evaluation changes nothing of the training: no weight, no random generator, no order.
"""

import itertools
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..arguments import Arguments
from ..data.loader import loss_group, rank_step_loader
from ..data.samples import Samples
from ..data.templates import written_answer
from ..errors import UserError
from ..guards.never_fatal import never_fatal
from ..guards.preemption import start_worker
from ..options.zero3 import weights_stay
from ..training.backend import gather_from_ranks, sum_over_ranks, zero_stage
from ..training.lockstep import Lockstep
from ..watch import trackers
from ..watch.json_lines import append_json_line, append_lines, read_lines
from ..watch.meter import loss_parts
from ..watch.progress import questions_bar
from ..words import counted
from .asking import Asker, HeldOutPictures, Opened, asked_in_all, deal_beginnings, find_beginnings, group_asked
from .generate import attention_with_cache
from .questions import Question, shuffle_images
from .scoring import CHOICE, EXACT_MATCH, is_right
from .shown import ShownAnswer, as_picture, as_table

# An answer longer than the longest expected one is wrong in any case; a choice may be put into a sentence.
LONGER_THAN_EXPECTED = {EXACT_MATCH: 4, CHOICE: 32}  # tokens
IN_WORDS = {EXACT_MATCH: "answered exactly", CHOICE: "chosen right"}


class _Ended(Exception):
    """Ends an evaluation in which the run ends."""


class Evaluation:
    """Evaluates before and after training and every `--eval_steps` steps; without `--eval_data_path` it does nothing.

    history: on rank 0 the entries of all evaluations in `log.jsonl`, those before a resume included.
    """

    def __init__(
        self,
        arguments: Arguments,
        model: nn.Module,
        samples: Samples | None,
        questions: list[Question],
        total_steps: int,
        lockstep: Lockstep,
    ):
        """
        Args:
            model: a prepared `LlavaModel`.
            samples: the held-out ones; None without `--eval_data_path`.
            questions: from `read_questions`.
            lockstep: asked between two batches whether the run ends here.
        """
        self.data_flags, self.training = arguments.data, arguments.training
        self.accelerator, self.model, self.lockstep = lockstep.accelerator, model, lockstep
        self.total_steps, self.output_dir = total_steps, Path(arguments.training.output_dir)
        self.samples, self.questions = samples, questions
        self.history: list[dict] = []
        if not self.questions:
            return
        self.store, self.tokenizer, self.template = samples.store, samples.tokenizer, samples.template
        sources = [self.store.source(question.index) for question in self.questions]
        with_image = [bool(question.images) for question in self.questions]
        self.parts = loss_parts(self.store.source_names(), with_image)
        metrics = [question.metric for question in self.questions]
        self.counts = {metric: metrics.count(metric) for metric in (EXACT_MATCH, CHOICE) if metric in metrics}
        stop = [text for text in self.template.stop if text in self.tokenizer.get_vocab()]
        self.ends = self.tokenizer.convert_tokens_to_ids(stop) or [self.tokenizer.eos_token_id]
        self.answer_limits = [self._answer_limit(question) for question in self.questions]
        self.groups = np.array([loss_group(*pair) for pair in zip(sources, with_image, strict=True)])
        shown = min(self.data_flags.eval_samples_shown, len(self.questions))
        self.shown = np.linspace(0, len(self.questions) - 1, shown).astype(int).tolist()
        if self.accelerator.is_main_process:
            entries = read_lines(self.output_dir / "log.jsonl")
            self.history = [entry for entry in entries if "eval/loss" in entry]
        self.evaluated = set(gather_from_ranks(self.accelerator, [entry["step"] for entry in self.history])[0])

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation is missing after this step; the one after the last step is not asked for here.

        A resumed run skips the evaluation before training and makes the one that a kill interrupted.
        """
        if not self.questions or step >= self.total_steps or step in self.evaluated:
            return False
        steps = self.training.eval_steps
        return step == 0 or (steps > 0 and step % steps == 0)

    def evaluate(self, step: int, log: Callable[[str], None]) -> bool:
        """Measure, write `log.jsonl` and `eval_samples.jsonl`, and feed the trackers, unless the log has this step.

        A collective. Returns False if the run ends within it: it was asked to stop, or an image cannot be opened any
        more; `lockstep` knows which. Raises UserError if memory runs out.
        """
        if not self.questions or step in self.evaluated:
            return True
        started = time.perf_counter()
        # Shuffled images take more time: only before and after training.
        with_others, title = [], "held-out questions"
        if step in (0, self.total_steps) and any(question.images for question in self.questions):
            with_others = shuffle_images(self.questions, self.training.seed)
            title += ", images in place and shuffled"
        try:
            with self._evaluation_mode():
                losses, answers, shuffled = self._ask(with_others, title)
        except _Ended:
            return False
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory has run out while held-out questions were answered, "
                f"{self.training.per_device_eval_batch_size} at once: lower --per_device_eval_batch_size."
            ) from error
        # Nothing predicts a first token.
        trained = np.array([question.trained[1:].sum() for question in self.questions])
        values = self._values(losses, trained, answers, with_others and shuffled)
        values["eval/seconds"] = time.perf_counter() - started
        self.evaluated.add(step)
        if not self.accelerator.is_main_process:
            return True
        self.history.append({"step": step, **values})
        append_json_line(self.output_dir / "log.jsonl", self.history[-1])
        trackers.log(self.accelerator, values, step)
        self._show(step, losses / trained, answers)
        log(self._in_a_sentence(self.history[-1]))
        return True

    def _go_on(self, fault: Exception | None = None) -> None:
        """Raise `_Ended` on all ranks, between two batches, if one of them has a fault or was asked to stop."""
        if self.lockstep.agree(fault):
            raise _Ended

    @property
    def best(self) -> dict | None:
        """Return the entry of `history` with most questions right, then the lowest loss, then the latest step."""
        rank = lambda entry: (self.share_right(entry), -entry["eval/loss"])  # noqa: E731
        return max(reversed(self.history), key=rank, default=None)

    def share_right(self, entry: dict) -> float:
        """Return the share of questions answered right in an entry of `history`, each by its own metric."""
        right = sum(count * entry.get(f"eval/{metric}", 0.0) for metric, count in self.counts.items())
        return right / len(self.questions)

    def in_a_word(self) -> str:
        """Return the newest evaluation for the progress line; empty before there is one."""
        if not self.history:
            return ""
        newest = self.history[-1]
        return f"held-out loss {newest['eval/loss']:.4f}, {self.share_right(newest):.0%} right"

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Switch off dropout and gradients, and restore the random generators at the end."""
        was_training, device = self.model.training, self.accelerator.device
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                yield
        finally:
            self.model.train(was_training)

    def _ask(self, shuffled: Sequence[Question], title: str) -> tuple[np.ndarray, list[str], list[str]]:
        """Return each record's summed token loss, fp64 [questions], the greedy answers and those to `shuffled`.

        shuffled: the questions with other images; empty: they are not asked. title: of the progress bar.
        A collective. Under ZeRO-3 each forward is one: a rank without work repeats some, which does not count.
        """
        accelerator, rank = self.accelerator, self.accelerator.process_index
        model = accelerator.unwrap_model(self.model)

        def anywhere(value: bool | torch.Tensor) -> bool:
            return bool(sum_over_ranks(accelerator, float(value)) if zero_stage(accelerator) == 3 else value)

        asker = Asker(model, accelerator.device, self.ends, self.answer_limits, anywhere)
        at_once = self.training.per_device_eval_batch_size
        tokens = at_once * self.data_flags.model_max_length
        found = find_beginnings(self.questions, shuffled, self.store.image_folder, asker.shares)
        rounds = deal_beginnings(found, accelerator.num_processes, at_once, tokens)
        mine = [units[rank % len(units)] for units in rounds]
        pictures = rank_step_loader(
            HeldOutPictures(self.samples),
            ([[each.record for each in unit]] for unit in mine),
            self.data_flags,
            pin_memory=False,
            worker_init_fn=start_worker,
            stop_waiting=lambda: self.lockstep.preemption.asked,
        )
        sums = torch.zeros(len(self.questions), dtype=torch.float64, device=accelerator.device)
        answers: dict[tuple[int, bool], str] = {}
        with (
            weights_stay(accelerator, model),
            attention_with_cache(model.language_model),
            questions_bar(asked_in_all(found), title, accelerator.is_main_process) as bar,
        ):
            for units, unit in zip(rounds, mine, strict=True):
                opened = self._next_opened(pictures)
                groups = [group_asked(each, self.answer_limits, tokens, asker.shares) for each in units]
                own = groups[rank % len(units)]
                with accelerator.autocast():
                    asker.begin(unit, opened.pictures)
                    for number in range(max(map(len, groups))):
                        group = own[number % len(own)]
                        losses, written = asker.ask(group)
                        if rank >= len(units) or number >= len(own):
                            continue
                        rows = [row for row, (_, asked) in enumerate(group) if asked.with_loss]
                        sums[[group[row][1].place for row in rows]] += losses[rows]
                        for (_, asked), text in zip(group, self.tokenizer.batch_decode(written), strict=True):
                            if asked.start is not None:
                                answers[asked.place, asked.shuffled] = written_answer(self.template, text)
                bar.update(asked_in_all(itertools.chain(*units)))
        answers = ChainMap(*gather_from_ranks(accelerator, answers))
        in_place = [answers[place, False] for place in range(len(self.questions))]
        with_others = [answers.get((place, True), answer) for place, answer in enumerate(in_place)]
        return sum_over_ranks(accelerator, sums).cpu().numpy(), in_place, with_others

    def _next_opened(self, loader: Iterator[Opened]) -> Opened:
        opened, fault = None, None
        try:
            opened = next(loader, None)  # None: asked to stop while waiting
        except Exception as error:  # of a loader's worker too: the training state is saved first
            fault = error
        self._go_on(fault)
        return opened

    def _answer_limit(self, question: Question) -> int:
        expected = self.tokenizer(self.template.answer_lead + question.answer, add_special_tokens=False).input_ids
        return len(expected) + LONGER_THAN_EXPECTED[question.metric]

    def _values(
        self, losses: np.ndarray, trained: np.ndarray, answers: Sequence[str], shuffled: Sequence[str]
    ) -> dict[str, float]:
        """Return the values for the log. A loss is the mean over trained tokens, as in training."""
        values = {"eval/loss": losses.sum() / trained.sum()}
        for name, groups in self.parts.items():
            if (chosen := np.isin(self.groups, groups)).any():
                values[f"eval/{name}"] = losses[chosen].sum() / trained[chosen].sum()
        right = self._are_right(answers)
        files = {name.removeprefix("loss"): groups for name, groups in self.parts.items() if name.startswith("loss/")}
        for metric in self.counts:
            asked = np.array([question.metric == metric for question in self.questions])
            values[f"eval/{metric}"] = right[asked].mean()
            if shuffled:
                values[f"eval/{metric}_shuffled"] = self._are_right(shuffled)[asked].mean()
            for file, groups in files.items():
                if (of_file := asked & np.isin(self.groups, groups)).any():
                    values[f"eval/{metric}{file}"] = right[of_file].mean()
        return {name: float(value) for name, value in values.items()}

    def _are_right(self, answers: Sequence[str]) -> np.ndarray:
        asked = zip(self.questions, answers, strict=True)
        return np.array([is_right(question.metric, answer, question.answer) for question, answer in asked])

    def _show(self, step: int, losses: np.ndarray, answers: Sequence[str]) -> None:
        shown = []
        for place in self.shown:
            question, answer = self.questions[place], answers[place]
            images = [(self.store.image_folder(index), name) for index, name in question.images]
            right = is_right(question.metric, answer, question.answer)
            of_record = (self.store.describe(question.index), images, question.text, question.answer)
            shown.append(ShownAnswer(*of_record, answer, right, float(losses[place])))
        if not shown:
            return
        file = self.output_dir / "eval_samples.jsonl"
        with never_fatal(f"{file} lacks entries"):
            append_lines(file, [sample.as_entry(step) for sample in shown])
        if self.accelerator.trackers:
            with never_fatal("TensorBoard lacks held-out answers, which eval_samples.jsonl has"):
                trackers.show(self.accelerator, "eval/answers", as_picture(shown), as_table(shown), step)

    def _in_a_sentence(self, entry: dict) -> str:
        parts = []
        for metric, count in self.counts.items():
            of = f" of {count:,}" if len(self.counts) > 1 else ""
            parts.append(f"{entry[f'eval/{metric}']:.1%}{of} {IN_WORDS[metric]}")
            if f"eval/{metric}_shuffled" in entry:
                parts.append(f"{entry[f'eval/{metric}_shuffled']:.1%} with the images shuffled")
        loss = f"loss {entry['eval/loss']:.4f}, {entry['eval/seconds']:.1f} s"
        moment = self._moment(entry["step"])
        sentence = f"{counted(len(self.questions), 'held-out question')} {moment}: {', '.join(parts)}. ({loss})"
        if entry["step"] == self.total_steps and self.best is not entry:
            sentence += f" It was best {self._moment(self.best['step'])}: {self.share_right(self.best):.1%} right."
        return sentence

    def _moment(self, step: int) -> str:
        return {0: "before training", self.total_steps: "after training"}.get(step, f"after step {step:,}")
