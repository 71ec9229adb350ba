"""Logits and all gradients against `LlavaForConditionalGeneration` of transformers, given the same weights."""

import pytest
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.parity.golden import (
    FIXTURES,
    all_logits,
    as_floats,
    by_sample,
    golden_batch,
    golden_model,
    golden_samples,
    load_json,
)

RECORDS = {record["id"]: record for record in load_json("data/records.json")}
BATCHES = {
    "images": ["image_start", "image_multi_turn", "chinese_image", "letter_answer"],
    "text_only": ["text_one_turn", "text_three_turns", "accents"],
    "mixed": ["image_middle", "text_three_turns", "gpt_first_image", "newlines_and_code", "image_end"],
    "one_image": ["image_multi_turn"],
}
REFERENCE = "transformers' LlavaForConditionalGeneration"
# Any two tokens that no record contains: transformers finds the images by a token's id, and the golden vocabulary has
# no row for one more. Neither is ever looked up: features replace the one, the mask hides the other.
IMAGE_ID, PADDING_ID = 3, 4


@pytest.fixture(scope="module")
def ours(golden_projector):
    return golden_model(golden_projector)


@pytest.fixture(scope="module")
def theirs(ours):
    config = LlavaConfig(
        text_config=AutoConfig.from_pretrained(FIXTURES / "llm"),
        vision_config=AutoConfig.from_pretrained(FIXTURES / "clip"),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").float().train()
    weights = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert set(weights) == set(model.state_dict())
    model.load_state_dict(weights)
    model.model.vision_tower.requires_grad_(False)
    return model


def their_name(name):
    part, _, rest = name.partition(".")
    if part == "projector":
        number, kind = rest.split(".")
        return f"model.multi_modal_projector.linear_{int(number) // 2 + 1}.{kind}"
    if part == "vision_tower":
        return f"model.vision_tower.{rest.removeprefix('model.')}"
    return rest if rest.startswith("lm_head") else f"model.language_model.{rest.removeprefix('model.')}"


def their_inputs(samples, pixel_values):
    """The padded batch as transformers takes it: one id for images, labels where ours are."""
    rows, columns = len(samples), max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((rows, columns), PADDING_ID)
    labels = torch.full((rows, columns), IGNORE_INDEX)
    attention_mask = torch.zeros(rows, columns, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids = torch.from_numpy(sample.input_ids).long()
        assert not set(ids.tolist()) & {IMAGE_ID, PADDING_ID}
        input_ids[row, :length] = torch.where(ids == IMAGE_TOKEN_INDEX, IMAGE_ID, ids)
        labels[row, :length] = torch.from_numpy(sample.labels)
        attention_mask[row, :length] = 1
    images = {"pixel_values": as_floats(pixel_values)} if any(sample.images for sample in samples) else {}
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **images}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", BATCHES)
def test_logits_loss_and_all_gradients_are_those_of_transformers(kind, packed, ours, theirs, agree):
    samples = golden_samples([RECORDS[name] for name in BATCHES[kind]], 2048)
    batch = golden_batch(samples, packed)
    layout = "packed" if packed else "padded"
    ours.zero_grad(set_to_none=True)
    theirs.zero_grad(set_to_none=True)

    expected = theirs(**their_inputs(samples, batch["pixel_values"]), use_cache=False)
    rows = by_sample(batch, all_logits(ours, batch), samples)
    difference = max(
        float((row - logits[: len(row)]).abs().max())
        for row, logits in zip(rows, expected.logits.detach(), strict=True)
    )
    agree(f"logits at every position, {layout}", REFERENCE, difference, 1e-5)

    loss = ours(**batch) / int((batch["targets"] != IGNORE_INDEX).sum())
    agree(f"loss of a batch, {layout}", REFERENCE, abs(loss.item() - expected.loss.item()), 1e-5)
    loss.backward()
    expected.loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = their_gradients[their_name(name)]
        if not parameter.requires_grad:
            assert parameter.grad is None and gradient is None
        elif gradient is None:  # transformers leaves the projector out of text-only batches; here it is exactly zero
            assert kind == "text_only" and name.startswith("projector.") and not parameter.grad.any()
        else:
            difference = float((parameter.grad - gradient).norm() / gradient.norm())
            agree(f"gradient of each parameter, relative, {layout}", REFERENCE, difference, 1e-5)
