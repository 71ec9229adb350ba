"""The longest micro-batch of a run, tried before step 1: what memory does not hold shows at once, and not after hours.

LLaVA has nothing of the kind. The trial leaves no trace: no step, no gradients, and every generator of random numbers
as it was, so that a run with it and one without it give the same losses and weights to the last bit.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig

from ..data.lengths import Lengths
from ..data.loader import RankSteps
from ..data.sampler import computed_tokens
from ..training import backend
from ..words import counted


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: all that its memory depends on.

    `columns` are those of its rows, one row when packed; `images` are what the tower gets, all tiles of them.
    """

    rows: int
    columns: int
    images: int
    logits: int
    packed: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def of_tokens(self, tokens: int) -> "Shape":
        """Return a micro-batch of the same kind with about so many tokens."""
        share = tokens / self.tokens
        if self.packed:
            scaled = replace(self, columns=tokens, logits=max(1, round(self.logits * share)))
        else:
            scaled = replace(self, rows=max(1, round(self.rows * share)))
        return replace(scaled, images=max(1, round(self.images * share)))


@dataclass(frozen=True)
class Longest:
    """The micro-batch that takes most memory, and what else decides that of a run.

    several: whether some step has several micro-batches, so that gradients are there while activations are.
    longest_sample: tokens; no micro-batch can be made smaller.
    """

    records: list[int]
    shape: Shape
    several: bool
    longest_sample: int


def kept_of_a_position(config: PreTrainedConfig, recomputed: float) -> float:
    """Return about how many numbers a language model keeps of one position until backward, without its logits.

    Args:
        config: of the language model.
        recomputed: share of the layers that keep their input alone: of the others there are some 16 times its width.
    """
    text = config.get_text_config()
    return text.num_hidden_layers * (recomputed + 16 * (1 - recomputed)) * text.hidden_size


def longest_micro_batch(
    dealt_batches: Iterable[list[list[list[int]]]],
    lengths: Lengths,
    layout: str,
    logits_weigh: float,
    pictures_weigh: float,
) -> Longest:
    """Return the micro-batch, of all ranks and steps, that needs most memory.

    Args:
        dealt_batches: for each step what `deal` gives.
        layout: `packed`, `padded` or `in_order`.
        logits_weigh: how many positions take as much memory as the logits of one trained token.
        pictures_weigh: how many positions take as much memory as what the tower keeps of one picture.
    """
    length, trained, pictures = lengths.length.tolist(), lengths.trained.tolist(), lengths.pictures.tolist()
    longest, most, several = [], -1.0, False
    for micro_batches in dealt_batches:
        several = several or len(micro_batches) > 1
        for records in (records for of_ranks in micro_batches for records in of_ranks):
            others = sum(logits_weigh * trained[index] + pictures_weigh * pictures[index] for index in records)
            if (weight := computed_tokens(records, length, layout) + others) > most:
                longest, most = records, weight
    tokens = computed_tokens(longest, length, layout)
    trained = lengths.trained[longest]
    columns = max((length[index] for index in longest), default=1)
    if layout == "packed":
        rows, columns, logits = 1, max(1, tokens), int(trained.sum())
    else:  # a column has logits if it is trained in some row: after the shortest prompt at the earliest
        rows, logits = max(1, len(longest)), columns - int((lengths.length[longest] - trained).min(initial=columns))
    shape = Shape(rows, columns, max(1, int(lengths.pictures[longest].sum())), max(1, logits), layout == "packed")
    return Longest(longest, shape, several, max(length))


def try_longest(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, steps: RankSteps, longest: Longest
) -> str:
    """Run it forward and backward on every rank, with the memory taken that the first step will take.

    All ranks must call it. Raises what a step would: out of memory above all, and the fault of a bad sample.
    """
    started = time.perf_counter()
    work = steps[[longest.records]]
    if work.fault is not None:
        raise work.fault
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]  # some layers keep running means in them
    on_gpu = accelerator.device.type == "cuda"
    with torch.random.fork_rng(devices=[accelerator.device] if on_gpu else []):
        # Where a step has several, the gradients of one are there when the next runs. Under ZeRO-3 the weights that are
        # gathered in the first are freed at once, while DeepSpeed records their order; from the second on they stay.
        for _ in range(2 if longest.several or backend.zero_stage(accelerator) == 3 else 1):
            with backend.micro_step(accelerator, model, is_last=False):
                batch = backend.to_device(work.micro_batches[0], accelerator.device)
                backend.backward(accelerator, model(**batch))
    backend.discard_gradients(accelerator, optimizer)
    for buffer, before in statistics:
        buffer.copy_(before)
    size = f"{counted(longest.shape.tokens, 'token')}, {counted(longest.shape.images, 'image')} through the tower"
    took = f"the longest micro-batch ({size})"
    if not on_gpu:
        return f"Tried {took} in {time.perf_counter() - started:.1f} s."
    peak = torch.cuda.max_memory_allocated() / 2**30
    return f"Tried {took}: peak memory {peak:.1f} GiB on rank 0."
