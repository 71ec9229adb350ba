"""Learning rates of every step against transformers 4.37.2, recorded in fixtures/schedules.json."""

import pytest

from mini_llava.training.schedule import learning_rate_factor, warmup_steps
from tests.parity.golden import LLAVA, load_json


@pytest.mark.parametrize("case", load_json("schedules.json"), ids=lambda case: f"{case['total_steps']}_steps")
def test_the_rate_of_every_step_is_llavas(case, agree):
    total, peak = case["total_steps"], case["peak_lr"]
    warmup = warmup_steps(case["warmup_ratio"], total)
    assert warmup == case["warmup_steps"]
    expected = [*case["lr_used_at_step"], case["lr_after_last_step"]]
    rates = [peak * learning_rate_factor("cosine", step, total, warmup) for step in range(total + 1)]
    difference = max(abs(ours - theirs) for ours, theirs in zip(rates, expected, strict=True)) / peak
    agree("learning rate of each step, part of the peak", LLAVA, difference, 1e-12)
