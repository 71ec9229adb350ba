"""What one rank has to compute in one optimizer step: read, tokenize, open the images, collate.

A global step is one item of a torch `DataLoader` without a sampler of its own: the main process deals the global batch
and sends each worker the record indices of this rank. Accelerate never sees the loader, so it cannot shard it again.
"""

import re
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.image_processing_utils import BaseImageProcessor

from ..options.tiles import Tiles, Tiling
from ..watch.json_lines import append_lines, read_lines
from ..words import counted
from .collator import MicroBatch, collate, sample_of_targets
from .images import BadImage, load_image, pixel_values
from .records import DataFileError, RecordStore
from .tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, BadRecord, Sample, shorten


def open_pixels(
    folder: str, name: str, processor: BaseImageProcessor, aspect_ratio: str, size: int, tiling: Tiling | None = None
) -> torch.Tensor | Tiles:
    """An image file to uint8 [3, size, size], or with a tiling (`aspect_ratio` is "anyres" then) to its tiles.

    Raises BadImage; ValueError if processor and tower disagree.
    """
    image = load_image(folder, name)
    if tiling is not None:
        return tiling.open(image, processor.resample)
    pixels = pixel_values(image, processor, aspect_ratio)
    if pixels.shape[1:] != (size, size):
        raise ValueError(
            f"The image processor gives {pixels.shape[2]}x{pixels.shape[1]} pixels, but the vision tower takes "
            f"{size}x{size}: its directory holds a preprocessor_config.json of another tower."
        )
    return pixels


def refuse_or_report(store: RecordStore, bad: dict[int, str], on_bad_sample: str) -> list[str]:
    """How many records of each fault measuring found; with `--on_bad_sample error` BadRecord, grouped by cause."""
    if bad and on_bad_sample == "error":
        advice = "fix them, or leave them out with --on_bad_sample skip, or with --exclude and the list that "
        advice += "mini_llava.tools.doctor writes."
        if len(bad) == len(store):  # then a flag is wrong rather than the data
            advice = "see which flag does not fit the data (--image_folder, --version, --model_max_length?)."
        title = f"{len(bad):,} of {counted(len(store), 'record')} cannot be trained on; {advice}"
        raise BadRecord("\n".join([title, *fault_table(store, sorted(bad.items()))]))
    return count_reasons(bad.values())


def fault_table(
    store: RecordStore, sentences: Iterable[tuple[int, str]], examples: int = 2, most: int = 20
) -> list[str]:
    """The records of each of the `most` frequent kinds of fault: a line with their number, and some examples."""
    kinds = defaultdict(list)
    for index, sentence in sentences:
        kinds[kind_of_fault(sentence)].append((index, sentence))
    lines = []
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))[:most]:
        lines.append(f"{len({index for index, _ in found}):>9,}  {kind}")
        lines += [f"{'':13}{store.describe(index)}: {sentence}" for index, sentence in found[:examples]]
    if len(kinds) > most:
        lines.append(f"... and {counted(len(kinds) - most, 'other kind')} of fault")
    return lines


def log_skipped(store: RecordStore, skipped: Iterable[tuple[int, str]], file: Path) -> None:
    """Appends records to `skipped.jsonl`, one JSON object a line: also what `--exclude` reads.

    index: the record's position in all data files, excluded records counted; digest: of its bytes.
    """
    entries = []
    for index, reason in skipped:
        entry = {"index": store.position(index), "record": store.describe(index), "reason": reason}
        entries.append(entry | {"digest": store.record_digest(index)})
    if entries:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_lines(file, entries)


def count_skipped(file: Path) -> list[str]:
    """How many records a `skipped.jsonl` lists for each reason; a record skipped in several epochs counts once."""
    return count_reasons({entry["index"]: entry["reason"] for entry in read_lines(file)}.values())


def count_reasons(reasons: Iterable[str]) -> list[str]:
    """`3 records: turn # is not an object.` for each kind of fault, the most frequent first."""
    counts = Counter(map(kind_of_fault, reasons))
    return [f"{counted(count, 'record')}: {kind}" for kind, count in counts.most_common()]


def kind_of_fault(reason: str) -> str:
    """A sentence about a record without what is special to the record: what is quoted, and numbers."""
    reason = re.sub(r"""(?<!\w)b?('(\\.|[^'\\])*'|"(\\.|[^"\\])*")""", "…", reason)
    return re.sub(r"(?<!\w)\d\w*([.+]\d\w*)*", "#", reason)


