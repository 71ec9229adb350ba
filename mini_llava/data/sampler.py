"""Which samples make one optimizer step, and how they are dealt over ranks and micro-batches.

Replaces LLaVA's `LengthGroupedSampler` (`llava/train/llava_trainer.py`). Its grouping rules are kept: a global batch
holds either image samples or text samples, sorted by length, and what is left over of both comes last. Its dependence
on the global random state is not: here the order is a function of (seed, epoch), the same on every rank.
How a global batch is split into micro-batches is decided separately (`deal`). The loss is normalised over the whole
global batch, so the split changes speed and memory only.

This file needs torch and nothing else of the project.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch

Permutation = Callable[[int], list[int]]


class OrderError(ValueError):
    """The order of samples that was asked for, or recorded, does not fit these samples."""


def llava_order(
    lengths: Sequence[int], has_image: Sequence[bool], slots: int, global_batch_size: int, permutation: Permutation
) -> list[int]:
    """Return the order of one epoch under LLaVA's `--group_by_modality_length`, as sample indices.

    Split into pieces of `global_batch_size`, it gives the epoch's global batches; each piece split into `slots` equal
    parts gives LLaVA's micro-batches (part k is micro-step k // ranks on rank k % ranks).

    Args:
        lengths: tokens of each sample; only their order matters. Must be positive.
        has_image: which samples are image samples.
        slots: ranks times accumulation steps.
        global_batch_size: samples in one optimizer step.
        permutation: draws a random permutation of range(n), called in LLaVA's order (image samples, text samples,
            global batches), so that recorded draws reproduce the original's order.
    """
    if len(lengths) == 0 or min(lengths) <= 0:
        raise ValueError("llava_order needs at least one sample and positive lengths.")
    images = [index for index, flag in enumerate(has_image) if flag]
    texts = [index for index, flag in enumerate(has_image) if not flag]
    if not images or not texts:
        # The original leaves the lengths of all-text data negative, which sorts and balances them the wrong way round.
        return _concatenate(_length_grouped(range(len(lengths)), lengths, slots, global_batch_size, permutation))

    image_batches = _length_grouped(images, lengths, slots, global_batch_size, permutation)
    text_batches = _length_grouped(texts, lengths, slots, global_batch_size, permutation)
    # The last batch of each modality is set aside even if it is full: the original does, and steps have to be equal.
    # Sorted, because `slots` has ordered the samples inside them, and the batches must be the same for any number.
    leftover = sorted(image_batches.pop() + text_batches.pop())
    batches = image_batches + text_batches
    return _concatenate([batches[i] for i in permutation(len(batches))]) + leftover


def _length_grouped(
    indices: Sequence[int], lengths: Sequence[int], slots: int, global_batch_size: int, permutation: Permutation
) -> list[list[int]]:
    """Return global batches of random samples, each sorted by length (longest first) and balanced over the slots."""
    shuffled = [indices[i] for i in permutation(len(indices))]
    batches = []
    for start in range(0, len(shuffled), global_batch_size):
        batch = sorted(shuffled[start : start + global_batch_size], key=lambda index: lengths[index], reverse=True)
        batches.append(_concatenate(even_chunks(batch, lengths, slots)))
    return batches


def even_chunks(batch: Sequence[int], lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Split a batch like LLaVA's `split_to_even_chunks`: equal counts, about equal sums of lengths, or strided.

    It balances work between ranks but puts long and short samples into one micro-batch, which costs padding. It is used
    for the order itself and with `--loss_normalization micro_batch`; otherwise see `deal`.
    """
    if len(batch) % slots:
        return [list(batch[slot::slots]) for slot in range(slots)]
    chunks: list[list[int]] = [[] for _ in range(slots)]
    totals: list[float] = [0] * slots
    for index in batch:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == len(batch) // slots:
            totals[shortest] = math.inf
    return chunks


def samples_an_epoch(size: int, weight: float) -> int:
    """Return how many samples of a source of this size an epoch has: weight x size, rounded."""
    return round(weight * size)


