"""The order is a function of (seed, epoch), and dealing a global batch loses no sample."""

import json
import math
import random
from collections import Counter

import pytest
import torch

from mini_llava.data.sampler import GlobalBatchSampler, deal, epoch_samples


def samples(count: int, images: float = 0.6, seed: int = 0) -> tuple[list[int], list[bool]]:
    """Lengths and modalities of a made-up data set."""
    rng = random.Random(seed)
    return [rng.randint(5, 300) for _ in range(count)], [rng.random() < images for _ in range(count)]


def epoch(sampler: GlobalBatchSampler, number: int = 0) -> list[list[int]]:
    return sampler.global_batches(number)


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch_alone(grouped):
    lengths, has_image = samples(100)

    def order(seed, number, disturb):
        torch.manual_seed(disturb)  # the global generator has no say
        sampler = GlobalBatchSampler(lengths, has_image, 8, seed=seed, group_by_modality_length=grouped)
        if disturb:
            epoch(sampler, 5)  # nor has what was asked before
            torch.rand(3)
        return epoch(sampler, number)

    assert order(1, 2, disturb=0) == order(1, 2, disturb=3)
    assert order(1, 2, disturb=0) != order(2, 2, disturb=0)
    assert order(1, 2, disturb=0) != order(1, 3, disturb=0)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_every_sample_comes_once_in_an_epoch(count, grouped):
    sampler = GlobalBatchSampler(*samples(count), 8, slots=4, group_by_modality_length=grouped)
    for number in range(3):
        batches = epoch(sampler, number)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert len(batches) == sampler.steps_per_epoch == math.ceil(count / 8)
        assert all(len(batch) == 8 for batch in batches[:-1])


@pytest.mark.parametrize("count", [64, 100, 205])
def test_global_batches_are_of_one_modality_and_the_leftover_is_last(count):
    lengths, has_image = samples(count)
    batches = epoch(GlobalBatchSampler(lengths, has_image, 8, slots=4))
    # LLaVA sets the last batch of each modality aside, full or not; together they are the end of the epoch.
    aside = sum((sum(flag == kind for flag in has_image) - 1) % 8 + 1 for kind in (True, False))
    pure = len(batches) - math.ceil(aside / 8)
    for batch in batches[:pure]:
        assert len({has_image[index] for index in batch}) == 1
    kinds = [has_image[batch[0]] for batch in batches[:pure]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True), "image and text batches are mixed"
    leftover = [index for batch in batches[pure:] for index in batch]
    assert len(leftover) == aside and leftover == sorted(leftover)


def test_samples_of_a_global_batch_are_balanced_over_the_slots():
    lengths, has_image = samples(256, images=1.0)
    for batch in epoch(GlobalBatchSampler(lengths, has_image, 32, slots=4)):
        sums = [sum(lengths[index] for index in batch[start : start + 8]) for start in range(0, 32, 8)]
        assert max(sums) - min(sums) <= max(lengths)


@pytest.mark.parametrize("images", [0.0, 1.0])
def test_data_of_one_modality_is_no_special_case(images):
    batches = epoch(GlobalBatchSampler(*samples(30, images=images), 8, slots=2))
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]


def test_the_number_of_slots_changes_no_global_batch():
    lengths, has_image = samples(100)
    batches = [
        [sorted(batch) for batch in epoch(GlobalBatchSampler(lengths, has_image, 16, slots=slots))]
        for slots in (1, 2, 3, 8)
    ]
    assert all(other == batches[0] for other in batches)


# --- several sources -------------------------------------------------------------------------------------------------

SIZES = [40, 23, 9]


def weighted(*weights: float, **others) -> GlobalBatchSampler:
    return GlobalBatchSampler(*samples(sum(SIZES)), 8, slots=2, source_sizes=SIZES, weights=weights, **others)


