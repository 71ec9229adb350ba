"""How large a step was beside the weights it changed, for some of the steps that are logged.

LLaVA logs the norm of the gradient only, which says nothing of what AdamW makes of it. The weights before the step are
not kept for this: AdamW's moments, which are there anyway, tell its step again.
"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from ..training.backend import is_offloaded, sum_over_ranks
from ..training.sharded_state import KINDS, ShardedState

POINTS = 500  # of a whole run: a curve needs no more, and reading all moments takes longer than AdamW's own step
NUMBERS_AT_ONCE = 2**22  # two temporary tensors of 16 MiB, for which there is room while the activations are gone


def norms_are_due(step: int, total_steps: int) -> bool:
    """Every step of a short run, every tenth of LLaVA's 5,198."""
    return step % max(1, total_steps // POINTS) == 0


@torch.no_grad()
def step_norms(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Norm of all trained parameters, in fp32, and of the change that the step just taken made to them.

    A collective for which the host waits: all ranks must call it. Each rank weighs what it holds, or its share of what
    all ranks hold.

    Returns:
        `update_norm` and `parameter_norm`; nothing where the optimizer lies in the CPU's memory, which would be read
        for longer than the step takes.
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
    """The norm of what AdamW's last step added to `master`; all flat, fp32 and as they are after that step."""
    (beta1, beta2), rate, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
    # rate * (exp_avg / (1 - beta1^steps)) / (sqrt(exp_avg_sq / (1 - beta2^steps)) + eps), in as few passes as possible
    scale = math.sqrt(1 - beta2**steps)
    direction = exp_avg / exp_avg_sq.sqrt().add_(group["eps"] * scale)
    factor = rate * scale / (1 - beta1**steps)
    if decay == 0:
        return direction.norm() * factor
    # after = (1 - decay) * before - factor * direction, and the step is factor * direction + decay * before
    return direction.mul_(factor).add_(master, alpha=decay).norm() / (1 - decay)
