"""`--image_size`: a tower whose position embeddings were interpolated, saved in its new size and read so."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from mini_llava.data.images import pixel_values
from mini_llava.data.templates import get_template
from mini_llava.formats import write
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor, of_size, output_size
from mini_llava.tools import export
from mini_llava.tools.saved_models import open_saved
from tests.launching import ROOT
from tests.model.test_towers import llava, logits
from tests.model.tiny_towers import KINDS, PATCH_SIZE, save_tower

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
PICTURE = Image.open(FIXTURES / "data" / "images" / "wide_rgb.png")
SIZE = 5 * PATCH_SIZE  # from two by two patches to five by five
kinds = pytest.mark.parametrize("kind", KINDS)
# What transformers' class can express: not registers without the class token.
FEATURES = {"dinov2_with_registers": "cls_patch"}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    return {kind: save_tower(kind, folder / kind) for kind in KINDS}


def save(model, directory, layout: str, tower: str) -> None:
    write.save_whole_model(
        directory,
        model,
        write.Description(
            projector_type="mlp2x_gelu",
            vision_tower_name=tower,
            image_aspect_ratio="pad",
            model_max_length=500,
            version="v1",
            template=get_template("v1"),
            tokenizer=load_tokenizer(FIXTURES / "llm"),
            image_processor=of_size(load_image_processor(tower), model.vision_tower.image_size),
            export_format=layout,
            dtype=torch.float32,
        ),
    )


@kinds
def test_features_are_those_that_transformers_interpolates_to(towers, kind):
    tower = llava(towers[kind], image_size=SIZE).vision_tower
    assert tower.image_size == tower.model.config.image_size == SIZE and tower.tokens_per_image == 25
    pixels = torch.linspace(-2, 2, 3 * SIZE**2).view(1, 3, SIZE, SIZE).sin()
    how = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}  # which always does
    with torch.no_grad():
        expected = AutoModel.from_pretrained(towers[kind]).eval()(pixels, output_hidden_states=True, **how)
        found = tower(pixels)
    # The same interpolation in fp32; features of size 1.
    torch.testing.assert_close(found, expected.hidden_states[-2][:, KINDS[kind][3] :], rtol=0, atol=1e-5)


@kinds
@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_it_is_saved_in_its_new_size_and_read_so(towers, kind, layout, tmp_path):
    feature = FEATURES.get(kind, "patch") if layout == "transformers" else "patch"
    model = llava(towers[kind], image_size=SIZE, mm_vision_select_feature=feature)
    save(model, tmp_path / "saved", layout, towers[kind])
    other = {"transformers": ["--export_format", "llava", "--vision_tower", towers[kind]], "llava": []}[layout]
    if not (kind == "dinov2_with_registers" and layout == "llava"):  # which transformers' layout cannot hold
        export.main([str(tmp_path / "saved"), str(tmp_path / "exported"), *other])
    for folder in filter(lambda folder: folder.exists(), (tmp_path / "saved", tmp_path / "exported")):
        saved = open_saved(str(folder))
        again = saved.load()
        assert saved.source.image_size() == again.vision_tower.image_size == again.vision_tower.model.config.image_size
        assert output_size(saved.source.image_processor()) == SIZE
        assert torch.equal(logits(again), logits(model))


@kinds
def test_transformers_reads_it_in_its_new_size(towers, kind, tmp_path):
    model = llava(towers[kind], image_size=SIZE, mm_vision_select_feature=FEATURES.get(kind, "patch"))
    save(model, tmp_path, "transformers", towers[kind])
    whole, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(tmp_path, use_fast=False)
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=PICTURE, return_tensors="pt")
    ids = inputs["input_ids"]
    places = (ids[0] == whole.config.image_token_id).nonzero().flatten()
    assert len(places) == model.vision_tower.tokens_per_image
    pixels = pixel_values(PICTURE, of_size(load_image_processor(towers[kind]), SIZE), "pad")[None]
    with torch.no_grad():
        embeddings = model.embed(ids.where(ids < 800, 0), pixels, places)
        expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        found = whole.eval()(**inputs).logits[..., :800]
    # The same kernels in fp32, logits up to 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_projectors_directory_says_the_size_that_it_was_trained_with(towers, tmp_path):
    model = llava(towers["clip"], image_size=SIZE)
    write.save_projector_only(tmp_path, model, write.Description("mlp2x_gelu", towers["clip"], "pad", 500))
    again = open_saved(str(tmp_path)).load()
    assert again.vision_tower.image_size == SIZE and torch.equal(logits(again), logits(model))


def test_a_size_that_is_cut_through_a_patch_is_refused(towers):
    with pytest.raises(ValueError, match="--image_size 57 is not a multiple of 14, the vision tower's patch size"):
        llava(towers["clip"], image_size=57)
