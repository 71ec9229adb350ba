"""Loss, throughput and memory of finished steps, summed on the device and over the ranks."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..data.loader import RankMicroBatch, RankStep, loss_group
from ..data.tokenization import IGNORE_INDEX
from ..training.backend import sum_over_ranks


def loss_parts(sources: Sequence[str], has_image: Sequence[bool]) -> dict[str, list[int]]:
    """Return what the loss is also logged for: each source if there are several, each modality if there are both.

    Args:
        sources: the names of the data files.
        has_image: which samples have images.

    Returns:
        Name in the log -> the groups of targets that belong to it.
    """
    numbers, parts = range(len(sources)), {}
    if len(sources) > 1:
        parts = {f"loss/{sources[n]}": [loss_group(n, False), loss_group(n, True)] for n in numbers}
    if len(set(map(bool, has_image))) > 1:
        for name, image in (("text", False), ("image", True)):
            parts[f"loss_by_modality/{name}"] = [loss_group(n, image) for n in numbers]
    return parts


class Meter:
    """Loss, tokens, samples, arithmetic and memory of finished steps against a clock that can be paused.

    The clock stands still while the run evaluates, saves or takes norms, so that the throughput is that of training
    alone. Sums stay on the device; only `read` waits for it.
    """

    def __init__(self, accelerator: Accelerator, flops, parts: dict[str, list[int]] | None = None):
        """
        Args:
            flops: counts the operations of a micro-batch, and knows the `peak` of the device (`watch/flops.py`).
            parts: what the loss is also logged for, see `loss_parts`.
        """
        self.accelerator, self.flops_of, self.parts = accelerator, flops, parts or {}
        groups = 1 + max((group for part in self.parts.values() for group in part), default=-1)
        self.group_losses = torch.zeros(groups, dtype=torch.float64, device=accelerator.device)
        self.group_tokens = torch.zeros(groups, dtype=torch.int64)
        self.loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._start_anew()

    def _start_anew(self) -> None:
        self.loss.zero_()
        self.group_losses.zero_()
        self.group_tokens.zero_()
        self.tokens = self.computed_tokens = self.samples = self.steps = 0
        self.flops = self.waited = 0.0
        self.pauses: dict[str, float] = {}
        self.started = time.perf_counter()

    def waiting_for(self, loader: Iterable[RankStep]) -> Iterator[RankStep]:
        """Yield the loader's steps; the time until each of them is there counts as waiting for data."""
        steps = iter(loader)
        while True:
            asked = time.perf_counter()
            step = next(steps, None)
            self.waited += time.perf_counter() - asked
            if step is None:
                return
            yield step

    def add(self, micro_batch: RankMicroBatch, token_losses: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a micro-batch: its losses [B, K], and the scalar that it contributes to the loss of its global batch."""
        self.loss += loss.detach()
        if self.parts:
            groups = micro_batch.loss_groups.to(token_losses.device, non_blocking=True).flatten()
            self.group_losses.index_add_(0, groups, token_losses.detach().flatten().double())

    def add_step(self, work: RankStep) -> None:
        """Add a finished step of this rank."""
        self.steps += 1
        self.samples += work.samples
        self.tokens += work.tokens
        self.computed_tokens += sum(batch["input_ids"].numel() for batch in work.micro_batches)
        if self.flops_of.peak:
            self.flops += sum(map(self.flops_of, work.micro_batches))
        if self.parts:
            for batch, groups in zip(work.micro_batches, work.loss_groups, strict=True):
                trained = groups[batch["targets"] != IGNORE_INDEX]
                self.group_tokens += trained.bincount(minlength=len(self.group_tokens))

    def read(self) -> dict[str, float]:
        """Return mean loss, rates of all ranks, and how well the device was used, since the last read.

        A collective: all ranks must call it. `tokens_per_second` counts real tokens, `computed_tokens_per_second`
        padding too; `padding` is its share. On GPUs whose peak is known `mfu` is the share of it that went into
        arithmetic the step could not do without (see `FlopCounter`), and `mfu_6n` the usual approximation, 6 x
        parameters of the language model x real tokens. `data_wait` (a share of the time) and `peak_memory_gib` are
        those of the worst rank. The loss of a part (see `loss_parts`) is the mean over its trained tokens; a part
        without any is left out.
        """
        on_gpu = self.accelerator.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        sums = [self.tokens, self.computed_tokens, self.samples, self.flops]
        # One all-reduce for sums and maxima: the latter have one place for each rank.
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        places = [value if place == rank else 0.0 for value in (self.waited, memory) for place in range(ranks)]
        mine = [*sums, *places, *self.group_tokens.tolist()]
        mine = torch.tensor(mine, dtype=torch.float64, device=self.accelerator.device)
        totals = sum_over_ranks(self.accelerator, torch.cat([self.loss[None], mine, self.group_losses]))
        loss, tokens, computed_tokens, samples, flops, *rest = totals.tolist()
        places, groups = rest[: 2 * ranks], len(self.group_tokens)
        group_tokens, group_losses = rest[2 * ranks :][:groups], rest[2 * ranks :][groups:]
        seconds = time.perf_counter() - self.started
        values = {
            "loss": loss / self.steps,
            "tokens_per_second": tokens / seconds,
            "computed_tokens_per_second": computed_tokens / seconds,
            "padding": 1 - tokens / max(computed_tokens, 1),
            "samples_per_second": samples / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait": max(places[:ranks]) / seconds,
            **self.pauses,
        }
        for name, part in self.parts.items():
            if trained := sum(group_tokens[group] for group in part):
                values[name] = sum(group_losses[group] for group in part) / trained
        if on_gpu:
            values["peak_memory_gib"] = max(places[ranks:])
        if self.flops_of.peak:
            possible = self.flops_of.peak * ranks * seconds
            values["mfu"] = flops / possible
            values["mfu_6n"] = 6 * self.flops_of.language_model_parameters * tokens / possible
        self._start_anew()
        return values

    @contextmanager
    def paused(self, name: str | None = None) -> Iterator[None]:
        """Stop the clock, right after a `read`, for something else than training.

        name: of the entry of the log that the next `read` has the seconds under.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            if name:
                self.pauses[name] = self.pauses.get(name, 0.0) + time.perf_counter() - started
            self.started = time.perf_counter()
