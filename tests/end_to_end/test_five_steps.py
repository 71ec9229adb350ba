"""Five steps on two processes leave the weights of five steps on one: DDP, ZeRO-2, ZeRO-3, ZeRO-3 with offload."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.end_to_end import runs
from tests.launching import CONFIGS, train_in_turn

TOLERANCE = 1e-5  # of the change that five steps made to the tensor; what does not change has to stay equal

ON_TWO_PROCESSES = [pair for pair in runs.on_two_processes("stage") if "bf16" not in pair[1]]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(run)`: the weights before the first step, as a run saves them that changes nothing."""
    folder, saved = tmp_path_factory.mktemp("start"), {}

    def get(run: str):
        stage, values = runs.RUNS[run]
        kind = "LoRA" if "lora_enable" in values else str(stage)
        if kind not in saved:
            values = values | {"max_steps": 1, "learning_rate": 0, "mm_projector_lr": 0, "allow": "learning_rate"}
            runs.train_here(runs.flags_of(stage, folder / kind, values))
            saved[kind] = runs.saved_weights(folder / kind)
        return saved[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "run"), ON_TWO_PROCESSES)
def test_two_processes_save_the_weights_of_one(one_process, two_processes, start, backend, run):
    found = runs.saved_weights(two_processes(backend, run))
    expected, before = runs.saved_weights(one_process(run)), start(run)
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
    rates = {"learning_rate": 0, "learning_rate/projector": 0}
    norms = {"gradient_norm": 1e-5, "parameter_norm": 1e-6, "update_norm": 1e-5}
    if backend == "zero3_offload":  # the moments lie in the CPU's memory: they are not read for a log
        assert not any("update_norm" in line or "parameter_norm" in line for line in found)
        norms = {"gradient_norm": 1e-5}
    for key, allowed in {"loss": 2e-6, **rates, **norms}.items():
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=allowed, abs=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_clipping_is_at_work_in_every_step_of_the_clipped_runs(one_process, start, stage):
    clipped, free = one_process(f"stage{stage}-clipped"), one_process(f"stage{stage}-unclipped")
    assert all(line["gradient_norm"] > 2 * runs.CLIP_AT for line in runs.log(clipped))
    name, before = "mm_projector.bin/model.mm_projector.0.weight", start(f"stage{stage}-clipped")
    with_clipping, without = (runs.saved_weights(run)[name] - before[name] for run in (clipped, free))
    assert (with_clipping - without).norm() > 0.1 * without.norm()


def learns_as_in_fp32(in_bf16, in_fp32) -> None:
    losses, expected = ([line["loss"] for line in runs.log(run)] for run in (in_bf16, in_fp32))
    assert len(losses) == 5
    # The first step has a rate of 0, so two losses belong to the first weights: bf16 rounds at 0.4 %, and each
    # is a mean over tens of tokens or more. After that the paths part slowly.
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert losses[4] - losses[1] == pytest.approx(expected[4] - expected[1], rel=0.1)


@pytest.mark.slow
def test_stage_1_in_bf16_trains_and_saves_under_zero3(one_process, two_processes):
    run = two_processes("zero3", "stage1-bf16")
    learns_as_in_fp32(run, one_process("stage1-unclipped"))
    assert all(weight.isfinite().all() for weight in runs.saved_weights(run).values())


@pytest.mark.slow
def test_stage_2_in_bf16_trains_and_saves_under_zero3(one_process, tmp_path):
    """With the config of the README, whose command tests/test_readme_commands.py launches."""
    values = runs.FIVE_STEPS | {"bf16": True, "max_grad_norm": 0}
    printed = train_in_turn(CONFIGS / "zero3.yaml", [runs.flags_of(2, tmp_path / "run", values)], tmp_path)
    assert "2 processes, DeepSpeed ZeRO-3, bf16, cpu" in printed
    learns_as_in_fp32(tmp_path / "run", one_process("stage2-unclipped"))
    assert {weight.dtype for weight in runs.saved_weights(tmp_path / "run").values()} == {torch.bfloat16}
    model, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(loading.values()) and model.dtype == torch.bfloat16