@dataclass
class RankMicroBatch:
    """One micro-batch of this rank, as the loop takes it.

    Attributes:
        batch: tensors for the model.
        trained_tokens: of it.
        loss_groups: int64 [B, K], see `loss_group`.
        is_last: of its step.
    """

    batch: MicroBatch
    trained_tokens: int
    loss_groups: torch.Tensor
    is_last: bool


@dataclass
class RankStep:
    """The micro-batches of one optimizer step on one rank, and what is in them."""

    micro_batches: list[MicroBatch]
    trained_tokens: list[int]  # of each micro-batch
    loss_groups: list[torch.Tensor] = field(default_factory=list)  # int64 [B, K] of each, see `loss_group`
    tokens: int = 0  # real ones, image tokens included
    samples: int = 0
    records: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)  # record and reason, with `--on_bad_sample skip`
    fault: BadRecord | BadImage | DataFileError | None = None  # what ends the run, mostly with `--on_bad_sample error`

    def __iter__(self) -> Iterator[RankMicroBatch]:
        last = len(self.micro_batches) - 1
        parts = zip(self.micro_batches, self.trained_tokens, self.loss_groups, strict=True)
        for number, (batch, trained_tokens, loss_groups) in enumerate(parts):
            yield RankMicroBatch(batch, trained_tokens, loss_groups, number == last)

    def pin_memory(self) -> "RankStep":
        """Called by the loader, which looks into dictionaries and lists but not into other objects."""
        self.micro_batches = [
            {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
            for batch in self.micro_batches
        ]
        self.loss_groups = [groups.pin_memory() for groups in self.loss_groups]
        return self


def loss_group(source: int, has_image: bool) -> int:
    """The group of targets whose losses are added up for the log: by data file and by modality."""
    return 2 * source + has_image


class RankSteps(Dataset):
    """Maps the record indices of a rank's micro-batches to a `RankStep`; runs in the loader's workers."""

    def __init__(
        self,
        store: RecordStore,
        tokenize: Callable[..., Sample],
        load_pixels: Callable[[str, str], torch.Tensor | Tiles],
        image_size: int,
        packed: bool,
        on_bad_sample: str = "error",
    ):
        """
        Args:
            tokenize: record and `folder`, that of its images, to `Sample`; raises `BadRecord`, `BadImage`.
            load_pixels: (image folder, image name) to what `collate` takes; raises `BadImage`.
            on_bad_sample: `error` returns the fault, naming file and record; `skip` leaves the sample out and reports
                it.
        """
        self.store, self.tokenize, self.load_pixels = store, tokenize, load_pixels
        self.image_size, self.packed, self.on_bad_sample = image_size, packed, on_bad_sample

    def __getitem__(self, micro_batches: Sequence[Sequence[int]]) -> RankStep:
        step = RankStep([], [])
        for indices in micro_batches:
            samples: list[Sample] = []
            groups: list[int] = []
            images: list[torch.Tensor] | list[Tiles] = []
            for index in indices:
                try:
                    folder = self.store.image_folder(index)
                    sample = self.tokenize(self.store[index], folder=folder)
                    opened = [self.load_pixels(folder, name) for name in sample.images]
                    _check_tiles(sample, opened)
                except DataFileError as error:  # skipping would leave out every record that the file still has
                    return RankStep([], [], fault=error)
                except (BadRecord, BadImage) as error:
                    if self.on_bad_sample == "error":
                        sentence = (
                            f"{self.store.describe(index)}: {error} Fix it, or leave such records out with "
                            f"--on_bad_sample skip; mini_llava.tools.doctor finds all of them."
                        )
                        return RankStep([], [], fault=type(error)(sentence))
                    step.skipped.append((index, str(error)))
                    continue
                samples.append(sample)
                groups.append(loss_group(self.store.source(index), bool(sample.images)))
                images.extend(opened)
                step.records.append(index)
                step.tokens += len(sample.input_ids)
            batch = collate(samples, images, self.image_size, self.packed)
            step.micro_batches.append(batch)
            step.trained_tokens.append(int((batch["targets"] != IGNORE_INDEX).sum()))
            step.loss_groups.append(torch.tensor(groups or [0])[sample_of_targets(batch)])
            step.samples += len(samples)
        return step


def _check_tiles(sample: Sample, images: list[torch.Tensor] | list[Tiles]) -> None:
    """Raises BadImage if images in tiles do not take the places that were made for them from their headers."""
    tokens = sum(len(image.order) for image in images if isinstance(image, Tiles))
    if tokens and tokens != np.count_nonzero(sample.input_ids == IMAGE_TOKEN_INDEX):
        raise BadImage(
            f"one of its images has another size than a moment ago: {', '.join(map(shorten, sample.images))}."
        )


class LoaderError(OSError):
    """One sentence about a loader's worker that gives nothing any more."""


def rank_step_loader(
    dataset: RankSteps,
    dealt: Iterable[list[list[int]]],
    num_workers: int,
    pin_memory: bool,
    worker_init_fn: Callable[[int], None] | None = None,
    patience: int = 300,
    stop_waiting: Callable[[], bool] = lambda: False,
) -> Iterator[RankStep]:
    """Yield this rank's steps, prepared ahead by `num_workers` processes.

    Args:
        dealt: for each step, the record indices of each micro-batch of this rank.
        worker_init_fn: called with its number in every worker when it starts.
        patience: seconds after which a worker that gives nothing is given up.
        stop_waiting: asked every second while nothing comes; True ends the steps here.

    Raises:
        BadRecord, BadImage: with `--on_bad_sample error`, when the step with the bad sample is reached.
        DataFileError: a data file has changed.
        LoaderError: a worker was killed, or has given nothing for so long; the sentence names its records.
    """
    asked_for = deque()  # of the steps that workers are at, in order
    loader = DataLoader(
        dataset,
        sampler=_Once(_noted(dealt, asked_for)),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=worker_init_fn,
        timeout=1 if num_workers else 0,  # in seconds: how often the wait for a worker is looked at
        # A generator of its own: the loader would otherwise draw its workers' seed from the global one, and a resumed
        # run, which builds a second loader, would see other dropout masks.
        generator=torch.Generator().manual_seed(0),
    )
    steps, number, waited_since, waiting = iter(loader), 0, time.monotonic(), False
    if num_workers:
        # torch would raise from whatever line is running when a worker dies; so it shows when its step is waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while True:
            try:
                step = next(steps)
            except StopIteration:
                return
            except RuntimeError as error:  # torch has no class for either
                waiting = True
                if str(error).startswith("DataLoader worker"):
                    raise LoaderError(
                        f"A worker of the loader was ended from outside ({error}), while "
                        f"{_records_of(dataset.store, asked_for)} were to be read; the system's log (dmesg: out of "
                        "memory?) may say why. Fewer --dataloader_num_workers need less memory."
                    ) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if stop_waiting():
                    return
                if (waited := time.monotonic() - waited_since) > patience:
                    worker = number % num_workers  # they take turns
                    raise LoaderError(
                        f"Worker {worker} of the loader (pid {steps._workers[worker].pid}) has given nothing for "
                        f"{waited:.0f} s, as long as --dataloader_timeout waits, while "
                        f"{_records_of(dataset.store, asked_for)} were to be read. Does their storage answer?"
                    ) from None
                continue
            asked_for.popleft()
            number, waited_since, waiting = number + 1, time.monotonic(), False
            if step.fault is not None:  # raised here, for a worker's exception comes with its traceback as text
                raise step.fault
            yield step
            waited_since = time.monotonic()
    finally:
        if num_workers:  # at once, because an error that is kept somewhere keeps them too
            for worker in steps._workers if waiting else []:
                worker.kill()  # torch asks a hanging one to end by a signal, which it may not hear
            steps._shutdown_workers()


def _noted(dealt: Iterable[list[list[int]]], asked_for: deque) -> Iterator[list[list[int]]]:
    for step in dealt:
        asked_for.append(step)
        yield step


def _records_of(store: RecordStore, asked_for: deque) -> str:
    """Name the first records of the step that is waited for."""
    records = [index for micro_batch in (asked_for[0] if asked_for else []) for index in micro_batch]
    shown = ", ".join(store.describe(index) for index in records[:3])
    return shown + (f" and {counted(len(records) - 3, 'other record')}" if len(records) > 3 else "") or "no records"


class _Once(torch.utils.data.Sampler):
    def __init__(self, dealt: Iterable[list[list[int]]]):
        self.dealt = dealt

    def __iter__(self) -> Iterator[list[list[int]]]:
        return iter(self.dealt)


def _as_it_is(step: RankStep) -> RankStep:
    return step
