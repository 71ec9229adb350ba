"""What the progress line and the log say is what happened."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from mini_llava.training.meter import Meter, append_json_line


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_loss_is_the_mean_over_steps_of_the_sum_over_micro_batches(clock):
    meter = Meter(Accelerator(cpu=True))
    for losses in ((0.5, 0.25), (1.0,)):
        for loss in losses:
            meter.add_loss(torch.tensor(loss, requires_grad=True))
        meter.add_step(tokens=30, samples=4)
    clock[0] += 4
    values = meter.read()
    assert values == dict(loss=0.875, tokens_per_second=15.0, samples_per_second=2.0, seconds_per_step=2.0)


def test_reading_starts_anew_and_evaluation_does_not_count(clock):
    meter = Meter(Accelerator(cpu=True))
    meter.add_loss(torch.tensor(9.0))
    meter.add_step(1000, 1000)
    clock[0] += 1
    meter.read()
    clock[0] += 500  # saving
    meter.pause_ends()
    meter.add_loss(torch.tensor(2.0))
    meter.add_step(6, 1)
    clock[0] += 3
    assert meter.read() == dict(loss=2.0, tokens_per_second=2.0, samples_per_second=1 / 3, seconds_per_step=3.0)


def test_the_log_keeps_every_bit(tmp_path):
    values = {"step": 3, "loss": math.pi / 7, "gradient_norm": 1e-310}
    append_json_line(tmp_path / "log.jsonl", values)
    append_json_line(tmp_path / "log.jsonl", values)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [values, values]
    assert json.loads(lines[0])["loss"].hex() == (math.pi / 7).hex()
