"""Throughput, the progress line and the trackers: what a person watches while a model trains."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..data.json_lines import append_lines, cut_after
from .distributed import never_fatal, sum_over_ranks


class Meter:
    """Loss, tokens and samples of finished steps against a clock that can be paused.

    The clock stands still while the run evaluates or saves, so that the throughput shown is the training's own. Sums
    stay on the device; only `read` waits for it.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.tokens = self.samples = self.steps = 0
        self.pauses: dict[str, float] = {}
        self.started = time.perf_counter()

    def add_loss(self, loss: torch.Tensor) -> None:
        """A micro-batch's contribution to the loss of its global batch."""
        self.loss += loss.detach()

    def add_step(self, tokens: int, samples: int) -> None:
        """A step of this rank is done."""
        self.tokens, self.samples, self.steps = self.tokens + tokens, self.samples + samples, self.steps + 1

    def read(self) -> dict[str, float]:
        """Mean loss and rates of all ranks since the last read. A collective: all ranks must call it."""
        counts = torch.tensor([self.tokens, self.samples], dtype=torch.float64, device=self.accelerator.device)
        totals = sum_over_ranks(self.accelerator, torch.cat([self.loss[None], counts]))
        loss, tokens, samples = totals.tolist()
        seconds = time.perf_counter() - self.started
        values = {
            "loss": loss / self.steps,
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "seconds_per_step": seconds / self.steps,
            **self.pauses,
        }
        self.pauses = {}
        self.loss.zero_()
        self.tokens = self.samples = self.steps = 0
        self.started = time.perf_counter()
        return values

    def pause_ends(self, **seconds: float) -> None:
        """The time since the last read went into something else than training; `seconds` are logged with the next."""
        self.pauses |= seconds
        self.started = time.perf_counter()


class ProgressLine:
    """One line on rank 0: step, loss, learning rate, gradient norm, tokens/s, samples/s, time left."""

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
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f} lr {values['learning_rate']:.2e} grad {values['gradient_norm']:.3f} "
            f"{values['tokens_per_second']:,.0f} tokens/s {values['samples_per_second']:,.1f} samples/s",
            refresh=False,
        )
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
