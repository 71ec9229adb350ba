"""What a run trains on, step by step: the global batches, and how each is dealt to ranks and micro-batches.

LLaVA's Trainer leaves this to a sampler, a batch size and accelerate's sharding of the loader. `train.py` follows this
order, and `tools.plan` plans with it, for as many devices as it is asked about.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..arguments import Arguments, TrainingArguments
from ..data.lengths import Lengths
from ..data.records import RecordStore
from ..data.sampler import GlobalBatchSampler, deal
from ..errors import UserError
from ..words import counted


@dataclass
class Order:
    """
    Attributes:
        sampler: the global batches, and the cursor over them.
        total_steps: where the run ends.
        layout: `packed`, `padded` or `in_order`, see `deal`.
        ranks, micro_batches: among which a global batch is dealt.
        max_tokens: see `deal`.
        bad: the records that are left out of their global batch.
        note: a sentence if the size of the global batch is not the preset's.
    """

    sampler: GlobalBatchSampler
    total_steps: int
    layout: str
    ranks: int
    micro_batches: int
    max_tokens: int | None
    bad: dict[int, str]
    note: str | None

    def dealt_batches(self, until: int | None = None) -> Iterator[list[list[list[int]]]]:
        """Yield `[micro-batch][rank] -> records` of each step from the cursor to `until`, or to the end of the run."""
        for batch in self.sampler.batches(self.total_steps if until is None else until):
            good = [index for index in batch if index not in self.bad]
            yield deal(good, self.sampler.lengths, self.ranks, self.micro_batches, self.layout, self.max_tokens)

    def batches_of_rank(self, rank: int) -> Iterator[list[list[int]]]:
        """Yield `[micro-batch] -> records` of this rank for each step from the cursor to the end of the run."""
        for dealt in self.dealt_batches():
            yield [of_ranks[rank] for of_ranks in dealt]


def steps_between_states(training: TrainingArguments, order: Order) -> int | None:
    """Return after how many steps each a training state is due, as in transformers; None: after none."""
    if training.save_strategy == "no":
        return None
    if training.save_strategy == "epoch":
        return order.sampler.steps_per_epoch
    share = training.save_steps < 1
    return math.ceil(order.total_steps * training.save_steps) if share else training.save_steps


def choose_order(arguments: Arguments, store: RecordStore, lengths: Lengths, ranks: int) -> Order:
    """Return the order that the flags ask for, on so many ranks. Raises UserError where they contradict each other."""
    training, data_flags = arguments.training, arguments.data
    global_batch_size, micro_batches, note = choose_batch(arguments, ranks)
    sampler = GlobalBatchSampler(
        lengths.length.clip(min=1),  # bad records have none; they keep their place and are left out of their batch
        lengths.has_image,
        global_batch_size,
        slots=ranks * micro_batches,
        seed=training.seed,
        group_by_modality_length=data_flags.group_by_modality_length,
        recorded=json.loads(Path(data_flags.sample_order).read_text()) if data_flags.sample_order else None,
        source_sizes=store.source_sizes(),
        weights=data_flags.data_weights,
    )
    total_steps = training.max_steps
    if total_steps <= 0:
        total_steps = math.ceil(training.num_train_epochs * sampler.steps_per_epoch)
    layout = "packed" if data_flags.packing else "padded"
    if training.loss_normalization == "micro_batch":
        layout = "in_order"  # LLaVA's own micro-batches, on which its loss depends
    max_tokens = data_flags.max_tokens_per_micro_batch
    return Order(sampler, total_steps, layout, ranks, micro_batches, max_tokens, lengths.bad, note)


def choose_batch(arguments: Arguments, devices: int) -> tuple[int, int, str | None]:
    """Return global batch size and micro-batches a step for this number of devices, and a note if not the preset's.

    Without `--gradient_accumulation_steps` the global batch is kept on any number of devices, divisible or not: a
    global batch may be dealt unevenly, since the loss is normalised over all of it.
    """
    training = arguments.training
    product = training.per_device_train_batch_size * devices
    wanted = training.global_batch_size
    if training.gradient_accumulation_steps is not None:
        accumulation = training.gradient_accumulation_steps
        actual = product * accumulation
        if wanted is not None and wanted != actual:
            arithmetic = (
                f"{counted(devices, 'device')} x --per_device_train_batch_size "
                f"{training.per_device_train_batch_size} x --gradient_accumulation_steps {accumulation} = {actual}"
            )
            if "global_batch_size" in arguments.explicit:
                raise UserError(f"--global_batch_size {wanted} contradicts {arithmetic}. Leave one of them out.")
            reason = f"The global batch is {actual} instead of the preset's {wanted}: {arithmetic}."
            return actual, accumulation, reason + f" Leave the last flag out to keep {wanted}."
        return actual, accumulation, None
    wanted = wanted or product
    return wanted, -(-wanted // product), None
