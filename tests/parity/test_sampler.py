"""The order of samples against LLaVA's `LengthGroupedSampler`, recorded with its draws in fixtures/sampler.json."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_llava.data.sampler import GlobalBatchSampler, deal, even_chunks, llava_order
from tests.parity.golden import LLAVA, load_json

RECORDED = load_json("sampler.json")
# all_text_32: the original leaves the lengths of all-text data negative, so that it sorts each global batch shortest
# first and gives the next sample to the rank with the most tokens. The batches are the same, their inner order is not.
WRONG_WAY_ROUND = "all_text_32"
# has_a_zero_length: the original dies with an AssertionError; here a sentence says why.
REFUSED = "has_a_zero_length"
CASES = {case["name"]: case for case in RECORDED["cases"]}
REPLAYED = [case for name, case in CASES.items() if name not in (WRONG_WAY_ROUND, REFUSED)]


def replayed_order(case, lengths=None):
    """Our order with the original's permutations in place of random ones; all of them must be asked for."""
    lengths = lengths or case["lengths"]
    draws = iter(case["draws"])

    def permutation(n):
        draw = next(draws)
        assert draw["n"] == n, draw["of"]
        return draw["permutation"]

    slots = case["world"] * case["accumulation"]
    has_image = [length > 0 for length in lengths]
    order = llava_order([abs(n) for n in lengths], has_image, slots, case["global_batch"], permutation)
    assert next(draws, None) is None
    return order


def cut(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case["name"])
def test_the_order_is_llavas_when_its_permutations_are_replayed(case, agree):
    order = replayed_order(case)
    differing = sum(ours != theirs for ours, theirs in zip(order, case["order"], strict=True))
    agree("order of samples, permutations replayed", LLAVA, differing, 0)
    assert [sorted(batch) for batch in cut(order, case["global_batch"])] == case["global_batches"]


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case["name"])
def test_dealt_in_order_every_full_batch_gives_llavas_micro_batches(case):
    """The original fills a short last batch with the first samples of the epoch again; here no sample comes twice."""
    world, accumulation = case["world"], case["accumulation"]
    lengths = [abs(length) for length in case["lengths"]]
    full = [batch for batch in cut(case["order"], case["global_batch"]) if len(batch) == case["global_batch"]]
    dealt = [step for batch in full for step in deal(batch, lengths, world, accumulation, "in_order")]
    for rank in range(world):
        expected = case["micro_batches_per_rank"][rank][: len(full) * accumulation]
        assert [of_ranks[rank] for of_ranks in dealt] == expected


def test_all_text_data_is_sorted_longest_first_like_everything_else():
    """The original leaves the lengths of all-text data negative and sorts and balances them the wrong way round."""
    case = CASES[WRONG_WAY_ROUND]
    order = replayed_order(case)
    assert [sorted(batch) for batch in cut(order, case["global_batch"])] == case["global_batches"]
    assert order == replayed_order(case, lengths=[-length for length in case["lengths"]])  # as if all were images
    assert order != case["order"]
    for batch in cut(order, 8):
        for half in cut(batch, 4):
            lengths = [abs(case["lengths"][index]) for index in half]
            assert lengths == sorted(lengths, reverse=True)


def test_a_length_of_zero_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="positive lengths"):
        replayed_order({**CASES[REFUSED], "world": 1, "accumulation": 1, "global_batch": 4, "draws": []})


@pytest.mark.parametrize("case", RECORDED["split_to_even_chunks"], ids=lambda case: f"{len(case['indices'])}_samples")
def test_the_even_split_is_llavas(case, agree):
    ours = even_chunks(case["indices"], case["lengths"], case["chunks"])
    agree("even split of a global batch", LLAVA, sum(a != b for a, b in zip(ours, case["out"], strict=True)), 0)


