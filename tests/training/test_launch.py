"""A launch that accelerate silently turns into something else is refused."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils.config import get_timers_config

from mini_llava.options.zero3 import linear_of_rows
from mini_llava.training import backend
from tests.end_to_end.runs import flags_of
from tests.forked_runs import start


@pytest.mark.slow
def test_deepspeed_that_accelerate_leaves_out_is_missed(tmp_path):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    environment = address | deepspeed | {"ACCELERATE_USE_CPU": "true"}
    run = start(flags_of(2, tmp_path / "run", {}), tmp_path / "printed.txt", environment=environment)
    assert run.wait() == 1
    assert "error: The accelerate config asks for DeepSpeed, but accelerate leaves it out" in run.text


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has an entry 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "has an entry 'scheduler'"),
        ({"gradient_clipping": 0.5}, "contradicts --max_grad_norm 1.0"),
        ({"zero_optimization": {"stage": 1}}, "zero_stage: 1"),
    ],
)
def test_a_deepspeed_config_that_would_replace_the_recipe_is_refused(entry, sentence):
    """LLaVA's zero3_offload.json has the first two, and its groups and cosine are gone without a word."""
    config = {"zero_optimization": {"stage": 3}} | entry
    with pytest.raises(ValueError, match=sentence):
        backend.complete_deepspeed_config(config, "bf16", 1.0)


def test_deepspeeds_clock_is_off_unless_a_config_asks_for_it():
    """It has the host wait for the device before every forward, and nothing reads it."""
    clocks = []
    for timers in ({}, {"timers": {"throughput": {"enabled": True}}}):
        config = {"zero_optimization": {"stage": 3}} | timers
        backend.complete_deepspeed_config(config, "bf16", 1.0)
        clocks.append(get_timers_config(config).enabled)
    assert clocks == [False, True]


def test_zero3_sends_gradients_from_where_they_are_unless_a_config_asks_for_a_copy():
    kept = []
    for asked in ({"stage": 3}, {"stage": 3, "contiguous_gradients": True}, {"stage": 2}):
        backend.complete_zero(asked, None)
        kept.append(asked.get("contiguous_gradients"))
    assert kept == [False, True, None]


def test_under_zero3_a_bias_is_added_before_the_sum_is_rounded(monkeypatch):
    """As without DeepSpeed, whose replacement of `F.linear` does so for matrices only."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, dtype=torch.bfloat16), torch.randn(2, 8, 64, dtype=torch.bfloat16)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double()).bfloat16()
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    assert torch.equal(linear_of_rows(x, layer.weight, layer.bias), exact)
    assert not torch.equal(layer(x), exact), "DeepSpeed adds it so by itself now"


def test_cudnns_attention_is_not_used():
    """It plans anew for each shape, and on Hopper its gradients may be NaN where there is a mask."""
    import mini_llava.model  # noqa: F401

    assert not torch.backends.cuda.cudnn_sdp_enabled()


FIRST_TENSOR = """
import os
import torch
from mini_llava.training.backend import choose_precision
choose_precision(True, False, set())  # asks a GPU, if there is one, whether it knows bf16
print(os.environ.get("PYTORCH_ALLOC_CONF"))
if torch.cuda.is_available():
    tensor = torch.empty(2**26, device="cuda")
    print(all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""
ASKED_FOR_SEGMENTS = [
    ({}, ["expandable_segments:True", "True"]),
    ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, ["None", "False"]),  # its name before torch 2.9
]


def segments(asked: dict[str, str]) -> list[str]:
    """What torch is told about them, and whether a GPU, if there is one, has them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    run = subprocess.run([sys.executable, "-c", FIRST_TENSOR], env=environment | asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(("asked", "expected"), ASKED_FOR_SEGMENTS)
def test_torch_is_told_to_take_memory_in_segments_that_grow_unless_asked_otherwise(asked, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(backend.__file__, run_name=backend.__name__)  # as a process does that imports it first
    assert str(os.environ.get("PYTORCH_ALLOC_CONF")) == expected[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("asked", "expected"), ASKED_FOR_SEGMENTS)
def test_a_gpus_memory_is_taken_so(asked, expected):
    assert segments(asked) == expected
