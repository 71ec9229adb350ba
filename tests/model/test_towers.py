"""Every kind of tower gives the features that transformers computes, trains what it uses, and comes back as it was."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from mini_llava.arguments import ModelArguments
from mini_llava.data.images import normalisation_table, normalise, pixel_values
from mini_llava.formats import write
from mini_llava.formats.read import load_llava, open_source
from mini_llava.formats.towers import load_vision_config, load_vision_tower, tower_image_processor
from mini_llava.model.llava import LlavaModel
from mini_llava.model.vision_tower import empty_model, tokens_per_image
from mini_llava.tools import chat, doctor, export
from mini_llava.tools.saved_models import open_saved
from mini_llava.watch.flops import FlopCounter
from tests.end_to_end import runs
from tests.model.tiny_towers import HIDDEN_SIZE, IMAGE_SIZE, KINDS, LAYERS, SHAPE, save_tower, save_whole
from tests.published_layouts import FIXTURES

PATCHES = 4
PICTURE = Image.open(FIXTURES / "data" / "images" / "wide_rgb.png")
FP32 = dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    return {kind: save_tower(kind, folder / kind) for kind in KINDS}


def pictures(count: int = 2) -> torch.Tensor:
    return torch.linspace(-2, 2, count * 3 * IMAGE_SIZE**2).view(count, 3, IMAGE_SIZE, IMAGE_SIZE).sin()


def load(path: str, select_layer: int = -2, select_feature: str = "patch"):
    return load_vision_tower(path, select_layer, select_feature, torch.float32)


def llava(tower: str, base: Path = FIXTURES / "llm", **given) -> LlavaModel:
    flags = ModelArguments(model_name_or_path=str(base), vision_tower=tower, **given)
    flags.mm_projector_type, flags.mm_vision_select_layer = "mlp2x_gelu", -2
    torch.manual_seed(0)
    return load_llava(open_source(flags, given), "sdpa", FP32).eval()


@torch.no_grad()
def logits(model: LlavaModel) -> torch.Tensor:
    """Of a sequence with an image, for the 800 tokens that the language model has in all layouts."""
    ids = torch.arange(3, 43)[None] * 7 % 800
    places = torch.arange(5, 5 + model.vision_tower.tokens_per_image)
    size = model.vision_tower.image_size
    pixels = torch.linspace(-2, 2, 3 * size**2).view(1, 3, size, size).sin()
    embeddings = model.embed(ids, pixels, places)
    return model.language_model(inputs_embeds=embeddings, use_cache=False).logits[..., :800]


# --- features ---------------------------------------------------------------------------------------------------------


@kinds
def test_features_are_the_hidden_states_of_transformers_model(towers, kind):
    leading = KINDS[kind][3]
    reference = AutoModel.from_pretrained(towers[kind]).eval()
    with torch.no_grad():
        hidden_states = reference(pictures(), output_hidden_states=True).hidden_states
    for layer in (-1, -2, 1):
        features = load(towers[kind], layer)(pictures())
        assert torch.equal(features, hidden_states[layer][:, leading:]) and features.shape[1] == PATCHES
    if leading:
        assert torch.equal(load(towers[kind], -2, "cls_patch")(pictures()), hidden_states[-2])


@kinds
def test_size_and_width_are_read_from_the_tower(towers, kind):
    tower, config = load(towers[kind]), load_vision_config(towers[kind])
    assert (tower.tokens_per_image, tower.hidden_size, tower.image_size) == (PATCHES, HIDDEN_SIZE, IMAGE_SIZE)
    assert tokens_per_image(config, "patch", IMAGE_SIZE) == PATCHES
    if leading := KINDS[kind][3]:
        assert tokens_per_image(config, "cls_patch", IMAGE_SIZE) == PATCHES + leading
    else:
        with pytest.raises(ValueError, match="a vision tower of type siglip_vision_model has no class token"):
            load(towers[kind], -2, "cls_patch")


@kinds
@pytest.mark.parametrize("layer", [-1, -2])
def test_what_the_features_depend_on_gets_gradients_and_nothing_else(towers, kind, layer):
    tower = load(towers[kind], layer).train()
    unused = tower.unused_parameters()
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name not in unused)
    tower(pictures()).square().sum().backward()
    assert {name for name, parameter in tower.named_parameters() if parameter.grad is None} == unused
    named = dict(tower.named_parameters())
    # A bias of the keys moves all scores of a query alike, which softmax does not see: its gradient is rounding.
    seen = [name for name in named if name not in unused and "key.bias" not in name and "k_proj.bias" not in name]
    assert all(named[name].grad.abs().max() > 1e-6 for name in seen)

    last = "model.encoder.layer" + ("s" if "clip" in kind or "siglip" in kind else "") + f".{LAYERS - 1}."
    assert any(name.startswith(last) for name in unused) == (layer == -2)
    expected = {"clip": "post_layernorm", "siglip": "head.probe"}.get(kind, "embeddings.mask_token")
    assert any(expected in name for name in unused)


def test_a_tower_stays_in_evaluation_mode(towers):
    tower = load(towers["dinov2"]).train()
    assert tower.training and not any(module.training for module in tower.model.modules())


@kinds
def test_the_operations_counted_are_those_that_torch_does(towers, kind):
    model = llava(towers[kind])
    model.vision_tower.select_layer = -1  # then torch computes no layer in vain
    # Torch's counter does not know the CPU's fused attention; written out it is two products.
    model.vision_tower.model.set_attn_implementation("eager")
    model.requires_grad_(False)
    counter = FlopCounter(model)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.projector(model.vision_tower(pictures(1)))
    assert counter.per_image == counted.get_total_flops()
    model.vision_tower.select_layer = -2
    assert FlopCounter(model).per_image < counter.per_image


# --- directories ------------------------------------------------------------------------------------------------------


def test_of_a_whole_contrastive_model_the_vision_part_is_taken(tmp_path):
    text = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    shape = SHAPE | {"intermediate_size": 64}
    whole = {
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**shape).to_dict())),
        "siglip": SiglipModel(SiglipConfig(text_config=text, vision_config=SiglipVisionConfig(**shape).to_dict())),
    }
    for kind, model in whole.items():
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected = model.eval().vision_model(pictures(), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(load(str(tmp_path / kind))(pictures()), expected[:, KINDS[kind][3] :])


def test_dinov2_takes_pictures_of_its_image_processors_size(tmp_path):
    folder = tmp_path / "dinov2"
    model_class, config, processor, _ = KINDS["dinov2"]
    model_class(type(config)(**{**config.to_dict(), "image_size": 70})).save_pretrained(folder)
    processor.save_pretrained(folder)
    model = llava(str(folder))
    tower = model.vision_tower
    assert tower.image_size == IMAGE_SIZE and tower.tokens_per_image == PATCHES and tower.model.config.image_size == 70
    pixels = pixel_values(PICTURE, tower_image_processor(str(folder)), "square")[None]
    assert tower(pixels).shape == (1, PATCHES, HIDDEN_SIZE)
    assert tower.unused_parameters() and FlopCounter(model).per_image > 0


def test_what_is_no_known_tower_or_not_whole_is_refused_with_a_sentence(towers, tmp_path):
    Siglip2VisionConfig(hidden_size=32).save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match=r"siglip2_vision_model. Known are clip_vision_model.* NaFlex ones are not"):
        load_vision_config(str(tmp_path / "naflex"))
    folder = Path(save_tower("siglip", tmp_path / "siglip"))
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.position_embedding.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"siglip lacks embeddings.position_embedding.weight: it holds no whole"):
        load(str(folder))
    with pytest.raises(ValueError, match=r"mobileclip_l_1024 is only a name|The vision tower is a model of timm"):
        llava("mobileclip_l_1024")


@kinds
def test_the_doctor_counts_the_towers_tokens(towers, kind, tmp_path, capsys):
    record = {"id": "0", "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes"}]}
    (tmp_path / "data.json").write_text(json.dumps([record | {"image": "wide_rgb.png"}]))
    words = ["--data_path", tmp_path / "data.json", "--image_folder", FIXTURES / "data" / "images"]
    words += ["--model_name_or_path", FIXTURES / "llm", "--output", tmp_path / "bad.jsonl", "--num_workers", 1]
    means = []
    for how in (["--vision_tower", towers[kind]], ["--tokens_per_image", PATCHES]):
        assert doctor.main([str(word) for word in words + how]) == 0
        means.append(capsys.readouterr().out.split("mean ")[1].split(",")[0])
    assert means[0] == means[1]


# --- what is written and read back ------------------------------------------------------------------------------------


def save(model: LlavaModel, tower: str, folder: Path, **how) -> str:
    return save_whole(model, tower, folder, FIXTURES / "tokenizer_llama_exact", "v1", **how)


WAYS = [(kind, "patch", "transformers") for kind in ("clip", "siglip", "dinov2")]
WAYS += [("dinov2_with_registers", "cls_patch", "transformers"), ("dinov2", "cls_patch", "transformers")]
WAYS += [(kind, "patch", "llava") for kind in KINDS]


@pytest.mark.parametrize("kind, feature, layout", WAYS)
def test_what_is_written_is_read_back(towers, kind, feature, layout, tmp_path):
    model = llava(towers[kind], mm_vision_select_feature=feature)
    with torch.no_grad():  # another tower than the named one, as a trained one is
        model.vision_tower.model.encoder.requires_grad_(False)
        for parameter in model.vision_tower.parameters():
            parameter.mul_(1.01)
    save(model, towers[kind], tmp_path, export_format=layout)
    flags = ModelArguments(model_name_or_path=str(tmp_path))
    source = open_source(flags)
    again = load_llava(source, "sdpa", FP32).eval()
    assert (source.layout, source.select_feature, source.fixed_flags()["mm_vision_select_feature"]) == (
        layout,
        feature,
        feature,
    )
    assert source.image_size() == IMAGE_SIZE and source.image_aspect_ratio() == "pad"
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind, feature", [(kind, feature) for kind, feature, layout in WAYS if layout != "llava"])
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_transformers_computes_the_logits_of_the_trained_parts(towers, kind, feature, ratio, tmp_path):
    model = llava(towers[kind], mm_vision_select_feature=feature)
    save(model, towers[kind], tmp_path, ratio=ratio)
    whole, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    inputs = AutoProcessor.from_pretrained(tmp_path, use_fast=False)(
        text="USER: <image>\nHi ASSISTANT:", images=PICTURE, return_tensors="pt"
    )
    ids = inputs["input_ids"]
    places = (ids[0] == whole.config.image_token_id).nonzero().flatten()
    assert len(places) == model.vision_tower.tokens_per_image

    processor = tower_image_processor(towers[kind])
    pixels = normalise(pixel_values(PICTURE, processor, ratio)[None], normalisation_table(processor))
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        embeddings = model.embed(ids.where(ids < 800, 0), pixels, places)
        expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        found = whole.eval()(**inputs).logits[..., :800]
    # The same operations in the same order: what differs is where a kernel splits its work.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_registers_that_are_dropped_have_no_place_in_transformers_llava(towers, tmp_path):
    model = llava(towers["dinov2_with_registers"])
    line = save(model, towers["dinov2_with_registers"], tmp_path)
    assert "in the layout of LLaVA's own code: transformers' LLaVA drops the first of the tower's 4 tokens" in line
    folder = tmp_path / "full"
    save(llava(towers["siglip"]), towers["siglip"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_select_strategy"] = "default"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_feature_select_strategy 'default'; known here: full"):
        open_source(ModelArguments(model_name_or_path=str(folder)))


def test_names_are_those_of_published_files(towers, tmp_path):
    """Which transformers 4 and all versions of 5 read; the names in memory changed."""
    for kind, layout, name in (
        ("siglip", "transformers", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
        ("dinov2", "transformers", "vision_tower.encoder.layer.0.attention.attention.query.weight"),
        ("siglip", "llava", "model.vision_tower.vision_tower.vision_model.head.probe"),
        ("dinov2", "llava", "model.vision_tower.vision_tower.encoder.layer.0.attention.output.dense.bias"),
    ):
        save(llava(towers[kind]), towers[kind], tmp_path / kind / layout, export_format=layout)
        assert name in load_file(tmp_path / kind / layout / "model.safetensors")
    for kind in KINDS:
        config = load_vision_config(towers[kind])
        published = {write.published_name(config, name) for name in empty_model(config).state_dict()}
        level = "vision_model." if kind in ("clip", "siglip") else ""
        assert published == {level + name for name in load_file(Path(towers[kind]) / "model.safetensors")}


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_a_whole_model_can_be_given_as_the_tower(towers, layout, tmp_path):
    """So that a language model is paired with a tower that was trained inside another model."""
    trained = llava(towers["siglip"])
    with torch.no_grad():
        trained.vision_tower.model.embeddings.patch_embedding.weight.mul_(2)
    save(trained, towers["siglip"], tmp_path, export_format=layout)
    model = llava(str(tmp_path))
    assert torch.equal(model.vision_tower(pictures()), trained.vision_tower(pictures()))
    assert not torch.equal(model.vision_tower(pictures()), load(towers["siglip"])(pictures()))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "dinov2_with_registers"])
def test_a_trained_tower_changes_where_it_is_used_and_is_in_the_lora_directory(towers, kind, tmp_path, capsys):
    values = dict(
        vision_tower=towers[kind],
        lora_enable=True,
        lora_r=2,
        lora_alpha=4,
        unfreeze_mm_vision_tower=True,
        mm_vision_tower_lr=1e-2,
        max_steps=2,
        global_batch_size=4,
        save_strategy="no",
    )
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    written = torch.load(tmp_path / "run" / "non_lora_trainables.bin", weights_only=True)
    tower = load(towers[kind])
    unused, before = tower.unused_parameters(), dict(tower.model.named_parameters())
    prefix = "base_model.model.model.vision_tower.vision_tower."
    used = {
        prefix + write.published_name(tower.model.config, name): name
        for name in before
        if f"model.{name}" not in unused
    }
    assert {name for name in written if "vision_tower" in name} == used.keys()
    assert all(not torch.equal(written[there], before[here]) for there, here in used.items())

    trained = open_saved(str(tmp_path / "run")).load()
    assert all(torch.equal(dict(trained.vision_tower.model.named_parameters())[h], written[t]) for t, h in used.items())
    export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merge", "--dtype", "float32"])
    merged = open_saved(str(tmp_path / "merged")).load()
    assert torch.equal(logits(merged), logits(trained))
    picture = str(FIXTURES / "data" / "images" / "wide_rgb.png")
    answers = []
    for folder in ("run", "merged"):
        capsys.readouterr()
        chat.main([str(tmp_path / folder), "--image", picture, "--prompt", "What is it?", "--max_new_tokens", "4"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
