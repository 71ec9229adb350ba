"""The learning-rate schedule as a pure function of the step; the values are those of transformers' schedulers.

A function has no state to save: a resumed run asks for the factor of its step. Nor can it be replaced silently, as
LLaVA's cosine is by the scheduler in its `zero3_offload.json`. This file needs nothing else of the project.
"""

import math

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def warmup_steps(warmup_ratio: float, total_steps: int, steps: float = 0) -> int:
    """Return the number of warmup steps, rounded up as transformers does.

    steps: as `--warmup_steps`, a number or below 1 a share of all; 0: `warmup_ratio` counts.
    """
    return int(steps) if steps >= 1 else math.ceil((steps or warmup_ratio) * total_steps)


def learning_rate_factor(kind: str, step: int, total_steps: int, warmup: int) -> float:
    """Return the factor on the peak learning rate at `step`, counted from 0 (so with warmup the first one is 0)."""
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
    if kind == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"--lr_scheduler_type {kind}: unknown; known: {', '.join(SCHEDULES)}.")
