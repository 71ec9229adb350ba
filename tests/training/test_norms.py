"""The norms of a step are those of the weights it changed, although nobody kept the weights from before."""

import pytest
import torch
from accelerate import Accelerator

from mini_llava.training.optimizer import build_adamw, learning_rates, parameter_groups
from mini_llava.watch import norms
from mini_llava.watch.norms import norms_are_due, step_norms
from tests.training.tiny_llava import micro_batch, tiny_llava


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("numbers_at_once", [norms.NUMBERS_AT_ONCE, 100])
def test_update_and_parameter_norm_are_those_of_the_weights(weight_decay, numbers_at_once, monkeypatch):
    monkeypatch.setattr(norms, "NUMBERS_AT_ONCE", numbers_at_once)
    accelerator, model = Accelerator(cpu=True), tiny_llava()
    groups = parameter_groups(model, 1e-2, weight_decay, {"projector": 3e-2})
    model, optimizer = accelerator.prepare(model, build_adamw(groups, (0.8, 0.95), 1e-6, fused=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for length in (6, 9, 12):
        before = [parameter.detach().double() for parameter in trained]
        accelerator.backward(model(**micro_batch([length, 5], images=1)))
        optimizer.step()
        optimizer.zero_grad()
        squares = [(p.detach().double() - old).square().sum() for p, old in zip(trained, before, strict=True)]
        found = step_norms(accelerator, model, optimizer)
        # A weight of size 1 is stored to 6e-8, its change of 1e-2 hence to 6e-6.
        assert found["update_norm"] == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)
        whole = torch.cat([parameter.detach().flatten().double() for parameter in trained])
        assert found["parameter_norm"] == pytest.approx(whole.norm().item(), rel=1e-6)


def test_the_log_has_one_rate_for_each_part():
    groups = parameter_groups(tiny_llava(), 1e-2, 0.1, {"projector": 3e-2})
    assert len(groups) == 4, "both parts have weights with decay and norms or biases without"
    rates = learning_rates(build_adamw(groups, (0.9, 0.99), 1e-8, fused=False))
    assert rates == {"learning_rate/projector": 3e-2, "learning_rate/language_model": 1e-2}


def test_long_runs_have_some_five_hundred_points_and_short_ones_all():
    points = {
        total: sum(norms_are_due(step, total) for step in range(1, total + 1)) for total in (1, 36, 5198, 100_000)
    }
    assert points == {1: 1, 36: 36, 5198: 519, 100_000: 500}
