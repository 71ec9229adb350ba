"""Loss curves of `train.py`'s own loop against six recorded runs of LLaVA c121f04 (fixtures/curves), 20 steps each.

With `--loss_normalization micro_batch` the loop must follow each of them. With the default, the loss of the whole
global batch, it must follow `batch8` however the batch is cut, padded or packed, on one process or two, under DDP or
ZeRO: in the recording a global batch of `batch8` is one micro-batch, so that both normalisations are the same.
"""

import pytest
from safetensors.torch import load_file

from tests.parity.golden import FIXTURES, LLAVA, load_json
from tests.parity.runs import CUTS, GOLDEN_CURVES, TWO_PROCESSES, curve_start, start_tensors


def compare_with_recording(run, curve_name, route, golden_projector, agree):
    curve, reference = load_json(f"curves/{curve_name}.json"), f"{LLAVA}, 20 steps"
    steps = curve["steps"]
    assert len(run.losses) == len(steps) == 20
    difference = max(abs(ours - step["lr"]) for ours, step in zip(run.learning_rates, steps, strict=True))
    agree("learning rates, all routes", reference, difference / max(step["lr"] for step in steps), 1e-12)
    # Rounding differs from the recording in the order of sums only: 1e-5 is ten times what it comes to.
    difference = max(abs(ours - step["loss"]) for ours, step in zip(run.losses, steps, strict=True))
    agree(f"loss, {route}", reference, difference, 1e-5)
    relative = [
        abs(ours - step["grad_norm"]) / step["grad_norm"] for ours, step in zip(run.gradient_norms, steps, strict=True)
    ]
    agree(f"gradient norm, relative, {route}", reference, max(relative), 1e-5)

    start = start_tensors(curve_start(curve_name, golden_projector))
    if isinstance(curve["final"], str):  # stage 1: the recorded projector itself
        recorded = load_file(FIXTURES / curve["final"])
        assert set(run.tensors) == set(recorded)
        for name, theirs in recorded.items():
            agree(f"final projector, {route}", reference, float((run.tensors[name] - theirs).abs().max()), 1e-4)
            change = float((run.tensors[name] - theirs).norm() / (theirs - start[name]).norm())
            agree(f"change of each tensor, relative, {route}", reference, change, 1e-4)
        return
    trained = {name for name in run.tensors if "vision_tower" not in name}
    assert trained == set(curve["final"])
    for name, theirs in curve["final"].items():
        ours = run.tensors[name].double()
        change = float((ours - start[name].double()).norm())
        difference = abs(change - theirs["change_norm"]) / theirs["change_norm"]
        agree(f"change of each tensor, relative, {route}", reference, difference, 1e-4)
        difference = abs(float(ours.norm()) - theirs["norm"]) / theirs["norm"]
        agree("norm of each final tensor, relative, all routes", reference, difference, 1e-5)
        first = ours.flatten()[:3].tolist()
        difference = max(abs(a - b) for a, b in zip(first, theirs["first"], strict=True))
        agree("first values of each final tensor, all routes", reference, difference, 1e-5)
    for name in set(run.tensors) - trained:
        assert run.tensors[name].equal(start[name]), f"{name} is frozen and has changed"


@pytest.mark.parametrize("name", GOLDEN_CURVES)
def test_the_loop_follows_llavas_curve_with_its_mean_of_means(name, one_process, golden_projector, agree):
    size = load_json(f"curves/{name}.json")["arguments"]["per_device_train_batch_size"]
    run = one_process(f"curve/{name}/{size}/micro_batch")
    compare_with_recording(run, name, f"{name}, mean of means", golden_projector, agree)


@pytest.mark.parametrize("stage, size, layout", CUTS, ids=lambda value: str(value))
def test_batch8_comes_out_however_the_batch_is_cut(stage, size, layout, one_process, golden_projector, agree):
    run = one_process(f"curve/stage{stage}_batch8/{size}/{layout}")
    compare_with_recording(run, f"stage{stage}_batch8", f"stage {stage} batch8, one process", golden_projector, agree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, name",
    [(backend, name) for backend, names in TWO_PROCESSES.items() for name in names if name.startswith("curve/")],
)
def test_the_curves_come_out_on_two_processes(backend, name, two_processes, golden_projector, agree):
    curve_name = name.split("/")[1]
    route = {"ddp": "two processes, DDP", "zero2": "two processes, ZeRO-2", "zero3": "two processes, ZeRO-3"}[backend]
    compare_with_recording(two_processes(backend, name), curve_name, route, golden_projector, agree)


def test_the_two_ways_to_normalise_differ_where_a_batch_is_cut(one_process):
    """Or the tests above would not tell them apart."""
    exact = one_process("curve/stage2_batch8/4/padded").losses
    mean_of_means = one_process("curve/stage2_batch4_accumulation2/4/micro_batch").losses
    assert max(abs(a - b) for a, b in zip(exact, mean_of_means, strict=True)) > 1e-3