@pytest.mark.parametrize("grouped", [True, False])
def test_weights_of_one_are_the_order_without_weights(grouped):
    plain = GlobalBatchSampler(*samples(sum(SIZES)), 8, slots=2, group_by_modality_length=grouped)
    equal = weighted(1.0, 1.0, 1.0, group_by_modality_length=grouped)
    assert list(equal.batches(30)) == list(plain.batches(30))
    assert equal.state_dict() == plain.state_dict()


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_has_each_source_as_often_as_its_weight_says(grouped):
    sampler = weighted(0.5, 1.0, 2.5, group_by_modality_length=grouped)
    for number in range(4):
        batches = epoch(sampler, number)
        assert all(len(batch) == 8 for batch in batches[:-1]) and len(batches) == sampler.steps_per_epoch
        times = Counter(index for batch in batches for index in batch)
        by_source = [[times[index] for index in range(first, end)] for first, end in ((0, 40), (40, 63), (63, 72))]
        assert [sum(source) for source in by_source] == [20, 23, 22]  # 22.5 is rounded to the even number
        assert set(by_source[0]) == {0, 1} and set(by_source[1]) == {1} and set(by_source[2]) == {2, 3}


@pytest.mark.parametrize("weight", [0.3, 0.5, 0.7, 1.4, 3.9])
def test_over_the_epochs_every_sample_of_a_source_comes_equally_often(weight):
    times = Counter()
    for number in range(10):
        times.update(epoch_samples([40], [weight], seed=1, epoch=number))
        assert len({times[index] for index in range(40)}) <= 2
    assert set(times.values()) == {round(10 * weight)}


