"""The micro-batches of one rank in one optimizer step: read, tokenized, images opened, collated.

A step is one item of a torch `DataLoader`: the main process deals the global batch and sends a worker the record
indices of this rank. Accelerate never sees the loader, so it cannot shard it again.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from ..arguments import DataArguments
from ..data_file import DataFileError
from ..image_files import BadImage
from ..words import counted
from .collator import MicroBatch, collate, sample_of_targets
from .samples import Samples
from .templates import BadRecord
from .tokenization import IGNORE_INDEX, Sample


@dataclass
class RankMicroBatch:
    """One micro-batch of this rank.

    Attributes:
        batch: tensors for the model.
        trained_tokens: targets that are not IGNORE_INDEX.
        loss_groups: int64 [B, K], see `loss_group`.
        is_last: whether it is the last of its step.
    """

    batch: MicroBatch
    trained_tokens: int
    loss_groups: torch.Tensor
    is_last: bool


@dataclass
class RankStep:
    """The micro-batches of one optimizer step on one rank, and counts of what is in them."""

    micro_batches: list[MicroBatch]
    trained_tokens: list[int]  # of each micro-batch
    loss_groups: list[torch.Tensor] = field(default_factory=list)  # int64 [B, K] of each, see `loss_group`
    tokens: int = 0  # without padding, image tokens included
    samples: int = 0
    records: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)  # record and reason, with `--on_bad_sample skip`
    fault: BadRecord | BadImage | DataFileError | None = None  # ends the run

    def __iter__(self) -> Iterator[RankMicroBatch]:
        last = len(self.micro_batches) - 1
        parts = zip(self.micro_batches, self.trained_tokens, self.loss_groups, strict=True)
        for number, (batch, trained_tokens, loss_groups) in enumerate(parts):
            yield RankMicroBatch(batch, trained_tokens, loss_groups, number == last)

    def pin_memory(self) -> "RankStep":
        """Pin all tensors. Called by the loader, which looks into dictionaries and lists but not into other objects."""
        self.micro_batches = [
            {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
            for batch in self.micro_batches
        ]
        self.loss_groups = [groups.pin_memory() for groups in self.loss_groups]
        return self


def loss_group(source: int, has_image: bool) -> int:
    """Return the group of targets whose losses are summed for the log: by data file and by modality."""
    return 2 * source + has_image


class RankSteps(Dataset):
    """Maps the record indices of a rank's micro-batches to a `RankStep`; runs in the loader's workers."""

    def __init__(self, samples: Samples, packed: bool, on_bad_sample: str = "error"):
        """
        Args:
            on_bad_sample: `error` returns the fault, naming file and record; `skip` leaves the sample out and reports
                it.
        """
        self.samples, self.packed, self.on_bad_sample = samples, packed, on_bad_sample

    def __getitem__(self, micro_batches: Sequence[Sequence[int]]) -> RankStep:
        step = RankStep([], [])
        for indices in micro_batches:
            samples: list[Sample] = []
            groups: list[int] = []
            for index in indices:
                try:
                    sample = self.samples[index]
                except DataFileError as error:  # skipping would leave out every record that the file still has
                    return RankStep([], [], fault=error)
                except (BadRecord, BadImage) as error:
                    if self.on_bad_sample == "error":
                        sentence = (
                            f"{self.samples.describe(index)}: {error} Fix it, or leave such records out with "
                            f"--on_bad_sample skip; mini_llava.tools.doctor finds all of them."
                        )
                        return RankStep([], [], fault=type(error)(sentence))
                    step.skipped.append((index, str(error)))
                    continue
                samples.append(sample)
                groups.append(loss_group(self.samples.store.source(index), bool(sample.images)))
                step.records.append(index)
                step.tokens += len(sample.input_ids)
            batch = collate(samples, self.samples.image_reader.size, self.packed)
            step.micro_batches.append(batch)
            step.trained_tokens.append(int((batch["targets"] != IGNORE_INDEX).sum()))
            step.loss_groups.append(torch.tensor(groups or [0])[sample_of_targets(batch)])
            step.samples += len(samples)
        return step


class LoaderError(OSError):
    """A worker of the loader was killed or has hung, in one sentence."""


def rank_step_loader(
    dataset: RankSteps,
    dealt: Iterable[list[list[int]]],
    flags: DataArguments,
    pin_memory: bool,
    worker_init_fn: Callable[[int], None] | None = None,
    stop_waiting: Callable[[], bool] = lambda: False,
) -> Iterator[RankStep]:
    """Yield this rank's steps, prepared ahead by `--dataloader_num_workers` processes.

    Args:
        dealt: for each step, the record indices of each micro-batch of this rank.
        worker_init_fn: called with its number in every worker when it starts.
        stop_waiting: asked every second while nothing comes; True ends the steps here.

    Raises:
        BadRecord, BadImage: with `--on_bad_sample error`, when the step with the bad sample is reached.
        DataFileError: a data file has changed.
        LoaderError: a worker was killed, or has returned nothing for `--dataloader_timeout` seconds.
    """
    requested = deque()  # the steps that workers prepare, in order
    num_workers = flags.dataloader_num_workers
    loader = DataLoader(
        dataset,
        sampler=_RecordingSampler(dealt, requested),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        worker_init_fn=worker_init_fn,
        timeout=1 if num_workers else 0,  # in seconds: how often the wait for a worker is looked at
        # A generator of its own: the loader would otherwise draw its workers' seed from the global one, and a resumed
        # run, which builds a second loader, would see other dropout masks.
        generator=torch.Generator().manual_seed(0),
    )
    steps = iter(loader)
    if num_workers:
        # torch would raise from whatever line is running when a worker dies; so it shows when its step is waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while step := _next_step(steps, dataset.samples, requested, flags.dataloader_timeout, stop_waiting):
            requested.popleft()
            if step.fault is not None:  # raised here, for a worker's exception comes with its traceback as text
                raise step.fault
            yield step
    finally:
        if num_workers:  # at once, because an error that is kept somewhere keeps them too
            steps._shutdown_workers()


def _next_step(
    steps: Iterator[RankStep], samples: Samples, requested: deque, patience: int, stop_waiting: Callable[[], bool]
) -> RankStep | None:
    """Return the next step; None at the end, or once `stop_waiting` says so. Raises LoaderError."""
    began, failed = time.monotonic(), False
    try:
        while True:
            try:
                step = next(steps, None)
                failed = False
                return step
            except RuntimeError as error:  # torch has no class for either
                failed = True
                if str(error).startswith("DataLoader worker"):
                    raise LoaderError(
                        f"A data loader worker was killed ({error}) while "
                        f"{_describe(samples, requested)} were to be read; the system's log (dmesg: out of memory?) "
                        "may say why. Fewer --dataloader_num_workers need less memory."
                    ) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if stop_waiting():
                return None
            if (waited := time.monotonic() - began) > patience:
                worker = steps._rcvd_idx % len(steps._workers)  # they take turns
                raise LoaderError(
                    f"Worker {worker} of the loader (pid {steps._workers[worker].pid}) has delivered nothing for "
                    f"{waited:.0f} s, the limit of --dataloader_timeout, while {_describe(samples, requested)} "
                    "were to be read. Does their storage respond?"
                )
    finally:
        for worker in getattr(steps, "_workers", []) if failed else []:
            worker.kill()  # torch asks a hanging one to end by a signal, which it may not hear


def _describe(samples: Samples, requested: deque) -> str:
    """Return the names of the first records of the step that is waited for."""
    records = [index for micro_batch in (requested[0] if requested else []) for index in micro_batch]
    shown = ", ".join(samples.describe(index) for index in records[:3])
    return shown + (f" and {counted(len(records) - 3, 'other record')}" if len(records) > 3 else "") or "no records"


class _RecordingSampler(torch.utils.data.Sampler):
    """Yields the steps that are dealt, and notes each as requested."""

    def __init__(self, dealt: Iterable[list[list[int]]], requested: deque):
        self.dealt, self.requested = dealt, requested

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in self.dealt:
            self.requested.append(step)
            yield step


def _unchanged(step: RankStep) -> RankStep:
    return step
