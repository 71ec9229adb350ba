"""Throughput, the progress line and the trackers: what a person watches while a model trains."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..data.json_lines import append_lines, cut_after
from ..data.loader import RankStep
from ..model.llava import LlavaModel
from .distributed import never_fatal, sum_over_ranks
from .flops import FlopCounter, peak_flops


class Meter:
    """Loss, tokens, samples, arithmetic and memory of finished steps against a clock that can be paused.

    The clock stands still while the run evaluates or saves, so that the throughput shown is the training's own. Sums
    stay on the device; only `read` waits for it.
    """

    def __init__(self, accelerator: Accelerator, model: LlavaModel):
        self.accelerator = accelerator
        self.count_flops, self.peak_flops = FlopCounter(model), peak_flops(accelerator)
        self.loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._start_anew()

    def _start_anew(self) -> None:
        self.loss.zero_()
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

    def add_step(self, work: RankStep) -> None:
        """A step of this rank is done."""
        self.steps += 1
        self.samples += work.samples
        self.tokens += work.tokens
        self.computed_tokens += sum(batch["input_ids"].numel() for batch in work.micro_batches)
        self.flops += sum(map(self.count_flops, work.micro_batches))

    def read(self) -> dict[str, float]:
        """Mean loss, rates of all ranks, and how well the device was used, since the last read.

        A collective: all ranks must call it. `tokens_per_second` counts real tokens, `computed_tokens_per_second`
        padding too. On GPUs whose peak is known `mfu` is the share of it that went into arithmetic the step could not
        do without (see `FlopCounter`), and `mfu_6n` the usual approximation, 6 x parameters of the language model x
        real tokens. `data_wait` (a share of the time) and `peak_memory_gib` are those of the worst rank.
        """
        on_gpu = self.accelerator.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        sums = [self.tokens, self.computed_tokens, self.samples, self.flops]
        # One collective for sums and maxima: each rank writes the latter into a place of its own.
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        places = [value if place == rank else 0.0 for value in (self.waited, memory) for place in range(ranks)]
        mine = torch.tensor([*sums, *places], dtype=torch.float64, device=self.accelerator.device)
        totals = sum_over_ranks(self.accelerator, torch.cat([self.loss[None], mine]))
        loss, tokens, computed_tokens, samples, flops, *places = totals.tolist()
        seconds = time.perf_counter() - self.started
        values = {
            "loss": loss / self.steps,
            "tokens_per_second": tokens / seconds,
            "computed_tokens_per_second": computed_tokens / seconds,
            "samples_per_second": samples / seconds,
            "seconds_per_step": seconds / self.steps,
            "data_wait": max(places[:ranks]) / seconds,
            **self.pauses,
        }
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

    def update(self, step: int, values: dict[str, float]) -> None:
        parts = [
            f"loss {values['loss']:.4f} lr {values['learning_rate']:.2e} grad {values['gradient_norm']:.3f}",
            f"{values['tokens_per_second']:,.0f} tokens/s {values['samples_per_second']:,.1f} samples/s",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        if "peak_memory_gib" in values:
            parts.append(f"{values['peak_memory_gib']:.0f} GiB")
        if values["data_wait"] > 0.02:
            parts.append(f"waits for data {values['data_wait']:.0%}")
        self.bar.set_postfix_str(" ".join(parts), refresh=False)
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Prints above the line, which stays whole."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def append_json_line(file: Path, values: dict) -> None:
    """The log as text: one JSON object a line, floats to their last bit, readable without a tracker."""
    with never_fatal(f"{file} lacks entries"):
        append_lines(file, [values])


def prepare_reports(output_dir: Path, resumed_at: int | None) -> str | None:
    """Empties `log.jsonl` and `skipped.jsonl`, or makes them end where a resumed run goes on; tells what that undoes.

    Entries beyond the checkpoint's step are of work that was lost, and what a kill has torn is no entry.
    """
    log, skipped = output_dir / "log.jsonl", output_dir / "skipped.jsonl"
    if resumed_at is None:
        for file in (log, skipped):
            with never_fatal(f"{file} holds entries of an earlier run"):
                file.unlink(missing_ok=True)
        return None
    with never_fatal(f"{skipped} has a torn line"):
        cut_after(skipped)
    last = None
    with never_fatal(f"{log} holds entries of steps that are done again"):
        last = cut_after(log, lambda entry: entry.get("step", 0) <= resumed_at)
    if last is None or last.get("step", 0) <= resumed_at:
        return None
    return f"The run had come to step {last['step']}: {last['step'] - resumed_at} of its steps are done again."