def test_the_share_of_a_source_is_random_and_a_function_of_the_seed():
    chosen = [epoch_samples([40, 40], [0.5, 0.5], seed, 0) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != list(range(20)) + list(range(40, 60))
    assert [index - 40 for index in chosen[0][20:]] != chosen[0][:20], "no source follows another's draw"


def test_weights_that_leave_nothing_of_a_source_are_refused():
    with pytest.raises(ValueError, match=r"Source 3 has 9 samples, of which the weight 0\.05 takes none"):
        weighted(1, 1, 0.05)


def test_weights_and_sources_that_do_not_fit_each_other_are_refused():
    for sizes, weights in (([40, 32], [1, 2, 3]), ([40, 30], [1, 2]), (None, [2.0])):
        with pytest.raises(ValueError, match=r"72 in all"):
            GlobalBatchSampler(*samples(72), 8, source_sizes=sizes, weights=weights)


def test_a_state_of_other_weights_is_refused():
    state = weighted(1.0, 0.5, 2.0).state_dict()
    weighted(1.0, 0.5, 2.0).load_state_dict(json.loads(json.dumps(state)))
    for other in (weighted(1.0, 0.5, 1.0), weighted(1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"weights \[1.0, 0.5, 2.0\] there"):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"weights .* there, \[1.0, 0.5, 2.0\] here"):
            weighted(1.0, 0.5, 2.0).load_state_dict(other.state_dict())


# --- the cursor ------------------------------------------------------------------------------------------------------


def test_loading_ahead_does_not_move_the_cursor():
    sampler = GlobalBatchSampler(*samples(40), 8)
    ahead = sampler.batches(total_steps=12)
    for _ in range(9):
        next(ahead)
    assert sampler.step == 0 and sampler.state_dict()["step"] == 0


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("done", [0, 3, 5, 7], ids=["start", "middle", "end of an epoch", "second epoch"])
def test_a_restored_cursor_goes_on_with_the_next_global_batch(done, grouped):
    def build():
        return GlobalBatchSampler(*samples(40), 8, slots=2, seed=3, group_by_modality_length=grouped)

    whole = list(build().batches(total_steps=12))
    sampler = build()
    sampler.step = done
    restored = build()
    restored.load_state_dict(sampler.state_dict())
    assert list(restored.batches(total_steps=12)) == whole[done:]


def test_a_state_of_another_order_is_refused():
    state = GlobalBatchSampler(*samples(40), 8, seed=3).state_dict()
    for other, what in (
        (GlobalBatchSampler(*samples(40), 8, seed=4), "seed 3 there, 4 here"),
        (GlobalBatchSampler(*samples(41), 8, seed=3), "samples 40 there, 41 here"),
        (GlobalBatchSampler(*samples(40), 4, seed=3), "batch 8 there, 4 here"),
        (GlobalBatchSampler(*samples(40), 8, seed=3, group_by_modality_length=False), "grouped True there, False here"),
        (GlobalBatchSampler(*samples(40, seed=1), 8, seed=3), "lengths .* there, .* here"),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(state)


def test_a_recorded_order_is_replayed_in_a_cycle():
    recorded = [[4, 2], [0, 1], [3]]
    sampler = GlobalBatchSampler(*samples(5), 2, recorded=recorded)
    assert list(sampler.batches(total_steps=7)) == recorded * 2 + recorded[:1]


# --- dealing ---------------------------------------------------------------------------------------------------------

CUTS = [(1, 1), (1, 4), (2, 1), (2, 3), (8, 2)]  # ranks, micro-batches


@pytest.mark.parametrize("layout", ["packed", "padded", "in_order"])
@pytest.mark.parametrize("ranks, micro_batches", CUTS)
@pytest.mark.parametrize("count", [0, 1, 5, 16, 33])
def test_every_sample_is_dealt_once_and_every_rank_has_as_many_micro_batches(count, ranks, micro_batches, layout):
    lengths, _ = samples(50)
    batch = random.Random(1).sample(range(50), count)
    dealt = deal(batch, lengths, ranks, micro_batches, layout)
    assert len(dealt) == micro_batches and all(len(of_ranks) == ranks for of_ranks in dealt)
    assert sorted(index for of_ranks in dealt for slot in of_ranks for index in slot) == sorted(batch)


@pytest.mark.parametrize("layout", ["packed", "padded", "in_order"])
def test_with_fewer_samples_than_slots_some_are_empty_and_none_has_two(layout):
    lengths, _ = samples(10)
    dealt = deal([3, 1, 4], lengths, ranks=4, micro_batches=2, layout=layout)
    assert sorted(len(slot) for of_ranks in dealt for slot in of_ranks) == [0] * 5 + [1] * 3


def test_packed_slots_differ_by_no_more_than_the_longest_sample():
    lengths, _ = samples(64)
    slots = [slot for of_ranks in deal(range(64), lengths, 4, 2, "packed") for slot in of_ranks]
    totals = [sum(lengths[index] for index in slot) for slot in slots]
    assert max(totals) - min(totals) <= max(lengths)
    assert max(totals) <= 1.05 * sum(lengths) / 8  # largest first comes this close with 64 samples


def test_padded_slots_hold_samples_of_similar_length():
    lengths, _ = samples(64)
    padded = [slot for of_ranks in deal(range(64), lengths, 4, 2, "padded") for slot in of_ranks]
    assert {len(slot) for slot in padded} == {8}
    computed = sum(len(slot) * max(lengths[index] for index in slot) for slot in padded)
    assert computed <= 1.2 * sum(lengths)  # dealt in random order it would be about 1.8


def test_in_order_keeps_llavas_micro_batches():
    assert deal(range(8), [1] * 8, 2, 2, "in_order") == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize("layout", ["packed", "padded", "in_order"])
@pytest.mark.parametrize("max_tokens", [320, 700, 2000])
def test_a_token_limit_makes_more_micro_batches_until_it_holds(max_tokens, layout):
    lengths, _ = samples(40)
    dealt = deal(range(40), lengths, 2, 1, layout, max_tokens)
    assert sorted(index for of_ranks in dealt for slot in of_ranks for index in slot) == list(range(40))
    for of_ranks in dealt:
        assert len(of_ranks) == 2
        for slot in of_ranks:
            of_slot = [lengths[index] for index in slot]
            assert (sum(of_slot) if layout == "packed" else len(of_slot) * max(of_slot, default=0)) <= max_tokens


def test_a_sample_longer_than_the_limit_stands_alone():
    dealt = deal(range(4), [900, 10, 10, 10], 1, 1, "packed", max_tokens=100)
    assert [slot for of_ranks in dealt for slot in of_ranks if 0 in slot] == [[0]]


def test_an_unknown_layout_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'heap'; known: packed, padded, in_order"):
        deal([0], [1], 1, 1, "heap")
