"""The benchmarks that compare trainings: on tiny models here, as they do on real shapes."""

import math
import re

import pytest

from benchmarks import against_trainer, loss_distance, random_setup
from benchmarks.throughput import read_log
from tests import forked_runs

SHARED = ["--stage", "2", "--bf16", "False", "--global_batch_size", "8", "--per_device_train_batch_size", "2"]
SHARED += ["--model_max_length", "128", "--dataloader_num_workers", "0"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    directory = tmp_path_factory.mktemp("setup")
    random_setup.make_models(directory, "tiny", layers=2)
    random_setup.make_records(directory, count=48, pictures=3, zipf=1.2)
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


@pytest.mark.slow
@pytest.mark.parametrize(("live", "gathers"), [([], 1), (["--live_up_to", "8000000"], 3)])
def test_a_step_gathers_every_divided_weight_once_if_all_may_be_whole_and_reduces_every_gradient_in_each_micro_batch(
    setup, tmp_path, live, gathers
):
    """Of 8.8 million parameters; a 7B model may be whole on an H200. What forward gathers stays until backward."""
    flags = ["--setup", setup, "--whole_up_to", "10000", *live, *SHARED, "--global_batch_size", "12"]
    flags += ["--packing", "True", "--gradient_checkpointing", "False", "--output_dir", tmp_path / "run"]
    program = "benchmarks/communication.py"
    run = forked_runs.start(list(map(str, flags)), tmp_path / "out.txt", "zero3", 2, program=program)
    assert run.wait() == 0, run.text[-5000:]
    assert "| a step of 3 micro-batches |" in run.text
    times = dict(re.findall(r"^\| (\w+) \| .* \| ([\d.]+) \|$", run.text, re.MULTILINE))
    # 0.01: weights that are never divided have gradients too; a last part is filled up to a whole one.
    assert float(times["all_gather_into_tensor"]) == pytest.approx(gathers / 3, abs=0.01), run.text[-2000:]
    assert float(times["reduce_scatter_tensor"]) == pytest.approx(1, abs=0.01), run.text[-2000:]


@pytest.mark.slow
def test_what_is_turned_off_changes_no_loss_but_bf16_does_and_the_distances_are_printed(setup, tmp_path, capsys):
    runs = loss_distance.RUNS | {"fp32, everything on": ["--bf16", "False"]}
    started = {}
    for number, (name, flags) in enumerate(runs.items()):
        flags = ["--setup", setup, "--output_dir", tmp_path / str(number), *SHARED, *flags]
        flags += ["--steps", "6", "--warmup_steps", "1", "--table", tmp_path / "table"]
        flags += ["--learning_rate", "3e-3", "--gradient_checkpointing", "False"]
        output = tmp_path / f"{number}.txt"
        started[name] = forked_runs.start(list(map(str, flags)), output, program="benchmarks/throughput.py")
    for run in started.values():
        assert run.wait() == 0, run.text[-5000:]
    curves = {name: [step["loss"] for step in read_log(tmp_path / str(n))] for n, name in enumerate(started)}

    exact = curves["fp32, plain"]
    assert exact[0] - exact[-1] > 1, "nothing was learned, so this comparison shows nothing"
    # Sums of other shapes in fp32 differ by 1e-6 of the loss, which five large steps may enlarge.
    assert curves["fp32, everything on"] == pytest.approx(exact, abs=1e-4)
    # 1.5 is wanted of 50 steps on a GPU; six steps of a tiny model are few to average over.
    ratio = loss_distance.report({name: curves[name] for name in loss_distance.RUNS}, 6)["bf16, everything on"]
    assert 0 < ratio < 3
    assert f"bf16, everything on: the distance is {ratio:.2f} times that of plain bf16" in capsys.readouterr().out
