"""The trained state as one rank holds it: fp32 masters, AdamW's moments, the loss scale.

Without DeepSpeed every rank holds all of it. Under ZeRO-2 the parameters of a group lie one after the other in a flat
tensor, of which each rank holds an equal part; under ZeRO-3 every parameter is partitioned by itself. Here it is always
the same: flat pieces of named parameters.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from .backend import inner_optimizer, is_deepspeed, zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


class Piece(NamedTuple):
    """A flat range of one parameter.

    Attributes:
        start: where it begins in the flattened parameter.
        tensors: flat fp32 views of the master and the moments in this range, by kind.
        own: the part of `tensors` that this rank writes to a checkpoint: an equal share where all ranks hold the same.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    own: slice


class ShardedState(NamedTuple):
    """A prepared model with its prepared optimizer, whose moments exist (`backend.create_moments`)."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every trained parameter."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trained_parameters().items()}

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the trained parameters on this rank; without DeepSpeed, each is a whole parameter."""
        if zero_stage(self.accelerator) == 3:
            yield from self._zero3_pieces()
        elif is_deepspeed(self.accelerator):
            yield from self._zero2_pieces()
        else:
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            for name, parameter in self.trained_parameters().items():
                state, share = self.optimizer.state[parameter], -(-parameter.numel() // ranks)
                tensors = {"master": parameter.data.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
                own = slice(min(rank * share, parameter.numel()), min((rank + 1) * share, parameter.numel()))
                yield Piece(name, 0, tensors, own)

    def _zero2_pieces(self) -> Iterator[Piece]:
        zero = self.optimizer.optimizer
        names = {id(parameter): name for name, parameter in self.trained_parameters().items()}
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is None:  # all of it lies on other ranks
                    continue
                # Not `safe_get_full_optimizer_state`: DeepSpeed 0.19 links the moments of the first group only.
                address = mapping.hp_fragment_address
                moments = {k: zero.optimizer.state[flat][k].narrow(0, address.start, address.numel) for k in MOMENTS}
                start, tensors = mapping.lp_fragment_address.start, {"master": mapping.hp_fragment} | moments
                yield Piece(names[id(parameter)], start, tensors, slice(0, address.numel))

    def _zero3_pieces(self) -> Iterator[Piece]:
        zero, rank = self.optimizer.optimizer, self.accelerator.process_index
        for name, parameter in self.trained_parameters().items():
            # The public `safe_get_local_*` return copies if the optimizer is offloaded; a view can be written to too.
            views = {
                kind: zero._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=False, optim_state_key=None if kind == "master" else kind
                )[0]
                for kind in KINDS
            }
            start = rank * views["master"].numel()  # the last partitions end in padding, or are nothing but padding
            real = max(0, min(views["master"].numel(), parameter.ds_numel - start))
            yield Piece(name, start, {kind: view[:real] for kind, view in views.items()}, slice(0, real))

    def steps_taken(self) -> int:
        """Return AdamW's own count, which is below the number of optimizer steps if fp16 skipped some."""
        inner = inner_optimizer(self.accelerator, self.optimizer)
        return max((int(state["step"]) for state in inner.state.values()), default=0)

    def refresh_working_weights(self, read_master: Callable[[torch.Tensor, str], None]) -> None:
        """Copy the masters to the weights that the model computes with, which under ZeRO are a second copy.

        read_master: fills a flat fp32 tensor with the whole master of the parameter of this name.
        """
        if not is_deepspeed(self.accelerator):
            return
        if zero_stage(self.accelerator) != 3:
            self.optimizer.optimizer.update_lp_params()
            return
        import deepspeed

        for name, parameter in self.trained_parameters().items():
            # Through the gathering context, because small parameters are also kept whole on every rank.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    master = torch.empty(parameter.numel(), dtype=torch.float32)
                    read_master(master, name)
                    parameter.data.copy_(master.view_as(parameter))

    def loss_scale(self) -> dict:
        """Return the loss scale of fp16 and its counters, as JSON values; empty in other precisions."""
        if is_deepspeed(self.accelerator):
            scaler = self.optimizer.optimizer.loss_scaler
            return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)}
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def restore_loss_scale(self, saved: dict) -> None:
        """Set what `loss_scale` returned."""
        if saved and is_deepspeed(self.accelerator):
            vars(self.optimizer.optimizer.loss_scaler).update(saved)
        elif saved and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved)
