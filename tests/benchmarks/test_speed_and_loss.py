"""The benchmarks that compare trainings: on tiny models here, as they do on real shapes."""

import math

import pytest

from benchmarks import against_trainer, random_setup
from benchmarks.throughput import read_log
from tests import forked_runs

SHARED = ["--stage", "2", "--bf16", "False", "--global_batch_size", "8", "--per_device_train_batch_size", "2"]
SHARED += ["--model_max_length", "128", "--dataloader_num_workers", "0"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    directory = tmp_path_factory.mktemp("setup")
    random_setup.make_models(directory, "tiny")
    random_setup.make_records(directory, count=40, pictures=3)
    return directory


@pytest.mark.slow
def test_transformers_trainer_does_the_same_training_and_the_ratio_is_printed(setup, tmp_path, capsys):
    segments = {}
    for name, program in (("Trainer", "transformers_trainer.py"), ("ours", "throughput.py")):
        flags = ["--setup", setup, "--steps", "3", "--output_dir", tmp_path / name, "--learning_rate", "1e-3", *SHARED]
        if name == "ours":
            flags += ["--warmup_steps", "1", "--table", tmp_path / "table"]
        output = tmp_path / f"{name}.txt"
        run = forked_runs.start(list(map(str, flags)), output, "zero3", 2, program=f"benchmarks/{program}")
        assert run.wait() == 0, run.text[-5000:]
        segments[name] = against_trainer.segments_of(read_log(tmp_path / name)[1:], 1)

    # Same weights, samples, rates and steps; the 64 rows for <image>, which hold the mean of the others, are all that
    # the Trainer's softmax has more. 1e-4: fp32 sums of other shapes, three steps on.
    losses = {name: [step["loss"] for [step] in logged] for name, logged in segments.items()}
    differences = [theirs - ours for theirs, ours in zip(*losses.values(), strict=True)]
    assert differences == pytest.approx([math.log(32_064 / 32_000)] * 2, abs=1e-4), losses
    assert losses["ours"][0] - losses["ours"][1] > 10 * 1e-4, "nothing was learned, so this comparison shows nothing"

    against_trainer.report(segments, 2, tmp_path / "table.jsonl")
    printed = capsys.readouterr().out
    assert "| Trainer |" in printed and "| ours |" in printed and "times as fast (medians of 2 segments" in printed
