"""AdamW over named parameter groups: each part of the model with its own rate, norms and biases without weight decay.

Replaces `LLaVATrainer.create_optimizer`. Groups are looked up by name, never by position, because DeepSpeed silently
drops empty groups. This file needs torch and nothing else of the project.
"""

import torch
from torch import nn


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    rates: dict[str, float | None] | None = None,
) -> list[dict]:
    """Return the trained parameters of `model` in groups, two for each part: with and without weight decay.

    Args:
        learning_rate: peak rate of the parts that are not in `rates`.
        rates: peak rate by part, a direct child of the model: `{"projector": 2e-5}`; None counts as absent.

    Returns:
        Dictionaries for a torch optimizer with the extra keys `name`, `peak_lr` and `parameter_names`; no empty group.
    """
    rates = rates or {}
    without_decay = no_decay_names(model)
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".")[0]
        decays = name not in without_decay
        peak = rates.get(part) if rates.get(part) is not None else learning_rate
        group = groups.setdefault(
            part if decays else f"{part}_no_decay",
            {
                "name": part if decays else f"{part}_no_decay",
                "params": [],
                "parameter_names": [],
                "lr": peak,
                "peak_lr": peak,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["parameter_names"].append(name)
    return list(groups.values())


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names of the biases and of all parameters of normalisation layers (LayerNorm, RMSNorm, ...).

    Decided by module type and not by number of dimensions: under ZeRO-3 every parameter looks one-dimensional.
    """
    return {
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }


def build_adamw(groups: list[dict], betas: tuple[float, float], epsilon: float, fused: bool) -> torch.optim.AdamW:
    """Return torch's AdamW. `fused` (one kernel for all parameters) needs every parameter on a GPU."""
    return torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=betas, eps=epsilon, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to its peak times `factor`: before the last backward, in which DeepSpeed steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rate of each part of the model by its name in the log; both groups of a part have the same."""
    return {f"learning_rate/{group['name'].removesuffix('_no_decay')}": group["lr"] for group in optimizer.param_groups}