def epoch_samples(source_sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """Return the samples of an epoch in ascending order, source by source, each as often as the epoch has it.

    A source of n samples gives round(weight x n) of them: every sample floor(weight) times, and a random share once
    more. The share continues in one shuffled order of the source where the epoch before ended, so that every sample is
    taken once before any is taken again: with weight 0.5 two epochs are one pass.
    """
    samples, first = [], 0
    for source, (size, weight) in enumerate(zip(source_sizes, weights, strict=True)):
        passes, rest = divmod(samples_an_epoch(size, weight), size)
        chosen = list(range(size)) * passes
        if rest:
            digest = hashlib.blake2b(f"{seed} {source}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            turns = torch.randperm(size, generator=generator).tolist()
            chosen += [turns[(epoch * rest + place) % size] for place in range(rest)]
        samples += [first + index for index in sorted(chosen)]
        first += size
    return samples


def _concatenate(lists: Sequence[Sequence[int]]) -> list[int]:
    return [index for sublist in lists for index in sublist]


class GlobalBatchSampler:
    """Global batches as a function of (seed, epoch), and a cursor over them that is saved with a checkpoint.

    The cursor `step` counts global batches that are done, `empty_steps` those of them without a usable sample, for
    which no optimizer step was taken. The training loop moves both; prefetching (`batches`) does not, so a checkpoint
    never skips samples that were prefetched but not trained on.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        global_batch_size: int,
        slots: int = 1,
        seed: int = 42,
        group_by_modality_length: bool = True,
        recorded: list[list[int]] | None = None,
        source_sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        """
        Args:
            lengths, has_image: one entry a sample, see `llava_order`.
            slots: ranks times accumulation steps; they order the samples inside a global batch, and do not decide which
                these are.
            recorded: global batches of a recorded run, replayed in a cycle instead of an order of our own.
            source_sizes, weights: how many samples each source has, in order, and how often an epoch has them, see
                `epoch_samples`. Without weights, or if all are 1, an epoch is every sample once.
        """
        self.lengths, self.has_image = [int(length) for length in lengths], [bool(flag) for flag in has_image]
        self.global_batch_size, self.slots, self.seed = global_batch_size, slots, seed
        self.group_by_modality_length, self.recorded = group_by_modality_length, recorded
        # Without weights there is one source, so that the order is the same function of (seed, epoch) in both cases.
        is_weighted = weights is not None and any(weight != 1 for weight in weights)
        self.source_sizes = list(source_sizes or []) if is_weighted else [len(self.lengths)]
        self.weights = [float(weight) for weight in weights] if is_weighted else None
        if is_weighted and (len(self.source_sizes) != len(weights) or sum(self.source_sizes) != len(self.lengths)):
            raise OrderError(f"Weights {weights}, sources of {self.source_sizes} samples, {len(self.lengths)} in all.")
        for number, (size, weight) in enumerate(zip(self.source_sizes, self.weights or [1], strict=True), start=1):
            if samples_an_epoch(size, weight) < 1:
                raise OrderError(
                    f"Source {number} has {size} sample{'s' * (size != 1)}, of which the weight {weight} takes none: "
                    f"raise it, or leave the source out."
                )
        self.step = self.empty_steps = 0
        order = repr((self.lengths, self.has_image, recorded)).encode()
        self._lengths_digest = hashlib.blake2b(order, digest_size=8).hexdigest()
        self._cached_epoch: tuple[int, list[list[int]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        if self.recorded:
            return len(self.recorded)
        samples = sum(map(samples_an_epoch, self.source_sizes, self.weights or [1]))
        return math.ceil(samples / self.global_batch_size)

    @property
    def steps_taken(self) -> int:
        """Return the optimizer steps taken, which are the learning rate schedule's."""
        return self.step - self.empty_steps

    def global_batches(self, epoch: int) -> list[list[int]]:
        """Return all global batches of an epoch; the last may be smaller, no sample is repeated unless by weights."""
        if self.recorded:
            return self.recorded
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            draw = lambda n: torch.randperm(n, generator=generator).tolist()  # noqa: E731
            samples = epoch_samples(self.source_sizes, self.weights or [1], self.seed, epoch)
            size = self.global_batch_size
            if self.group_by_modality_length:
                lengths, has_image = ([values[i] for i in samples] for values in (self.lengths, self.has_image))
                order = llava_order(lengths, has_image, self.slots, size, draw)
            else:
                order = draw(len(samples))
            order = [samples[place] for place in order]
            self._cached_epoch = epoch, [order[start : start + size] for start in range(0, len(order), size)]
        return self._cached_epoch[1]

    def batches(self, total_steps: int):
        """Yield the global batches of the steps from the cursor to `total_steps`, across ends of epochs."""
        for step in range(self.step, total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            yield self.global_batches(epoch)[position]

    def describe_mixture(self, names: Sequence[str]) -> str | None:
        """Return how many samples of each source an epoch has; None without weights. `names`: of the sources."""
        if self.weights is None:
            return None
        sources = zip(names, self.source_sizes, self.weights, strict=True)
        parts = [f"{samples_an_epoch(size, weight):,} from the {size:,} of {name}" for name, size, weight in sources]
        return f"Records of an epoch: {', '.join(parts)}."

    def state_dict(self) -> dict[str, int | bool | str | list]:
        """Return the cursor, and what the order is a function of (except slots, which change no global batch)."""
        return {
            "step": self.step,
            "empty_steps": self.empty_steps,
            "seed": self.seed,
            "samples": len(self.lengths),
            "batch": self.global_batch_size,
            "grouped": self.group_by_modality_length,
            "lengths": self._lengths_digest,
        } | ({"weights": self.weights, "sources": self.source_sizes} if self.weights else {})

    def load_state_dict(self, state: dict[str, int | bool | str | list], order_may_differ: bool = False) -> None:
        """Set the cursor. Raises ValueError for a state of another order, unless `order_may_differ`."""
        mine = self.state_dict()
        differing = [
            f"{key} {state.get(key)} there, {mine.get(key)} here"
            for key in mine | state
            if key not in ("step", "empty_steps") and state.get(key) != mine.get(key)
        ]
        if differing and not order_may_differ:
            raise OrderError(f"The checkpoint's sample order is not this run's: {'; '.join(differing)}.")
        self.step, self.empty_steps = state["step"], state.get("empty_steps", 0)


def deal(
    batch: Sequence[int],
    lengths: Sequence[int],
    ranks: int,
    micro_batches: int,
    layout: str,
    max_tokens: int | None = None,
) -> list[list[list[int]]]:
    """Deal a global batch: `[micro-batch][rank] -> sample indices`, as many for every rank; some may be empty.

    Args:
        layout: `packed`: about equal token counts, largest sample first into the emptiest slot, for batches without
            padding. `padded`: equal sample counts, samples of similar length together, the ranks of a micro-step alike.
            `in_order`: equal counts in the order given, which for `llava_order` are LLaVA's own micro-batches.
        max_tokens: raises the number of micro-batches until no slot holds more tokens, padding included, or each holds
            a single sample.
    """
    while True:
        slots = _deal_into(batch, lengths, ranks * micro_batches, layout)
        largest = max(computed_tokens(slot, lengths, layout) for slot in slots)
        if max_tokens is None or largest <= max_tokens or max(map(len, slots)) <= 1:
            return [slots[start : start + ranks] for start in range(0, len(slots), ranks)]
        micro_batches += 1


def _deal_into(batch: Sequence[int], lengths: Sequence[int], slots: int, layout: str) -> list[list[int]]:
    size = math.ceil(len(batch) / slots)
    if layout == "in_order":
        return [list(batch[slot * size : (slot + 1) * size]) for slot in range(slots)]
    by_length = sorted(batch, key=lambda index: (-lengths[index], index))
    if layout == "padded":
        return [by_length[slot * size : (slot + 1) * size] for slot in range(slots)]
    if layout != "packed":
        raise ValueError(f"Unknown layout {layout!r}; known: packed, padded, in_order.")
    dealt: list[list[int]] = [[] for _ in range(slots)]
    totals = [0] * slots
    for index in by_length:
        emptiest = totals.index(min(totals))
        dealt[emptiest].append(index)
        totals[emptiest] += lengths[index]
    return dealt


def computed_tokens(slot: Sequence[int], lengths: Sequence[int], layout: str) -> int:
    """Return how many positions a micro-batch of these samples has, padding included."""
    if not slot:
        return 0
    return sum(lengths[i] for i in slot) if layout == "packed" else len(slot) * max(lengths[i] for i in slot)
