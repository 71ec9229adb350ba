"""Norms of the last update and of the weights, for some of the logged steps.

LLaVA logs the gradient's norm only, which says nothing of what AdamW makes of it. The update is computed again from
AdamW's moments: the weights before the step are not kept.
"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from ..training.backend import is_offloaded, sum_over_ranks
from ..training.sharded_state import KINDS, ShardedState

POINTS = 500  # of a whole run: reading all moments takes longer than AdamW's own step
NUMBERS_AT_ONCE = 2**22  # two temporary tensors of 16 MiB


def norms_are_due(step: int, total_steps: int) -> bool:
    """Return whether norms are logged after a step: each one of a short run, every tenth of LLaVA's 5,198."""
    return step % max(1, total_steps // POINTS) == 0


@torch.no_grad()
def step_norms(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return `update_norm` and `parameter_norm` of all trained parameters in fp32, after an optimizer step.

    A collective for which the host waits; each rank computes its share. Empty if the optimizer is offloaded to the CPU,
    which takes longer to read than a step.
    """
    if is_offloaded(accelerator):
        return {}
    groups = {name: group for group in optimizer.param_groups for name in group["parameter_names"]}
    state = ShardedState(accelerator, model, optimizer)
    steps = state.steps_taken()  # of every parameter: all have a gradient in every step
    nothing = torch.zeros((), device=accelerator.device)
    norms = [(nothing, nothing)]  # small parameters may lie on other ranks, all of them
    for piece in state.pieces():
        for first in range(piece.own.start, piece.own.stop, NUMBERS_AT_ONCE):
            part = slice(first, min(first + NUMBERS_AT_ONCE, piece.own.stop))
            master, *moments = (piece.tensors[kind][part] for kind in KINDS)
            norms.append((_last_change(master, *moments, steps, groups[piece.name]), master.norm()))
    squares = [torch.stack(column).double().square().sum() for column in zip(*norms, strict=True)]
    update, parameters = sum_over_ranks(accelerator, torch.stack(squares)).sqrt().tolist()
    return {"update_norm": update, "parameter_norm": parameters}


def _last_change(
    master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, steps: int, group: dict
) -> torch.Tensor:
    """Return the norm of AdamW's last change to `master`; all tensors flat, fp32 and as they are after that step."""
    (beta1, beta2), rate, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
    # rate * (exp_avg / (1 - beta1^steps)) / (sqrt(exp_avg_sq / (1 - beta2^steps)) + eps), in as few passes as possible
    scale = math.sqrt(1 - beta2**steps)
    direction = exp_avg / exp_avg_sq.sqrt().add_(group["eps"] * scale)
    factor = rate * scale / (1 - beta1**steps)
    if decay == 0:
        return direction.norm() * factor
    # after = (1 - decay) * before - factor * direction, and the step is factor * direction + decay * before
    return direction.mul_(factor).add_(master, alpha=decay).norm() / (1 - decay)
