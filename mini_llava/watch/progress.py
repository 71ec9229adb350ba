"""The progress line of a run, and the bar of an evaluation."""

import sys

from tqdm import tqdm

SHOWN_AFTER = 2  # seconds


class ProgressLine:
    """One line on rank 0: step, time left, loss, learning rate, gradient norm, tokens/s, samples/s, use of the GPU."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool, loss: str = "loss"):
        """
        Args:
            total_steps: of the whole run.
            first_step: the step that it resumes from, or 0.
            enabled: whether this rank shows the line.
            loss: what the loss is called.
        """
        self.loss = loss
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not enabled,
            dynamic_ncols=True,
            unit="step",
            bar_format="{percentage:3.0f}% step {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]{postfix}",
        )

    def update(self, step: int, values: dict[str, float], evaluation: str = "") -> None:
        """Show a step's values and the newest evaluation."""
        parts = [
            f"{self.loss} {_shown(values['loss'], 4)}{_modality(values)}",
            f"lr {values['learning_rate']:.2e}",
            f"grad norm {_shown(values['gradient_norm'], 3)}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            f"{values['samples_per_second']:,.1f} samples/s",
        ]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        if "peak_memory_gib" in values:
            parts.append(f"{values['peak_memory_gib']:.0f} GiB")
        if values["data_wait"] > 0.02:
            parts.append(f"{values['data_wait']:.0%} waiting for data")
        if evaluation:
            parts.append(evaluation)
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(step - self.bar.n)

    def log(self, text: str) -> None:
        """Print a text above the line."""
        if not self.bar.disable:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def questions_bar(total: int, what: str, enabled: bool) -> tqdm:
    """Return a progress bar of held-out questions, to be closed.

    On a terminal it is below the progress line and disappears; in a file it is written every ten seconds and stays.
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


def _modality(values: dict[str, float]) -> str:
    """Return which samples the loss is of, where a run has samples with and without images and only one kind was met.

    The loss of text that the language model knows already is near 0, and a mean over both would hide it.
    """
    kinds = [name for name in ("image", "text") if f"loss_by_modality/{name}" in values]
    return {("image",): " (images)", ("text",): " (text only)"}.get(tuple(kinds), "")


def _shown(value: float, digits: int) -> str:
    """Format a number; a small one with its exponent, since 0.0000 would be taken for a fault."""
    return f"{value:.{digits}f}" if value == 0 or value >= 0.001 else f"{value:.1e}"
