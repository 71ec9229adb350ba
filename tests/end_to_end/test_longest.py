"""The longest micro-batch is tried before step 1, and leaves no trace in what is trained."""

import os
from pathlib import Path

import pytest
import torch

from mini_llava.training import backend
from tests.end_to_end import runs
from tests.forked_runs import start

pytestmark = pytest.mark.slow

# Everything that can be random or kept: dropout, moments, several micro-batches a step, recomputation, half precision.
WITH_DROPOUT = runs.FIVE_STEPS | runs.LORA | {"lora_dropout": 0.2, "bf16": True}


def losses_norms_and_weights(run):
    logged = [(line["loss"], line["gradient_norm"]) for line in runs.log(run)]
    assert len(logged) == 5
    return logged, runs.saved_weights(run)


def are_equal_to_the_last_bit(tried, untried) -> None:
    (logged, weights), (expected_log, expected) = losses_norms_and_weights(tried), losses_norms_and_weights(untried)
    assert logged == expected_log
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []


def test_the_curve_is_bit_equal_with_and_without_on_one_process(tmp_path, capsys):
    for tried in (True, False):
        values = WITH_DROPOUT | {"longest_batch_first": tried}
        runs.train_here(runs.flags_of(2, tmp_path / str(tried), values))
        assert ("Tried the longest micro-batch (" in capsys.readouterr().out) is tried
    are_equal_to_the_last_bit(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("backend", runs.ON_TWO_PROCESSES)
def test_the_curve_is_bit_equal_with_and_without_on_two_processes(two_processes, backend):
    untried = two_processes(backend, "untried-stage2-clipped")
    are_equal_to_the_last_bit(two_processes(backend, "stage2-clipped"), untried)


def note_whole_weights() -> None:
    """In a rank: writes how many weights are whole before each backward into a file named by an own variable."""
    noted, run_backward = Path(os.environ["WHOLE_WEIGHTS"] + os.environ["RANK"]), backend.backward

    def noting(accelerator, loss) -> None:
        parameters = accelerator.deepspeed_engine_wrapped.engine.module.parameters()
        with noted.open("a") as file:
            print(sum(parameter.numel() for parameter in parameters), file=file)  # 0 of one that is divided
        run_backward(accelerator, loss)

    backend.backward = noting


@pytest.mark.parametrize("size", [4, 8], ids=["one micro-batch a step", "two micro-batches a step"])
def test_under_zero3_as_many_weights_are_whole_as_in_any_step(tmp_path, size):
    """A trial that finds room with its weights divided would say nothing of steps in which they are whole."""
    flags = runs.flags_of(2, tmp_path / "run", runs.FIVE_STEPS | {"global_batch_size": size, "max_steps": 2})
    config, environment = runs.config_file("zero3", tmp_path), {"WHOLE_WEIGHTS": str(tmp_path / "whole")}
    run = start(flags, tmp_path / "out.txt", config, 2, environment=environment, inside=note_whole_weights)
    assert run.wait() == 0, run.text
    for rank in range(2):
        whole = [int(line) for line in (tmp_path / f"whole{rank}").read_text().splitlines()]
        in_steps = size // 4 * 2
        tried, stepped = whole[:-in_steps], whole[-in_steps:]
        assert max(stepped) > 200_000 and max(tried) == max(stepped), whole
