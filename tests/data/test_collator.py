"""A micro-batch is its samples and nothing else: nothing crosses from one to the next, nothing real is masked."""

import numpy as np
import pytest
import torch

from mini_llava.data.collator import collate
from mini_llava.data.images import Picture
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample

SIZE = 8  # of the images


def sample(length: int, trained: range, images: range = range(0), first: int = 10) -> Sample:
    """Ids count up from `first`; each image takes three positions from position 1 on, its pixels are its number."""
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = np.full(length, IGNORE_INDEX, np.int32)
    labels[trained.start : trained.stop] = ids[trained.start : trained.stop]
    ids[1 : 1 + 3 * len(images)] = IMAGE_TOKEN_INDEX
    pictures = [Picture(torch.full((1, 3, SIZE, SIZE), n, dtype=torch.uint8), features=3) for n in images]
    return Sample(ids, labels, [f"{n}.png" for n in images], pictures)


SAMPLES = [
    sample(9, range(6, 9), images=range(1), first=100),
    sample(4, range(2, 4), first=200),  # trained to its last token, so what follows must not be its target
    sample(12, range(0, 12), images=range(1, 3), first=300),  # trained from its first token, which nothing predicts
]


def targets_by_id(batch) -> dict[int, int]:
    """Input id -> the id to predict there, over all rows and positions."""
    ids = batch["input_ids"][:, batch["logit_positions"]]
    pairs = zip(ids.flatten().tolist(), batch["targets"].flatten().tolist(), strict=True)
    return {token: target for token, target in pairs if target != IGNORE_INDEX}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_shapes_and_dtypes_are_those_the_model_takes(packed):
    batch = collate(SAMPLES, SIZE, packed)
    rows, columns = (1, 25) if packed else (3, 12)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (rows, columns)
    assert batch["targets"].shape == (rows, len(batch["logit_positions"]))
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE) and batch["pixel_values"].dtype == torch.uint8
    assert batch["max_seqlen"] == 12
    for key in ("input_ids", "position_ids", "image_positions", "logit_positions", "targets"):
        assert batch[key].dtype == torch.int64 and batch[key].is_contiguous()
    if packed:
        assert batch["attention_mask"] is None
        assert batch["cu_seqlens"].dtype == torch.int32 and batch["cu_seqlens"].tolist() == [0, 9, 13, 25]
    else:
        assert batch["cu_seqlens"] is None
        assert batch["attention_mask"].dtype == torch.bool
        assert batch["attention_mask"].sum(dim=1).tolist() == [9, 4, 12]
        assert batch["attention_mask"][1].tolist() == [True] * 4 + [False] * 8  # padded on the right


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_every_token_but_a_samples_first_is_the_target_of_the_one_before_it(packed):
    batch = collate(SAMPLES, SIZE, packed)
    # The labels of the third sample's image positions are ids here, to see that targets come from labels; its first
    # token has no predecessor, so 11 of 12 are left. Ids of image positions are 0.
    text = {106 - 1: 106, 106: 107, 107: 108} | {201: 202, 202: 203} | {n: n + 1 for n in range(307, 311)}
    found = targets_by_id(batch)
    assert {token: found[token] for token in text} == text
    assert 203 not in found and 108 not in found and 311 not in found  # the last token of a sample predicts nothing
    assert int((batch["targets"] != IGNORE_INDEX).sum()) == 3 + 2 + 11


def test_packed_positions_begin_anew_with_each_sample():
    batch = collate(SAMPLES, SIZE, packed=True)
    assert batch["position_ids"][0].tolist() == [*range(9), *range(4), *range(12)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_image_positions_point_at_the_placeholders_in_the_order_of_the_images(packed):
    batch = collate(SAMPLES, SIZE, packed)
    third = 13 if packed else 2 * 12
    assert batch["image_positions"].tolist() == [1, 2, 3, *range(third + 1, third + 7)]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert IMAGE_TOKEN_INDEX not in batch["input_ids"]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_ids_0_and_the_eos_are_never_taken_for_padding(packed):
    zeros = Sample(np.zeros(5, np.int32), np.zeros(5, np.int32), [])
    batch = collate([zeros, SAMPLES[1]], SIZE, packed)
    assert int((batch["targets"] == 0).sum()) == 4
    if not packed:
        assert batch["attention_mask"][0].all()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_only_columns_with_something_to_predict_ask_for_logits(packed):
    batch = collate(SAMPLES[:2], SIZE, packed)
    assert batch["logit_positions"].tolist() == ([5, 6, 7, 10, 11] if packed else [1, 2, 5, 6, 7])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_without_images_one_blank_image_goes_nowhere(packed):
    batch = collate([SAMPLES[1]], SIZE, packed)
    assert batch["pixel_values"].shape == (1, 3, SIZE, SIZE) and not batch["pixel_values"].any()
    assert batch["image_positions"].shape == (0,)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_no_samples_make_a_batch_that_runs_and_trains_nothing(packed):
    batch = collate([], SIZE, packed)
    assert batch["input_ids"].shape == (1, 1) and batch["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert batch["logit_positions"].tolist() == [0] and batch["targets"].tolist() == [[IGNORE_INDEX]]
    if packed:
        assert batch["cu_seqlens"].tolist() == [0, 1]