@pytest.mark.parametrize("name", ["batch4", "batch4_accumulation2", "batch8"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_recorded_runs_have_the_order_that_their_draws_give(stage, name, agree):
    curve = load_json(f"curves/stage{stage}_{name}.json")
    slots = curve["arguments"]["gradient_accumulation_steps"]
    size = curve["arguments"]["per_device_train_batch_size"] * slots
    records = load_json(curve["data"])
    # LLaVA measures text in words, ours in tokens: what is compared is the rule.
    words = [sum(len(turn["value"].split()) for turn in record["conversations"]) for record in records]
    has_image = ["image" in record for record in records]
    draws = iter(curve["sampler_draws"])
    order = []
    for _ in range(curve["arguments"]["num_train_epochs"]):
        if stage == 1:
            order += next(draws)
        else:
            order += llava_order(words, has_image, slots, size, lambda n: next(draws))
    recorded = [index for step in curve["steps"] for micro in step["micro_batches"] for index in micro["records"]]
    differing = sum(ours != theirs for ours, theirs in zip(order, recorded, strict=True))
    agree("order of samples, permutations replayed", LLAVA, differing, 0)


MIXED = CASES["mixed_64_world2_accumulation2"]
LENGTHS = [abs(length) for length in MIXED["lengths"]]
HAS_IMAGE = [length > 0 for length in MIXED["lengths"]]


@settings(deadline=None, max_examples=200)
@given(
    samples=st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=1, max_size=80),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    per_device=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 5),
)
def test_our_own_draws_follow_the_same_grouping_rules(samples, ranks, accumulation, per_device, seed, epoch):
    lengths, has_image = [length for length, _ in samples], [flag for _, flag in samples]
    slots, size = ranks * accumulation, ranks * accumulation * per_device
    batches = GlobalBatchSampler(lengths, has_image, size, slots, seed).global_batches(epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(samples)))
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size
    images, texts = sum(has_image), len(samples) - sum(has_image)
    # LLaVA sets the last batch of each modality aside, even if it is full, and puts both at the end, by index.
    aside = sum((count - 1) % size + 1 for count in (images, texts)) if images and texts else 0
    order = [index for batch in batches for index in batch]
    tail = order[len(order) - aside :]
    assert tail == sorted(tail)
    for batch in cut(order[: len(order) - aside], size):
        assert len({has_image[index] for index in batch}) == 1
        if len(batch) == size:
            for slot in cut(batch, per_device):
                assert all(lengths[a] >= lengths[b] for a, b in pairwise(slot))


def test_the_order_is_a_function_of_seed_and_epoch_and_of_nothing_else():
    def order(seed, epoch):
        return GlobalBatchSampler(LENGTHS, HAS_IMAGE, 16, 4, seed).global_batches(epoch)

    torch.manual_seed(0)
    first = order(3, 1)
    torch.manual_seed(1)
    torch.rand(100)
    state = torch.get_rng_state()
    assert order(3, 1) == first
    assert torch.equal(torch.get_rng_state(), state), "the order takes from the global generator"
    distinct = {json.dumps(order(seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(distinct) == 64


def test_the_cut_into_ranks_changes_no_global_batch():
    batches = [
        [sorted(batch) for batch in GlobalBatchSampler(LENGTHS, HAS_IMAGE, 16, slots, 3).global_batches(0)]
        for slots in (1, 2, 4, 8, 16)
    ]
    assert all(other == batches[0] for other in batches)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 9])
def test_after_resume_comes_the_next_global_batch_however_far_was_loaded_ahead(done):
    uninterrupted = list(GlobalBatchSampler(LENGTHS, HAS_IMAGE, 16, 4, 3).batches(12))
    first = GlobalBatchSampler(LENGTHS, HAS_IMAGE, 16, 4, 3)
    ahead = first.batches(12)
    for _ in range(done):
        next(ahead)
        first.step += 1
    if done < 10:
        next(ahead), next(ahead)  # loaded, but never trained on
    resumed = GlobalBatchSampler(LENGTHS, HAS_IMAGE, 16, 4, 3)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(resumed.batches(12)) == uninterrupted[done:]
