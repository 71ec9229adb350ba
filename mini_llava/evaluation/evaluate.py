"""Held-out records while a model trains: their loss, and greedy answers to their last questions.

LLaVA's training has no evaluation. The questions are also asked with the images shuffled: what a model still gets right
then, it did not see. An evaluation changes nothing of the training: no weight, no random generator, no order.
"""

import itertools
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from ..arguments import Arguments
from ..data.collator import sample_of_targets
from ..data.images import Picture
from ..data.loader import RankStep, RankSteps, loss_group, rank_step_loader
from ..data.sampler import deal
from ..data.samples import Samples
from ..data.templates import IMAGE_MARK, BadRecord, written_answer
from ..data.tokenization import IGNORE_INDEX
from ..errors import UserError
from ..guards.never_fatal import never_fatal
from ..guards.preemption import start_worker
from ..image_files import BadImage
from ..training.backend import gather_from_ranks, sum_over_ranks, to_device, zero_stage
from ..training.lockstep import Lockstep
from ..watch import trackers
from ..watch.json_lines import append_json_line, append_lines, read_lines
from ..watch.meter import loss_parts
from ..watch.progress import questions_bar
from ..watch.skipped import fault_table
from ..words import counted
from .generate import expand_prompt, generate
from .scoring import CHOICE, EXACT_MATCH, is_right, metric_of
from .shown import ShownAnswer, as_picture, as_table

# An answer longer than the longest expected one is wrong in any case; a choice may be put into a sentence.
LONGER_THAN_EXPECTED = {EXACT_MATCH: 4, CHOICE: 32}  # tokens
IN_WORDS = {EXACT_MATCH: "answered exactly", CHOICE: "chosen right"}


class _Ended(Exception):
    """Ends an evaluation in which the run ends."""


@dataclass
class Question:
    """A held-out record, ready to be asked.

    Attributes:
        index: in the store of held-out records.
        input_ids: the prompt up to the answer, int32 [L], with one token for each image.
        images: (record, name) of its images; of another record where images are shuffled.
        text, answer: the last question and the expected answer.
        metric: how an answer is scored, see `scoring.py`.
        tokens: of the whole record as in training, image tokens included.
    """

    index: int
    input_ids: np.ndarray
    images: list[tuple[int, str]]
    text: str
    answer: str
    metric: str
    tokens: int


