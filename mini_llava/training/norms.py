"""How large a step was beside the weights it changed, for the steps that are logged.

LLaVA logs the norm of the gradient only, which says nothing of what AdamW makes of it. The weights before the step are
not kept for this: AdamW's moments, which are there anyway, tell its step again.
"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from .checkpoint import KINDS, held_pieces, own_range
from .distributed import is_deepspeed, is_offloaded, sum_over_ranks

NUMBERS_AT_ONCE = 2**24  # two temporary tensors of this size, 128 MiB, while the activations are gone


@torch.no_grad()
def step_norms(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Norm of all trained parameters, in fp32, and of the change that the step just taken made to them.

    A collective, and the host waits for the device: all ranks must call it, on logged steps. Each rank weighs what it
    holds, or its share of what all ranks hold, reading 12 bytes a parameter.

    Returns:
        `update_norm` and `parameter_norm`; nothing where the optimizer lies in the CPU's memory, which would be read
        for longer than the step takes.
    """
    if is_offloaded(accelerator):
        return {}
    groups = {name: group for group in optimizer.param_groups for name in group["parameter_names"]}
    inner = optimizer.optimizer.optimizer if is_deepspeed(accelerator) else optimizer.optimizer
    steps = int(next(iter(inner.state.values()))["step"])  # of every parameter: all have a gradient in every step
    squares = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for piece in held_pieces(accelerator, model, optimizer):
        start, stop = own_range(accelerator, piece)
        for first in range(start, stop, NUMBERS_AT_ONCE):
            part = slice(first, min(first + NUMBERS_AT_ONCE, stop))
            master, *moments = (piece.tensors[kind][part] for kind in KINDS)
            change = _last_change(master, *moments, steps, groups[piece.name])
            squares += torch.stack([change.norm(), master.norm()]).double().square()
    update, parameters = sum_over_ranks(accelerator, squares).sqrt().tolist()
    return {"update_norm": update, "parameter_norm": parameters}


def _last_change(
    master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, steps: int, group: dict
) -> torch.Tensor:
    """What AdamW's last step added to `master`, up to its sign; all flat, fp32 and as they are after that step."""
    (beta1, beta2), rate, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
    scale = math.sqrt(1 - beta2**steps)
    # rate * (exp_avg / (1 - beta1^t)) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps), in place as far as possible
    denominator = exp_avg_sq.sqrt().add_(group["eps"] * scale)
    change = exp_avg.div(denominator).mul_(rate * scale / (1 - beta1**steps))
    if decay == 0:
        return change
    # after = (1 - decay) * before - change, so the whole step is change + decay * before
    return change.add_(master, alpha=decay).div_(1 - decay)
