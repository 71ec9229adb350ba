"""The benchmarks run: on tiny models here, as they do on real shapes."""

import json
import subprocess
import sys

import pytest

from benchmarks import random_setup
from tests.launching import ROOT


@pytest.mark.slow
def test_throughput_measures_the_real_trainer_and_prints_a_row(tmp_path):
    random_setup.make_models(tmp_path, "tiny")
    random_setup.make_records(tmp_path, count=24, pictures=3)
    for records in ("stage1.json", "stage2.json"):
        assert len(json.loads((tmp_path / records).read_text())) == 24

    table = tmp_path / "table.jsonl"
    own = ["--setup", tmp_path, "--name", "tiny", "--steps", "3", "--warmup_steps", "1", "--table", table]
    of_train = ["--stage", "2", "--bf16", "False", "--global_batch_size", "4", "--dataloader_num_workers", "0"]
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", *own, *of_train]
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

    row = json.loads(table.read_text())
    assert (row["name"], row["steps"]) == ("tiny", 2)
    assert row["samples"] > 0 and row["tokens"] == row["computed"] > 0  # packed: nothing is padded
    assert "| tiny |" in run.stdout
    assert not list(tmp_path.glob("output/*.safetensors"))  # no weights are left


@pytest.mark.slow
def test_memory_estimates_without_a_gpu_and_prints_a_row(tmp_path):
    random_setup.make_models(tmp_path, "tiny")
    random_setup.make_records(tmp_path, count=24, pictures=1)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    own = ["--setup", tmp_path, "--name", "tiny", "--table", tmp_path / "table.jsonl"]
    zero3 = ["--accelerate_config", ROOT / "accelerate_configs" / "zero3.yaml", "--num_gpus", "4"]
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", *own, "--only_estimate", "--stage", "2", *zero3]
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "4 GPUs of 79 GiB, ZeRO-3, bf16" in run.stdout and "It fits: " in run.stdout

    row = json.loads((tmp_path / "table.jsonl").read_text())
    assert row["estimate"] == pytest.approx(sum(row["parts"].values()), abs=0.1) and "measured" not in row
    assert f"| tiny | {row['estimate']} | - | - |" in run.stdout