def read_questions(samples: Samples, most: int | None, seed: int) -> list[Question]:
    """Return held-out records as questions, at most `most` of them, drawn by `seed`.

    Raises BadRecord with all records that cannot be asked: without them the score would not be comparable.
    """
    chosen = range(len(samples))
    if most and most < len(samples):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(samples), generator=generator)[:most].tolist()
    questions, faults = [], []
    for index in chosen:
        try:
            tokens, prompt = len(samples.tokenize(index).input_ids), samples.prompt(index)
            names = samples.store.image_names(index)
            if fault := samples.missing_image(index, names):
                raise BadRecord(fault)
            record = samples.store[index]
            *_, question, answer = record["conversations"]
            if answer["from"] != "gpt":
                raise BadRecord("its last question has no answer to compare with.")
            text = question["value"].replace(IMAGE_MARK, "").strip()
            images = [(index, name) for name in names]
            questions.append(Question(index, prompt, images, text, answer["value"], metric_of(record), tokens))
        except (BadRecord, BadImage) as error:
            faults.append((index, str(error)))
    if len(faults) == 1:
        [(index, sentence)] = faults
        raise BadRecord(f"--eval_data_path: {samples.describe(index)}: {sentence}")
    if faults:
        title = f"--eval_data_path: {len(faults):,} of {counted(len(chosen), 'record')} cannot be asked; fix them."
        raise BadRecord("\n".join([title, *fault_table(samples.store, faults)]))
    return questions


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions with their images permuted among questions with equally many images."""
    shuffled = list(questions)
    generator = torch.Generator().manual_seed(seed)
    for count in {len(question.images) for question in questions} - {0}:
        places = [i for i, question in enumerate(questions) if len(question.images) == count]
        for place, other in zip(places, torch.randperm(len(places), generator=generator).tolist(), strict=True):
            shuffled[place] = replace(questions[place], images=questions[places[other]].images)
    return shuffled


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
        shuffled = None
        try:
            with self._evaluation_mode():
                losses, trained = self._losses()
                answers = self._answers(self.questions, "held-out answers")
                # It doubles the time: only before and after training.
                if step in (0, self.total_steps) and any(question.images for question in self.questions):
                    with_others = shuffle_images(self.questions, self.training.seed)
                    shuffled = self._answers(with_others, "the same, images shuffled")
        except _Ended:
            return False
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory has run out while held-out questions were answered, "
                f"{self.training.per_device_eval_batch_size} at once: lower --per_device_eval_batch_size."
            ) from error
        values = self._values(losses, trained, answers, shuffled) | {"eval/seconds": time.perf_counter() - started}
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
        return f"held out {self.history[-1]['eval/loss']:.4f} {self.share_right(self.history[-1]):.0%}"

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

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each record's summed token loss and its number of trained tokens, fp64 [questions].

        Under ZeRO-3 each forward is a collective: all ranks have equally many micro-batches, some of them empty.
        """
        ranks, rank, device = self.accelerator.num_processes, self.accelerator.process_index, self.accelerator.device
        lengths = [question.tokens for question in self.questions]
        by_length = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        size = self.training.per_device_eval_batch_size * ranks
        layout = "packed" if self.data_flags.packing else "padded"
        mine = []  # for each step the places of the questions in each micro-batch of this rank
        for start in range(0, len(by_length), size):
            batch = by_length[start : start + size]
            dealt = deal(batch, lengths, ranks, 1, layout, self.data_flags.max_tokens_per_micro_batch)
            mine.append([of_ranks[rank] for of_ranks in dealt])
        loader = rank_step_loader(
            RankSteps(self.samples, self.data_flags.packing, on_bad_sample="skip"),
            ([[self.questions[place].index for place in places] for places in step] for step in mine),
            self.data_flags,
            pin_memory=device.type == "cuda",
            worker_init_fn=start_worker,
            stop_waiting=lambda: self.lockstep.preemption.asked,
        )
        sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=device)
        with questions_bar(len(lengths), "held-out loss", self.accelerator.is_main_process) as bar:
            for step in mine:
                work = self._next_work(loader)
                for places, batch in zip(step, work.micro_batches, strict=True):
                    losses = self.model(**to_device(batch, device), reduction="none")
                    if places:
                        owners = torch.tensor(places)[sample_of_targets(batch)].flatten().to(device)
                        trained = (batch["targets"] != IGNORE_INDEX).flatten().to(device)
                        sums[0].index_add_(0, owners, losses.flatten().double())
                        sums[1].index_add_(0, owners, trained.double())
                bar.update(min(size, len(lengths) - bar.n))  # of all ranks
        losses, trained = sum_over_ranks(self.accelerator, sums).cpu().numpy()
        return losses, trained

    def _next_work(self, loader: Iterator[RankStep]) -> RankStep:
        work, fault = None, None
        try:
            work = next(loader, None)  # None: asked to stop while waiting
            for index, reason in work.skipped if work else ():
                fault = BadRecord(f"--eval_data_path: {self.store.describe(index)}: {reason}")
        except Exception as error:  # of a loader's worker too: the training state is saved first
            fault = error
        self._go_on(fault)
        return work

    def _answers(self, questions: Sequence[Question], title: str) -> list[str]:
        """Return the greedy answer to each question, up to its end mark, on every rank. A collective.

        title: of the progress bar.
        """
        stop = [text for text in self.template.stop if text in self.tokenizer.get_vocab()]
        settings = {
            "do_sample": False,
            "eos_token_id": self.tokenizer.convert_tokens_to_ids(stop) or self.tokenizer.eos_token_id,
            "pad_token_id": 0,
        }
        batch_size, rank = self.training.per_device_eval_batch_size, self.accelerator.process_index
        sizes = [(len(question.images), len(question.input_ids)) for question in questions]
        order = sorted(range(len(questions)), key=sizes.__getitem__)
        answers: dict[int, str] = {}
        size = batch_size * self.accelerator.num_processes
        with questions_bar(len(questions), title, self.accelerator.is_main_process) as bar:
            for start in range(0, len(order), size):
                first = start + rank * batch_size
                places = order[first : first + batch_size]
                # Under ZeRO-3 each forward is a collective: surplus ranks repeat a question, which does not count.
                asked = places or order[:1]
                pictures, fault = [], None
                try:
                    pictures = [[self._picture(*image) for image in questions[place].images] for place in asked]
                except Exception as error:
                    fault = error
                self._go_on(fault)
                limit = max(self.answer_limits[place] for place in asked)
                prompts = [questions[place].input_ids for place in asked]
                texts = self._generate(prompts, pictures, GenerationConfig(**settings, max_new_tokens=limit))
                answers |= zip(places, texts, strict=False)
                bar.update(min(size, len(order) - start))
        gathered = ChainMap(*gather_from_ranks(self.accelerator, answers))
        return [gathered[place] for place in range(len(questions))]

    def _generate(
        self, prompts: Sequence[np.ndarray], pictures: Sequence[Sequence[Picture]], settings: GenerationConfig
    ) -> list[str]:
        with self.accelerator.autocast():
            output = generate(
                self.accelerator.unwrap_model(self.model),
                [expand_prompt(*pair) for pair in zip(prompts, pictures, strict=True)],
                list(itertools.chain(*pictures)),
                self.accelerator.device,
                generation_config=settings,
                synced_gpus=zero_stage(self.accelerator) == 3,
            )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=False)
        return [written_answer(self.template, text) for text in texts]

    def _picture(self, index: int, name: str) -> Picture:
        try:
            return self.samples.image_reader.open(self.store.image_folder(index), name)
        except BadImage as error:
            raise BadImage(f"--eval_data_path: {self.store.describe(index)}: {error}") from None

    def _answer_limit(self, question: Question) -> int:
        expected = self.tokenizer(self.template.answer_lead + question.answer, add_special_tokens=False).input_ids
        return len(expected) + LONGER_THAN_EXPECTED[question.metric]

    def _values(
        self, losses: np.ndarray, trained: np.ndarray, answers: Sequence[str], shuffled: Sequence[str] | None
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
            if shuffled is not None:
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
