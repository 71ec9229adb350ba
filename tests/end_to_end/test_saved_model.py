"""What stage 2 saves computes in transformers' own class what the trainer's model computed when it was saved."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mini_llava import build
from mini_llava.data.collator import collate
from mini_llava.data.images import ImageReader, normalise
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, Sample, tokenize, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor
from mini_llava.image_files import load_image
from tests.end_to_end import runs

# Both compute in fp32 with the same kernels; logits are of size 1 to 10.
TOLERANCE = dict(rtol=0, atol=1e-5)
IMAGE_TOKENS, IMAGE_SIZE = 16, 56
IMAGE_FOLDER = runs.FIXTURES / "data" / "images"
WITH_IMAGE, WITHOUT = runs.RECORDS[runs.IMAGES[0]], runs.RECORDS[runs.TEXTS[0]]
SEVERAL = {
    "image": ["wide_rgb.png", "square_rgb.png", "tall_rgb.png"],
    "conversations": [
        {"from": "human", "value": "<image> and <image> or\n<image>"},
        {"from": "gpt", "value": "The first."},
    ],
}
KINDS = {"image": WITH_IMAGE, "text only": WITHOUT, "several images": SEVERAL}
OF_ALL_KINDS = pytest.mark.parametrize("record", KINDS.values(), ids=KINDS)


def images_of(record: dict) -> list[str]:
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the trainer's model after three steps with every part trained, transformers' from the files, their processor)"""
    output_dir, kept, load = tmp_path_factory.mktemp("stage2"), [], build.load_llava
    with pytest.MonkeyPatch.context() as patch:
        # The real model; the test keeps hold of it.
        patch.setattr(build, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        values = {"max_steps": 3, "learning_rate": 1e-2, "global_batch_size": 8, "unfreeze_mm_vision_tower": True}
        runs.train_here(runs.flags_of(2, output_dir, values))
    saved, loading = LlavaForConditionalGeneration.from_pretrained(output_dir, output_loading_info=True)
    assert not any(loading.values()), loading
    assert saved.dtype == torch.float32
    return kept[0].eval(), saved.eval(), AutoProcessor.from_pretrained(output_dir, use_fast=False)


def textual() -> dict:
    tokenizer = load_tokenizer(runs.FIXTURES / "llm")
    return dict(template=get_template("v1"), tokenizer=tokenizer, tokens_per_image=IMAGE_TOKENS)


def trainer_inputs(ids: np.ndarray, record: dict) -> dict:
    """The micro-batch that training would make of these ids."""
    names = images_of(record)
    reader = ImageReader(IMAGE_TOKENS, load_image_processor(str(runs.FIXTURES / "clip")), "pad", IMAGE_SIZE)
    pictures = [reader.open(IMAGE_FOLDER, name) for name in names]
    sample = Sample(ids, np.where(ids == IMAGE_TOKEN_INDEX, -100, ids), names, pictures)
    return collate([sample], IMAGE_SIZE, packed=False)


def float_values(model, batch: dict) -> torch.Tensor:
    return normalise(batch["pixel_values"], model.vision_tower.pixel_table)


@torch.no_grad()
def trainer_logits(model, batch: dict) -> torch.Tensor:
    """At every position, out of the model's own forward."""
    seen = []
    hook = model.language_model.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    model(**{**batch, "logit_positions": torch.arange(batch["input_ids"].shape[1]), "targets": batch["input_ids"]})
    hook.remove()
    return seen[0]


@OF_ALL_KINDS
def test_transformers_gives_the_trainers_logits_for_the_trainers_ids(trained, record):
    model, saved, _ = trained
    ids = tokenize(record, max_length=512, **textual()).input_ids
    batch = trainer_inputs(ids, record)
    expected = trainer_logits(model, batch)

    ids = torch.from_numpy(np.where(ids == IMAGE_TOKEN_INDEX, saved.config.image_token_id, ids).astype(np.int64))[None]
    assert (ids == saved.config.image_token_id).sum() == IMAGE_TOKENS * len(images_of(record))
    pixels = {"pixel_values": float_values(model, batch)} if "image" in record else {}
    with torch.no_grad():
        found = saved(input_ids=ids, **pixels).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, **TOLERANCE)


@OF_ALL_KINDS
def test_the_saved_processor_and_chat_template_lead_to_the_trainers_logits(trained, record):
    """From messages and an image file, as somebody asks who knows transformers only, up to the first answer."""
    model, saved, processor = trained
    question, content = record["conversations"][0]["value"], []
    images = [load_image(str(IMAGE_FOLDER), name) for name in images_of(record)] or None
    if isinstance(record.get("image"), str):  # whose mark moves to the front
        content, question = [{"type": "image"}], question.replace("<image>", "").strip()
    content.append({"type": "text", "text": question})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=images, return_tensors="pt")

    first_question = copy.deepcopy(record) | {"conversations": record["conversations"][:1]}
    ids = tokenize_prompt(first_question, **textual())
    batch = trainer_inputs(ids, record)
    replaced = np.where(ids == IMAGE_TOKEN_INDEX, saved.config.image_token_id, ids)
    assert inputs["input_ids"][0].tolist() == replaced.tolist()
    if images is not None:
        torch.testing.assert_close(inputs["pixel_values"], float_values(model, batch), rtol=0, atol=0)
    with torch.no_grad():
        found = saved(**inputs).logits
    expected = trainer_logits(model, batch)
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, **TOLERANCE)


def test_it_generates(trained):
    _, saved, processor = trained
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    image = load_image(str(IMAGE_FOLDER), WITH_IMAGE["image"])
    inputs = processor(text=text, images=image, return_tensors="pt")
    answer = saved.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
