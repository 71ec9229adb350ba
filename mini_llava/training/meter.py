"""Throughput, the progress line and the trackers: what a person watches while a model trains."""

import time
from collections.abc import Callable

from tqdm import tqdm


class Meter:
    """Counts tokens and samples of finished steps against a clock that can be paused.

    The clock stands still while the run evaluates or saves, so that the throughput shown is the training's own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.last = clock()
        self.training_seconds = 0.0  # of the whole run
        self.window_seconds = self.tokens = self.samples = self.steps = 0.0

    def lap(self, tokens: float, samples: float) -> None:
        """A step is done; tokens and samples are those of all ranks."""
        now = self.clock()
        self.window_seconds += now - self.last
        self.training_seconds += now - self.last
        self.last = now
        self.tokens, self.samples, self.steps = self.tokens + tokens, self.samples + samples, self.steps + 1

    def resume(self) -> None:
        """Forgets the time since the last lap: it went into something else than training."""
        self.last = self.clock()

    def read(self) -> dict[str, float]:
        """Rates since the last read."""
        seconds = max(self.window_seconds, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
            "seconds_per_step": seconds / max(self.steps, 1),
        }
        self.window_seconds = self.tokens = self.samples = self.steps = 0.0
        return rates


class ProgressLine:
    """One line on rank 0: step, loss, learning rate, gradient norm, tokens/s, samples/s, time left."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool):
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not enabled,
            dynamic_ncols=True,
            unit="step",
            bar_format="{percentage:3.0f}% step {n_fmt}/{total_fmt} {postfix} [{elapsed} + {remaining} left]",
        )

    def update(self, step: int, values: dict[str, float] | None = None) -> None:
        if values:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.4f} lr {values['learning_rate']:.2e} grad {values['gradient_norm']:.3f} "
                f"{values['tokens_per_second']:,.0f} tokens/s {values['samples_per_second']:,.1f} samples/s",
                refresh=False,
            )
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Prints a line above the progress line."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
