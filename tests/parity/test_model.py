"""Merged labels and positions, logits, loss and gradients against LLaVA c121f04 (fixtures/model_cases.json)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mini_llava.data.templates import BadRecord
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample
from tests.parity.golden import (
    FIXTURES,
    IMAGE_TOKENS,
    LLAVA,
    all_logits,
    by_sample,
    golden_batch,
    golden_model,
    golden_pixels,
    golden_samples,
    llava_name,
    load_json,
)

RECORDED = load_json("model_cases.json")
RECORDS = {record["id"]: record for record in load_json("data/records.json")}
# The original masks all of these: it splits the first at a role inside the answer and loses count, and it masks the
# answers of the second because a question follows them. The intended labels are in test_tokenization.py; here the
# original's are put in their place, in order to compare the model on them.
MASKED_BY_THE_ORIGINAL = ("assistant_in_answer", "human_last_image")
# The original keeps a sample whose answers are all cut off, and trains on nothing in it; here it is refused.
NOTHING_LEFT = ("mixed_truncated", "letter_answer")

CASES = pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@pytest.fixture(scope="module")
def tensors():
    return load_file(FIXTURES / "model_cases.safetensors")


@pytest.fixture(scope="module")
def model(golden_projector):
    return golden_model(golden_projector)


def samples_of(case):
    samples = []
    for name in case["records"]:
        if (case["name"], name) == NOTHING_LEFT:
            with pytest.raises(BadRecord, match="nothing to train on is left"):
                golden_samples([RECORDS[name]], case["model_max_length"])
            whole = golden_samples([RECORDS[name]], 2048)[0]
            end = case["model_max_length"]
            samples.append(Sample(whole.input_ids[:end], whole.labels[:end], whole.images))
            continue
        samples += golden_samples([RECORDS[name]], case["model_max_length"])
        if name in MASKED_BY_THE_ORIGINAL:
            assert (samples[-1].labels != IGNORE_INDEX).any()
            samples[-1].labels[:] = IGNORE_INDEX
    return samples


@CASES
def test_merged_labels_and_mask_are_llavas(case, tensors, agree):
    samples = samples_of(case)
    batch = golden_batch(samples, packed=False)
    merged = tensors[f"{case['name']}.merged_labels"].long()
    assert list(batch["input_ids"].shape) == list(merged.shape) == case["merged_shape"]
    labels = torch.full_like(merged, IGNORE_INDEX)
    for row, sample in zip(labels, samples, strict=True):
        row[: len(sample.labels)] = torch.from_numpy(sample.labels)
    agree("merged labels", LLAVA, int((labels != merged).sum()), 0)
    mask = tensors[f"{case['name']}.merged_attention_mask"].bool()
    agree("merged attention mask", LLAVA, int((batch["attention_mask"] != mask).sum()), 0)

    # What the model is asked to predict are the same labels, moved by one, in the columns that have any.
    predicted = torch.full_like(merged, IGNORE_INDEX)
    predicted[:, batch["logit_positions"]] = batch["targets"]
    assert predicted[:, :-1].equal(merged[:, 1:]) and (predicted[:, -1] == IGNORE_INDEX).all()
    assert int((predicted != IGNORE_INDEX).sum()) == case["trained_tokens"]


@CASES
def test_merged_ids_and_positions_are_llavas(case, tensors, agree):
    batch = golden_batch(samples_of(case), packed=False)
    is_image = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    is_image[batch["image_positions"]] = True
    ours = torch.where(is_image.view_as(batch["input_ids"]), IMAGE_TOKEN_INDEX, batch["input_ids"])
    collated, lengths = tensors[f"{case['name']}.input_ids"], tensors[f"{case['name']}.attention_mask"].sum(1)
    differing = 0
    for row, ids, length in zip(ours, collated, lengths.tolist(), strict=True):
        ids = ids[:length].numpy()
        # A placeholder gives way to its features: their number of positions instead of one.
        merged = np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, IMAGE_TOKENS, 1))[: case["model_max_length"]]
        differing += int((row[: len(merged)].numpy() != merged).sum())
    agree("merged ids and places of the images", LLAVA, differing, 0)
    # LLaVA passes no positions, so that its language model counts them from 0 in every row.
    assert batch["position_ids"].equal(torch.arange(ours.shape[1]).expand_as(ours))


@CASES
def test_embeddings_hold_the_features_in_their_places(case, model, agree):
    batch = golden_batch(samples_of(case), packed=False)
    with torch.no_grad():
        embeddings = model.embed(batch["input_ids"], batch["pixel_values"], batch["image_positions"])
    sums = (embeddings.double().abs().sum(-1) * batch["attention_mask"]).sum(-1)
    expected = torch.tensor(case["inputs_embeds_abs_sum"], dtype=torch.float64)
    agree("sum of embeddings, relative", LLAVA, float(((sums - expected) / expected).abs().max()), 1e-6)


def test_vision_features_and_projected_features_are_llavas(model, tensors, agree):
    with torch.no_grad():
        features = model.vision_tower(torch.stack(golden_pixels(RECORDED["vision_images"])))
        projected = model.projector(features)
    agree("vision features", LLAVA, float((features - tensors["vision.features"]).abs().max()), 1e-5)
    agree("projected features", LLAVA, float((projected - tensors["vision.projected"]).abs().max()), 1e-5)


@LAYOUTS
@CASES
def test_logits_are_llavas(case, packed, model, tensors, agree):
    samples, name = samples_of(case), case["name"]
    batch = golden_batch(samples, packed)
    logits = by_sample(batch, all_logits(model, batch), samples)
    layout = "packed" if packed else "padded"
    ours = torch.stack([logits[sample][position] for sample, position in case["logits_at"]])
    agree(f"logits, {layout}", LLAVA, float((ours - tensors[f"{name}.logits"]).abs().max()), 1e-5)
    for row, expected in zip(logits, tensors[f"{name}.logsumexp"], strict=True):
        difference = float((row.logsumexp(-1) - expected[: len(row)]).abs().max())
        agree(f"logsumexp of the logits at every position, {layout}", LLAVA, difference, 1e-5)


@LAYOUTS
@CASES
def test_loss_and_every_gradient_are_llavas(case, packed, model, agree):
    batch = golden_batch(samples_of(case), packed)
    trained_tokens = int((batch["targets"] != IGNORE_INDEX).sum())
    assert trained_tokens == case["trained_tokens"]
    model.zero_grad(set_to_none=True)
    loss = model(**batch) / max(trained_tokens, 1)
    loss.backward()
    layout = "packed" if packed else "padded"
    if case["loss_is_nan"]:
        # The original divides by no tokens at all and logs NaN; its gradients are 0 as they are here.
        assert loss.item() == 0
    else:
        agree(f"loss of a batch, {layout}", LLAVA, abs(loss.item() - case["loss"]), 1e-5)

    norms = {llava_name(name): p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    assert set(norms) == set(case["grad_norm"])
    for name, expected in case["grad_norm"].items():
        if expected == 0:  # of text-only batches: zero and not absent, since AdamW then still decays its moments
            assert norms[name] == 0, name
        else:
            difference = abs(norms[name] - expected) / expected
            agree(f"gradient norm of each parameter, relative, {layout}", LLAVA, difference, 1e-5)
