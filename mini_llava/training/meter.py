"""Throughput, the progress line and the trackers: what a person watches while a model trains."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..data.loader import RankStep, loss_group
from ..data.tokenization import IGNORE_INDEX
from ..model.llava import LlavaModel
from ..watch.flops import FlopCounter, peak_flops
from ..watch.json_lines import append_lines, cut_after
from .backend import never_fatal, sum_over_ranks

SHOWN_AFTER = 2  # seconds, as for the bars over records: what is done sooner needs none


def loss_parts(sources: Sequence[str], has_image: Sequence[bool]) -> dict[str, list[int]]:
    """What the loss is logged for besides the whole: each source if there are several, each modality if there are both.

    Args:
        sources: the names of the data files.
        has_image: which samples have images.

    Returns:
        Name in the log to the groups of targets that belong to it.
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

    The clock stands still while the run evaluates or saves, so that the throughput shown is the training's own. Sums
    stay on the device; only `read` waits for it.
    """

    def __init__(self, accelerator: Accelerator, model: LlavaModel, parts: dict[str, list[int]] | None = None):
        """parts: what the loss is also logged for, see `loss_parts`."""
        self.accelerator, self.parts = accelerator, parts or {}
        groups = 1 + max((group for part in self.parts.values() for group in part), default=-1)
        self.group_losses = torch.zeros(groups, dtype=torch.float64, device=accelerator.device)
        self.group_tokens = torch.zeros(groups, dtype=torch.int64)
        self.count_flops, self.peak_flops = FlopCounter(model), peak_flops(accelerator)
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
        """The loader's steps; the time until each of them is there counts as waiting for data."""
        steps = iter(loader)
        while True:
            asked = time.perf_counter()
            step = next(steps, None)
            self.waited += time.perf_counter() - asked
            if step is None:
                return
            yield step

    def add_loss(self, loss: torch.Tensor) -> None:
        """A micro-batch's contribution to the loss of its global batch."""
        self.loss += loss.detach()

    def add_token_losses(self, losses: torch.Tensor, groups: torch.Tensor) -> None:
        """A micro-batch's losses [B, K] and the group of each; nothing is done where the loss is logged as a whole."""
        if self.parts:
            groups = groups.to(losses.device, non_blocking=True).flatten()
            self.group_losses.index_add_(0, groups, losses.detach().flatten().double())

    def add_step(self, work: RankStep) -> None:
        """A step of this rank is done."""
        self.steps += 1
        self.samples += work.samples
        self.tokens += work.tokens
        self.computed_tokens += sum(batch["input_ids"].numel() for batch in work.micro_batches)
        self.flops += sum(map(self.count_flops, work.micro_batches))
        if self.parts:
            for batch, groups in zip(work.micro_batches, work.loss_groups, strict=True):
                trained = groups[batch["targets"] != IGNORE_INDEX]
                self.group_tokens += trained.bincount(minlength=len(self.group_tokens))

    def read(self) -> dict[str, float]:
        """Mean loss, rates of all ranks, and how well the device was used, since the last read.

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
        # One collective for sums and maxima: each rank writes the latter into a place of its own.
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
        if self.peak_flops:
            possible = self.peak_flops * ranks * seconds
            values["mfu"] = flops / possible
            values["mfu_6n"] = 6 * self.count_flops.language_model_parameters * tokens / possible
        self._start_anew()
        return values

    def pause_ends(self, **seconds: float) -> None:
        """The time since the last read went into something else than training; `seconds` are logged with the next."""
        self.pauses |= seconds
        self.started = time.perf_counter()


class ProgressLine:
    """One line on rank 0: step, loss, learning rate, gradient norm, tokens/s, samples/s, use of the GPU, time left."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool):
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not enabled,
            dynamic_ncols=True,
            unit="step",
            bar_format="{percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix} [{elapsed}, {remaining} left]",
        )

    def update(self, step: int, values: dict[str, float], evaluation: str = "") -> None:
        """evaluation: the newest one in a word."""
        parts = [
            f"loss {_shown(values['loss'], 4)} lr {values['learning_rate']:.2e} "
            f"grad {_shown(values['gradient_norm'], 3)}",
            f"{values['tokens_per_second']:,.0f} tokens/s {values['samples_per_second']:,.1f} samples/s",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        if "peak_memory_gib" in values:
            parts.append(f"{values['peak_memory_gib']:.0f} GiB")
        if values["data_wait"] > 0.02:
            parts.append(f"waits for data {values['data_wait']:.0%}")
        if evaluation:
            parts.append(evaluation)
        self.bar.set_postfix_str(" ".join(parts), refresh=False)
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Prints above the line, which stays whole."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def questions_bar(total: int, what: str, enabled: bool) -> tqdm:
    """Return a bar of held-out questions done, for the minutes in which no step is taken; to be closed.

    On a terminal it stands below the progress line and is gone in the end. Elsewhere (a file, a scheduler's log) there
    is no line below: it is written every ten seconds, and stays.
    """
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        disable=not enabled,
        delay=SHOWN_AFTER,
        mininterval=1 if on_terminal else 10,
        leave=not on_terminal,
        position=None if on_terminal else 0,
        dynamic_ncols=True,
        unit=" questions",
    )


def _shown(value: float, digits: int) -> str:
    """A small number by its size: 0.0000 would be taken for a fault where a batch has nothing left to learn."""
    return f"{value:.{digits}f}" if value == 0 or value >= 0.001 else f"{value:.1e}"


def append_json_line(file: Path, values: dict) -> None:
    """The log as text: one JSON object a line, floats to their last bit, readable without a tracker."""
    with never_fatal(f"{file} lacks entries"):
        append_lines(file, [values])


def prepare_reports(output_dir: Path, resumed_at: int | None) -> str | None:
    """Empties the reports in JSON lines, or makes them end where a resumed run goes on; tells what that undoes.

    Entries beyond the checkpoint's step are of work that was lost, and what a kill has torn is no entry.
    """
    log, samples, skipped = (output_dir / f"{name}.jsonl" for name in ("log", "eval_samples", "skipped"))
    if resumed_at is None:
        for file in (log, samples, skipped):
            with never_fatal(f"{file} holds entries of an earlier run"):
                file.unlink(missing_ok=True)
        return None
    with never_fatal(f"{skipped} has a torn line"):
        cut_after(skipped)
    last = None

    def is_kept(entry: dict) -> bool:
        return entry.get("step", 0) <= resumed_at

    with never_fatal(f"{samples} holds entries of steps that are done again"):
        cut_after(samples, is_kept)
    with never_fatal(f"{log} holds entries of steps that are done again"):
        last = cut_after(log, is_kept)
    if last is None or last.get("step", 0) <= resumed_at:
        return None
    again = last["step"] - resumed_at
    return f"The run had come to step {last['step']}: {again} of its steps {'is' if again == 1 else 'are'} done again."
