"""A model whose images come in tiles: one loss however its batches are cut, and the same logits in transformers."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mini_llava.arguments import DataArguments, ModelArguments
from mini_llava.data.collator import collate, join_pictures
from mini_llava.data.images import ImageReader, normalisation_table
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize
from mini_llava.formats import write
from mini_llava.formats.read import load_llava, open_source
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor, load_vision_tower
from mini_llava.model.llava import LlavaModel
from mini_llava.model.projector import build_projector
from mini_llava.options.tiles import ImageNewline, choose_tiling
from mini_llava.tools import chat, doctor, export
from mini_llava.tools.saved_models import open_saved
from mini_llava.watch.flops import FlopCounter
from tests.end_to_end import runs
from tests.launching import ROOT
from tests.model.tiny_towers import save_tower

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
IMAGES = FIXTURES / "data" / "images"
TILE, GRID = 56, 4
# Uneven, so that width and height are not exchanged unseen.
PINPOINTS = [(TILE, 2 * TILE), (3 * TILE, TILE), (2 * TILE, 2 * TILE)]
WIDE, TALL, SQUARE = "wide_rgb.png", "tall_rgb.png", "square_rgb.png"


def record(images: list[str], question: str, answer: str = "It is a red one.") -> dict:
    return {"image": images, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


RECORDS = [
    record([WIDE], "<image>\nWhat is it?"),
    record([], "Name a colour."),
    record([TALL, SQUARE], "Is <image> like <image>?", "No."),
    record([SQUARE], "<image>\nAnd this?"),
]


def build(merge_type: str = "spatial_unpad") -> LlavaModel:
    tower = load_vision_tower(str(FIXTURES / "clip"), -2, "patch", torch.float32)
    language_model = AutoModelForCausalLM.from_pretrained(FIXTURES / "llm", dtype=torch.float32)
    torch.manual_seed(0)
    tiling = choose_tiling(TILE, GRID**2, merge_type, PINPOINTS)
    newline = ImageNewline(64) if tiling.has_newline else None
    model = LlavaModel(tower, build_projector("mlp2x_gelu", 32, 64), language_model, newline, tiling).eval()
    model.vision_tower.pixel_table = normalisation_table(load_image_processor(FIXTURES / "clip"))
    model.vision_tower.requires_grad_(False)
    return model


def textual() -> dict:
    return dict(template=get_template("v1"), tokenizer=load_tokenizer(FIXTURES / "llm"))


def prompt(question: str) -> str:
    return "".join(piece for piece, _ in textual()["template"].render([question], [], generation_prompt=True))


def batch_of(model: LlavaModel, records: list[dict], packed: bool) -> dict:
    """As training makes it."""
    reader = ImageReader(GRID**2, load_image_processor(FIXTURES / "clip"), "anyres", TILE, model.tiling)
    to_sample = partial(tokenize, tokens_per_image=partial(reader.tokens, IMAGES), max_length=500, **textual())
    samples = [to_sample(each) for each in records]
    for sample in samples:
        sample.pictures = [reader.open(IMAGES, name, sample.several) for name in sample.images]
    return collate(samples, TILE, packed)


def loss_and_gradients(model: LlavaModel, batches: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(model(**batch) for batch in batches)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_packed_padded_and_one_by_one_give_the_same_loss_and_gradients(merge_type):
    model = build(merge_type)
    alone = [batch_of(model, [each], packed=False) for each in RECORDS]
    loss, gradients = loss_and_gradients(model, alone)
    assert ("image_newline.weight" in gradients) == (merge_type == "spatial_unpad")
    for packed in (True, False):
        found, found_gradients = loss_and_gradients(model, [batch_of(model, RECORDS, packed)])
        # fp32 sums in another order, over losses of size 100 and gradients of size 1.
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


def test_without_images_the_gradient_of_the_newline_is_zero_and_not_absent():
    model = build()
    for records in ([RECORDS[1]], []):
        _, gradients = loss_and_gradients(model, [batch_of(model, records, packed=True)])
        assert not gradients["image_newline.weight"].any() and not gradients["projector.0.weight"].any()


def test_a_tile_costs_what_an_image_costs():
    model = build()
    count = FlopCounter(model)
    batch = batch_of(model, [RECORDS[0]], packed=True)
    tiles = len(batch["pixel_values"])
    assert tiles == 4 and len(batch["image_positions"]) != tiles * GRID**2
    without = count(batch | {"image_positions": batch["image_positions"][:0]})
    assert count(batch) - without == tiles * count.per_image


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The trainer's model in transformers' layout and in LLaVA's, written from the model and from each other."""
    folder, model = tmp_path_factory.mktemp("saved"), build()
    for layout in ("transformers", "llava"):
        write.save_whole_model(
            folder / layout,
            model,
            write.Description(
                projector_type="mlp2x_gelu",
                vision_tower_name=str(FIXTURES / "clip"),
                image_aspect_ratio="anyres",
                model_max_length=500,
                version="v1",
                **textual(),
                image_processor=load_image_processor(FIXTURES / "clip"),
                export_format=layout,
                dtype=torch.float32,
            ),
        )
    to_llava = ["--export_format", "llava", "--vision_tower", str(FIXTURES / "clip")]
    export.main([str(folder / "transformers"), str(folder / "llava from transformers"), *to_llava])
    export.main([str(folder / "llava"), str(folder / "transformers from llava")])
    return folder, model


