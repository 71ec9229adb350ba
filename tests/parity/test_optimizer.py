"""Parameter groups against those of LLaVA's `create_optimizer`, recorded in fixtures/optimizer_groups.json.

LLaVA makes two groups, or four if the projector has a rate of its own; here each part of the model has its two. What is
compared is therefore each parameter's rate and decay, and which side of the decay it stands on.
"""

import pytest

from mini_llava import arguments as flags
from mini_llava.model.trained import apply_plan, freeze_plan
from mini_llava.training.optimizer import build_adamw, parameter_groups, set_learning_rates
from tests.parity.golden import LLAVA, golden_model, llava_name, load_json


@pytest.mark.parametrize("case", load_json("optimizer_groups.json"), ids=lambda case: case["name"])
def test_every_parameter_has_llavas_rate_and_decay(case, golden_projector, agree):
    model, given = golden_model(golden_projector), case["arguments"]
    apply_plan(model, freeze_plan(flags.ModelArguments(tune_mm_mlp_adapter=given["tune_mm_mlp_adapter"])))
    rates = {"projector": given.get("mm_projector_lr")}
    groups = parameter_groups(model, given["learning_rate"], given["weight_decay"], rates)
    training = flags.TrainingArguments()
    optimizer = build_adamw(groups, (training.adam_beta1, training.adam_beta2), training.adam_epsilon, fused=False)

    ours, ours_without_decay = {}, set()
    for group in optimizer.param_groups:
        assert group["params"], "DeepSpeed drops empty groups, and the others move up"
        assert group["betas"] == tuple(case["betas"]) and group["eps"] == case["eps"]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert [names[id(parameter)] for parameter in group["params"]] == group["parameter_names"]
        for name in map(llava_name, group["parameter_names"]):
            assert name not in ours
            ours[name] = (group["lr"], group["weight_decay"])
            if group["name"].endswith("_no_decay"):
                ours_without_decay.add(name)

    theirs, theirs_without_decay = {}, set()
    for number, group in enumerate(case["groups"]):  # with decay, without; then the projector's, with and without
        theirs |= dict.fromkeys(group["names"], (group["lr"], group["weight_decay"]))
        theirs_without_decay |= set(group["names"]) if number % 2 else set()
    assert set(ours) == set(theirs)
    assert ours_without_decay == theirs_without_decay
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == case["frozen"]
    difference = max(abs(a - b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    agree("rate and weight decay of each parameter, by name", LLAVA, difference, 0.0)


def test_the_schedule_scales_every_group_from_its_own_peak(golden_projector):
    model = golden_model(golden_projector)
    optimizer = build_adamw(parameter_groups(model, 1e-4, 0.1, {"projector": 2e-5}), (0.9, 0.999), 1e-8, fused=False)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.25)  # from the peak again, not from the last value
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {
        "language_model": 2.5e-5,
        "language_model_no_decay": 2.5e-5,
        "projector": 5e-6,
        "projector_no_decay": 5e-6,
    }
