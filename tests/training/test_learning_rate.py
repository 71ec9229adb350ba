"""The schedule is a function of the step with the values of transformers' schedulers."""

import math

import pytest
import torch
from transformers import get_scheduler

from mini_llava.training.schedule import SCHEDULES, learning_rate_factor, warmup_steps


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total, ratio", [(1, 0.0), (1, 0.03), (7, 0.5), (20, 0.03), (100, 0.0), (333, 0.1), (5, 1.0)])
def test_every_step_has_the_factor_of_transformers_scheduler(kind, total, ratio):
    warmup = warmup_steps(ratio, total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 1):
        assert learning_rate_factor(kind, step, total, warmup) == scheduler.get_last_lr()[0], step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("ratio, total, steps", [(0.03, 100, 3), (0.03, 101, 4), (0.03, 5198, 156), (0.0, 9, 0)])
def test_warmup_is_rounded_up_as_transformers_does(ratio, total, steps):
    assert warmup_steps(ratio, total) == steps == math.ceil(ratio * total)


def test_the_rate_never_leaves_zero_to_one():
    for kind in SCHEDULES:
        factors = [learning_rate_factor(kind, step, 50, 5) for step in range(60)]
        assert min(factors) >= 0 and max(factors) == 1


def test_an_unknown_schedule_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"polynomial: unknown; known: cosine, linear, constant, constant_with_warmup"):
        learning_rate_factor("polynomial", 5, 10, 1)