def tiling_of_the_doctor(model, tower, *words):
    words = ["--model_name_or_path", str(model), "--vision_tower", str(tower), "--data_path", "r.json", *words]
    return doctor._tokens_of_tower(doctor.parse_arguments(words))[1]


@pytest.mark.parametrize("layout", ["transformers", "llava", "llava from transformers", "transformers from llava"])
def test_every_layout_brings_back_weights_and_tiles(saved, layout):
    folder, model = saved
    found = open_saved(str(folder / layout))
    assert found.image_aspect_ratio() == "anyres" and found.source.tiling == model.tiling
    assert tiling_of_the_doctor(folder / layout, FIXTURES / "clip") == model.tiling
    loaded, expected = found.load(torch.float32).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():  # transformers' layout has more rows, for <image>
        assert torch.equal(loaded[name][: len(tensor)] if tensor.dim() else loaded[name], tensor), name


@pytest.mark.parametrize("layout", ["transformers", "transformers from llava"])
@pytest.mark.parametrize("asked", RECORDS, ids=["wide", "text only", "two images", "square"])
def test_transformers_gives_the_trainers_ids_and_logits(saved, layout, asked):
    """From a text and image files, as somebody asks who knows transformers only."""
    folder, model = saved
    whole, loading = LlavaNextForConditionalGeneration.from_pretrained(folder / layout, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(folder / layout, use_fast=False)
    images = [Image.open(IMAGES / name) for name in asked["image"]]
    text = "<s> " + prompt(asked["conversations"][0]["value"])  # as the chat template writes it; no tokenizer adds it
    inputs = processor(text=text, images=images or None, return_tensors="pt")

    to_ids = partial(tokenize, tokens_per_image=partial(model.tiling.tokens, IMAGES), max_length=500, **textual())
    ids = to_ids(asked).input_ids[: inputs["input_ids"].shape[1]]
    replaced = np.where(ids == IMAGE_TOKEN_INDEX, whole.config.image_token_id, ids)
    assert inputs["input_ids"][0].tolist() == replaced.tolist()
    batch = batch_of(model, [asked], packed=False)
    seen = []
    hook = model.language_model.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    with torch.no_grad():
        model(**{**batch, "logit_positions": torch.arange(len(ids)), "targets": batch["input_ids"][:, : len(ids)]})
        found = whole.eval()(**inputs).logits
    hook.remove()
    assert seen[0].std() > 0.3
    # The same kernels in fp32, logits up to 10.
    torch.testing.assert_close(found[..., : seen[0].shape[-1]], seen[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_transformers_gives_the_logits_of_other_towers(kind, tmp_path):
    tower = save_tower(kind, tmp_path / "tower")
    flags = ModelArguments(model_name_or_path=str(FIXTURES / "llm"), vision_tower=tower, image_size=42)
    flags.mm_projector_type, flags.mm_vision_select_layer = "mlp2x_gelu", -2
    source = open_source(flags, (), DataArguments(image_aspect_ratio="anyres"))
    model = load_llava(source, "sdpa", dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32))
    described = write.Description("mlp2x_gelu", tower, "anyres", 500, dtype=torch.float32)
    described.tokenizer, described.image_processor = textual()["tokenizer"], source.image_processor()
    write.save_transformers(tmp_path / "saved", model.eval(), described)
    whole, loading = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(loading.values()), loading
    picture = Image.open(IMAGES / WIDE)
    saved_processor = AutoProcessor.from_pretrained(tmp_path / "saved", use_fast=False)
    inputs = saved_processor(text="<image>\nWhat?", images=picture, return_tensors="pt")
    ids, opened = inputs["input_ids"], model.tiling.open(picture, described.image_processor.resample)
    places = (ids[0] == whole.config.image_token_id).nonzero().flatten()
    with torch.no_grad():
        embeddings = model.embed(ids.where(ids < 800, 0), opened.pixels, places, join_pictures([opened], 42)[1])
        expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        found = whole.eval()(**inputs).logits[..., :800]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the same kernels in fp32, logits up to 10


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_the_chat_answers_as_transformers_does(saved, layout):
    folder, _ = saved
    conversation = chat.Conversation(open_saved(str(folder / layout)), torch.float32, "cpu", {"max_new_tokens": 8})
    for name in (WIDE, SQUARE):
        conversation.add_image(str(IMAGES / name))
    answer = conversation.ask("Are <image> and <image> the same?")

    whole = LlavaNextForConditionalGeneration.from_pretrained(folder / "transformers")
    processor = AutoProcessor.from_pretrained(folder / "transformers", use_fast=False)
    text = "<s> " + prompt("Are <image> and <image> the same?")
    images = [Image.open(IMAGES / name) for name in (WIDE, SQUARE)]
    inputs = processor(text=text, images=images, return_tensors="pt")
    output = whole.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(output, skip_special_tokens=True).strip() and answer


def test_layouts_that_cannot_express_it_say_so(saved, tmp_path, capsys):
    folder, _ = saved
    with pytest.raises(SystemExit, match="was trained with --image_aspect_ratio anyres: leave the flag out"):
        export.main([str(folder / "llava"), str(tmp_path / "out"), "--image_aspect_ratio", "pad"])
    model = build("spatial")
    assert "spatial_unpad only, not spatial" in write.why_not_transformers("mlp2x_gelu", model)


# --- LLaVA-OneVision's -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_vision(tmp_path_factory):
    """(directory, the model that is in it): SigLIP without the last layer and head, which its config.json does not say,
    and a range of grids of which anyres_max_2 interpolates those of more than two tiles."""
    folder = tmp_path_factory.mktemp("one vision")
    tower = save_tower("siglip", folder / "tower")
    flags = ModelArguments(model_name_or_path=str(FIXTURES / "llm"), vision_tower=tower, mm_projector_type="mlp2x_gelu")
    flags.mm_vision_select_layer = -2
    grids = DataArguments(image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),...,(3x3)")
    source = dataclasses.replace(open_source(flags, (), grids), max_tiles=2)
    model = load_llava(source, "sdpa", dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32))
    described = write.Description("mlp2x_gelu", tower, "anyres", 500, version="v1", **textual(), dtype=torch.float32)
    described.image_processor, described.export_format = source.image_processor(), "llava"
    described.include_vision_tower = True
    write.save_whole_model(folder / "model", model.eval(), described)
    weights = load_file(folder / "model" / "model.safetensors")
    kept = {name: t for name, t in weights.items() if ".layers.2." not in name or "vision_tower" not in name}
    kept = {name: t for name, t in kept.items() if "vision_model.head." not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": "(1x1),...,(3x3)"}
    (folder / "model" / "config.json").write_text(json.dumps(config | {"mm_newline_position": "one_token"}))
    return folder / "model", model


def features(model: LlavaModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.projector(model.vision_tower(torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)))


def test_a_model_of_llava_one_vision_is_read(one_vision):
    folder, model = one_vision
    found = open_saved(str(folder))
    assert found.source.tiling == model.tiling and found.image_aspect_ratio() == "anyres"
    assert tiling_of_the_doctor(folder, folder.parent / "tower") == model.tiling
    other = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "[(28, 28), (56, 84)]"]
    assert tiling_of_the_doctor(folder, folder.parent / "tower", *other).pinpoints == ((28, 28), (56, 84))
    described = found.source.describe()
    assert "images in more than 2 tiles are interpolated, and each of several images" in described
    torch.testing.assert_close(features(found.load(torch.float32)), features(model), rtol=0, atol=1e-6)


def test_transformers_llava_one_vision_gives_its_logits(one_vision):
    """For pictures of 2 to 10 tiles; the features of the larger ones are interpolated. Two at once are shown whole."""
    folder, _ = one_vision
    source = open_saved(str(folder)).source
    model = open_saved(str(folder)).load(torch.float32).eval()
    config = LlavaOnevisionConfig(
        text_config=model.language_model.config,
        vision_config=model.vision_tower.model.config,
        vision_feature_layer=model.vision_tower.select_layer,
        image_token_index=0,
        image_grid_pinpoints=[[height, width] for width, height in model.tiling.pinpoints],
        vision_aspect_ratio="anyres_max_2",
    )
    whole = LlavaOnevisionForConditionalGeneration(config).eval()
    weights = {f"model.language_model.{n}": t for n, t in model.language_model.model.state_dict().items()}
    weights |= {f"model.vision_tower.{n}": t for n, t in model.vision_tower.model.state_dict().items()}
    for layer, name in (("0", "linear_1"), ("2", "linear_2")):
        of_layer = getattr(model.projector, layer).state_dict()
        weights |= {f"model.multi_modal_projector.{name}.{part}": t for part, t in of_layer.items()}
    weights |= {
        "lm_head.weight": model.language_model.lm_head.weight,
        "model.image_newline": model.image_newline.weight,
    }
    whole.load_state_dict(weights)

    tile = model.tiling.tile_size
    settings = source.image_processor().to_dict() | {"size": {"height": tile, "width": tile}}
    del settings["image_processor_type"]
    processor = LlavaOnevisionImageProcessorPil(**settings, image_grid_pinpoints=config.image_grid_pinpoints)
    interpolated = []
    for size in ((28, 28), (28, 56), (80, 84), (56, 30), (60, 84)):
        picture = Image.open(IMAGES / WIDE).convert("RGB").resize(size)
        opened = model.tiling.open(picture, source.image_processor().resample)
        ids = torch.tensor([[1, 5, *[0] * opened.tokens, 6, 7]])
        places = (ids[0] == 0).nonzero().flatten()
        pixel_values, *which = join_pictures([opened], tile)
        with torch.no_grad():
            embeddings = model.embed(ids, pixel_values, places, *which)
            expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
            found = whole(input_ids=ids, **processor(picture, return_tensors="pt")).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the same kernels in fp32, logits up to 10
        interpolated.append(opened.weights is not None)
    assert interpolated == [False, False, True, False, True], "both kinds should occur"

    reader = ImageReader(model.vision_tower.tokens_per_image, source.image_processor(), "anyres", tile, model.tiling)
    both = [Image.open(IMAGES / name).convert("RGB") for name in (WIDE, TALL)]
    assert both[0].size != both[1].size
    opened = [reader.open(IMAGES, name, several=True) for name in (WIDE, TALL)]
    ids = torch.tensor([[1, 5, *[0] * opened[0].tokens, 6, *[0] * opened[1].tokens, 7]])
    assert [picture.tokens for picture in opened] == [(tile // 14) ** 2 + 1] * 2
    pixel_values, *which = join_pictures(opened, tile)
    with torch.no_grad():
        embeddings = model.embed(ids, pixel_values, (ids[0] == 0).nonzero().flatten(), *which)
        expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        found = whole(input_ids=ids, **processor([both], return_tensors="pt")).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_interpolated_pictures_too_give_one_loss_packed_padded_and_one_by_one():
    """One tall picture is interpolated; in a record with another it is shown whole."""
    model, records = build(), [*RECORDS, record([TALL], "<image>\nAnd this?")]
    pinpoints = [(TILE, TILE), (3 * TILE, TILE), (2 * TILE, 3 * TILE)]
    model.tiling = choose_tiling(TILE, GRID**2, pinpoints=pinpoints, max_tiles=2)
    batches = [batch_of(model, [each], packed=False) for each in records]
    assert {batch["feature_weights"] is None for batch in batches} == {True, False}
    loss, gradients = loss_and_gradients(model, batches)
    for packed in (True, False):
        found, found_gradients = loss_and_gradients(model, [batch_of(model, records, packed)])
        # fp32 sums in another order, over losses of size 100 and gradients of size 1.
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


def train_from(folder, output_dir, *flags: str) -> None:
    """Two steps from a LLaVA model, which brings its tower."""
    values = {"model_name_or_path": folder, "max_steps": 2, "global_batch_size": 4}
    line = runs.flags_of(2, output_dir, values)
    at = line.index("--vision_tower")
    del line[at : at + 2]
    runs.train_here([*line, *flags])


def test_it_is_trained_on_and_keeps_its_grids(one_vision, tmp_path):
    folder, model = one_vision
    train_from(folder, tmp_path / "run", "--vision_tower", str(folder.parent / "tower"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres_max_2" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[28 * across, 28 * down] for across in (1, 2, 3) for down in (1, 2, 3)]
    again = open_saved(str(tmp_path / "run"))
    assert again.source.tiling == model.tiling
    assert "does not interpolate" in write.why_not_transformers("mlp2x_gelu", again.load(torch.float32))


def test_a_flag_overrules_its_grids_and_transformers_takes_none_of_them(one_vision, tmp_path):
    """Not even those that are never interpolated: LlavaNext splits each of several images."""
    train_from(one_vision[0], tmp_path / "run", "--image_grid_pinpoints", "[(28, 28), (28, 56), (56, 28)]")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres_max_2" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[28, 28], [28, 56], [56, 28]]
    again = open_saved(str(tmp_path / "run"))
    refused = write.why_not_transformers("mlp2x_gelu", again.load(torch.float32))
    assert "splits each of several images into tiles" in refused


def test_the_chat_shows_its_images_whole_from_the_second_one_on(one_vision):
    talk = chat.Conversation(open_saved(str(one_vision[0])), torch.float32, "cpu", {"max_new_tokens": 2})
    seen = []
    talk.model.vision_tower.register_forward_hook(lambda _module, given, _made: seen.append(len(given[0])))
    talk.add_image(str(IMAGES / WIDE))
    talk.ask("What is it?")
    talk.add_image(str(IMAGES / TALL))
    talk.ask("And this?")
    of_one = talk.image_reader.tiles(IMAGES, WIDE)
    assert of_one > 1 and seen == [of_one, 2]
