"""Spares ZeRO-3 gathers, copies, casts and waits that no result needs.

A run without this module would be slower, and its losses would differ only by the rounding of layers with a bias.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..training.backend import is_offloaded, zero_stage


def do_less(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have ZeRO-3 do less work for a prepared model and its prepared optimizer; elsewhere do nothing."""
    if zero_stage(accelerator) != 3:
        return
    model, zero = accelerator.unwrap_model(model), optimizer.optimizer
    if _may_be_whole(accelerator, model):
        for parameter in model.parameters():
            # What a micro-batch has gathered stays for the next. Before it changes weights DeepSpeed partitions all.
            parameter.ds_persist = True
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.bias is not None and "forward" not in vars(layer):
            layer.forward = functools.partial(_forward_of_rows, layer)
    if is_offloaded(accelerator):  # a CPU's optimizer reads what the stream copies: the host must wait
        return
    # Arriving gradients are added to the fp32 sums as they are, without a copy of them in fp32.
    zero.gradient_accumulation_dtype = zero.communication_data_type
    overlaps = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["overlap_comm"]
    if accelerator.device.type == "cuda" and overlaps:
        zero.reduce_and_partition_stream = _WaitedForByTheDevice()


@contextlib.contextmanager
def weights_stay(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Have ZeRO-3 gather each weight once inside, where no gradients are computed; elsewhere do nothing.

    By itself it releases a weight after each use where uses have no recorded order: every token of an answer would need
    all of them gathered anew. Without activations twice as many may be whole as in training.
    """
    if zero_stage(accelerator) != 3:
        yield
        return
    all_stay = _may_be_whole(accelerator, model, limits=2)
    kept = [parameter for parameter in model.parameters() if all_stay or parameter.ds_persist]
    for parameter in kept:
        parameter.ds_active_sub_modules.add("kept")
    try:
        yield
    finally:
        for parameter in kept:
            parameter.ds_active_sub_modules.discard("kept")
            if not parameter.ds_persist and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()


def linear_of_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `F.linear(x, weight, bias)` of the last dimension, computed as [rows, width].

    For more than two dimensions DeepSpeed's replacement of `F.linear` rounds the product, and then adds the bias.
    """
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _forward_of_rows(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear_of_rows(x, layer.weight, layer.bias)


def _may_be_whole(accelerator: Accelerator, model: nn.Module, limits: int = 1) -> bool:
    """Return whether all weights may be gathered at a time: as many as `limits` times the settings' live parameters."""
    settings = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    is_offloaded = (settings.get("offload_param") or {}).get("device", "none") != "none"
    most = limits * settings["stage3_max_live_parameters"]
    return not is_offloaded and sum(parameter.ds_numel for parameter in model.parameters()) <= most


class _WaitedForByTheDevice(torch.cuda.Stream):  # pragma: no cover, needs a GPU
    """Stream on which ZeRO-3 reduces gradients; what comes after them waits on the device.

    At the end of each backward DeepSpeed has the host wait for it. The GPU then has nothing to do until the host has
    prepared the next micro-batch and called the hooks of its first layers.
    """

    def synchronize(self) -> None:
        torch.cuda.current_stream().wait_stream(self)
