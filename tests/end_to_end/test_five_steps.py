"""Five steps on two processes leave the weights of five steps on one: DDP, ZeRO-2, ZeRO-3, ZeRO-3 with offload."""

import math

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.end_to_end import runs
from tests.launching import CONFIGS, ROOT, launch

TOLERANCE = 1e-5  # of the change that five steps made to the tensor; what does not change has to stay equal

ON_TWO_PROCESSES = [pair for pair in runs.on_two_processes("stage") if "bf16" not in pair[1]]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(stage)`: the weights before the first step, as a run saves them that changes nothing."""
    folder, saved = tmp_path_factory.mktemp("start"), {}

    def get(stage: int):
        if stage not in saved:
            values = runs.FIVE_STEPS | {"max_steps": 1, "learning_rate": 0, "mm_projector_lr": 0}
            runs.train_here(runs.flags_of(stage, folder / str(stage), values))
            saved[stage] = runs.saved_weights(folder / str(stage))
        return saved[stage]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "run"), ON_TWO_PROCESSES)
def test_two_processes_save_the_weights_of_one(one_process, two_processes, start, backend, run):
    found = runs.saved_weights(two_processes(backend, run))
    expected, before = runs.saved_weights(one_process(run)), start(runs.RUNS[run][0])
    assert found.keys() == expected.keys() == before.keys()
    differing = {}
    for name, weight in expected.items():
        change, difference = (weight - before[name]).norm(), (found[name] - weight).norm()
        if not difference <= TOLERANCE * change:
            differing[name] = float(difference / change)
    assert differing == {}
    assert any((weight != before[name]).any() for name, weight in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "run"), ON_TWO_PROCESSES)
def test_two_processes_have_the_losses_norms_and_rates_of_one(one_process, two_processes, backend, run):
    found, expected = runs.log(two_processes(backend, run)), runs.log(one_process(run))
    assert len(found) == 5
    for key, allowed in (("loss", 2e-6), ("gradient_norm", 1e-5), ("learning_rate", 0)):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=allowed, abs=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_clipping_is_at_work_in_every_step_of_the_clipped_runs(one_process, start, stage):
    clipped, free = one_process(f"stage {stage}, clipped"), one_process(f"stage {stage}, not clipped")
    assert all(line["gradient_norm"] > 2 * runs.CLIP_AT for line in runs.log(clipped))
    name, before = "mm_projector.bin/model.mm_projector.0.weight", start(stage)
    with_clipping, without = (runs.saved_weights(run)[name] - before[name] for run in (clipped, free))
    assert (with_clipping - without).norm() > 0.1 * without.norm()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_trains_and_saves_under_zero3(one_process, two_processes, stage):
    run = two_processes("zero3", f"stage {stage}, bf16")
    expected = runs.log(one_process(f"stage {stage}, not clipped"))
    losses = [line["loss"] for line in runs.log(run)]
    # bf16 rounds at 0.4 %, and its losses are means over a few hundred tokens.
    assert losses == pytest.approx([line["loss"] for line in expected], rel=5e-3)
    weights = runs.saved_weights(run)
    assert all(weight.isfinite().all() for weight in weights.values())
    if stage == 2:
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_command_of_the_readme_trains_and_saves_under_zero3(tmp_path):
    """`accelerate launch --config_file accelerate_configs/zero3.yaml train.py --stage 2`, in the preset's bf16."""
    zero3 = CONFIGS / "zero3.yaml"
    command_line = runs.flags_of(2, tmp_path, runs.FIVE_STEPS | {"bf16": True})
    printed = launch(zero3, ROOT / "train.py", *command_line)
    assert "2 processes, DeepSpeed ZeRO-3, bf16, cpu" in printed
    losses = [line["loss"] for line in runs.log(tmp_path)]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    model, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()) and model.dtype == torch.bfloat16
