"""Each part of the model has its own rate, norms and biases no decay, and groups have names."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mini_llava.training.optimizer import build_adamw, no_decay_names, parameter_groups, set_learning_rates


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.linear = LlamaRMSNorm(4), nn.Linear(4, 4)


@pytest.fixture
def model() -> nn.Module:
    parts = {
        "vision_tower": nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4)),
        "projector": nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        "language_model": nn.Sequential(nn.Embedding(5, 4), Layer(), nn.Linear(4, 5, bias=False)),
    }
    return nn.ModuleDict(parts)


def by_name(groups: list[dict]) -> dict[str, dict]:
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


def test_every_trained_parameter_is_in_one_group_and_no_group_is_empty(model):
    model["vision_tower"].requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.1)
    names = [name for group in groups for name in group["parameter_names"]]
    assert sorted(names) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert all(group["params"] for group in groups)
    assert set(by_name(groups)) == {"projector", "projector_no_decay", "language_model", "language_model_no_decay"}


def test_parameters_stand_beside_their_names(model):
    parameters = dict(model.named_parameters())
    for group in parameter_groups(model, 1e-3, 0.1):
        assert [id(parameters[name]) for name in group["parameter_names"]] == [id(p) for p in group["params"]]


def test_biases_and_norms_do_not_decay_and_all_else_does(model):
    assert no_decay_names(model) == {
        "vision_tower.0.bias",
        "vision_tower.1.weight",
        "vision_tower.1.bias",
        "projector.0.bias",
        "projector.2.bias",
        "language_model.1.input_layernorm.weight",
        "language_model.1.linear.bias",
    }
    for name, group in by_name(parameter_groups(model, 1e-3, 0.1)).items():
        assert group["weight_decay"] == (0.0 if name.endswith("_no_decay") else 0.1)


def test_decay_does_not_depend_on_the_number_of_dimensions(model):
    names = no_decay_names(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves them
    assert no_decay_names(model) == names


@pytest.mark.parametrize("rates", [None, {}, {"projector": None}])
def test_without_a_rate_of_its_own_a_part_has_the_common_one(model, rates):
    assert {group["peak_lr"] for group in parameter_groups(model, 1e-3, 0.0, rates)} == {1e-3}


def test_a_part_with_a_rate_of_its_own_keeps_the_proportion_all_along(model):
    groups = parameter_groups(model, 1e-3, 0.0, {"projector": 1e-4, "vision_tower": 0.0})
    optimizer = build_adamw(groups, (0.9, 0.95), 1e-7, fused=False)
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-7
    for factor in (0.0, 1.0, 0.25):
        set_learning_rates(optimizer, factor)
        rates = {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
        assert rates == {"language_model": 1e-3 * factor, "projector": 1e-4 * factor, "vision_tower": 0.0}
