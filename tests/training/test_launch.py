"""A launch that accelerate silently turns into something else is refused."""

import os
import subprocess
import sys

import pytest

CODE = """
from pathlib import Path
from mini_llava.training.distributed import build_accelerator
build_accelerator("no", 1.0, "none", Path("."))
"""


def printed(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", CODE]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True).stderr


@pytest.mark.slow
def test_deepspeed_that_accelerate_leaves_out_is_missed():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    text = printed(address | deepspeed | {"ACCELERATE_USE_CPU": "true"})
    assert "ValueError: The accelerate config asks for DeepSpeed, but accelerate leaves it out" in text
