"""The longest micro-batch is tried before step 1, and leaves no trace in what is trained."""

import pytest
import torch

from tests.end_to_end import runs

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
