"""Images are upright RGB, stay inside their folder, and broken ones are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

from mini_llava.data.images import (
    BadImage,
    load_image,
    load_image_processor,
    normalisation_table,
    normalise,
    pad_to_square,
    pixel_values,
    resize_padded,
)
from mini_llava.model.vision_tower import load_vision_tower

FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    size = {"height": 28, "width": 28}
    config = {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_resize": True, "size": {"shortest_edge": 28}, "resample": 3, "do_center_crop": True, "crop_size": size},
        **{"do_rescale": True, "do_normalize": True, "do_convert_rgb": True},
        **{"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.5]},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_image_processor(folder)


def noise(mode, size=(12, 8)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "png")])
def test_every_mode_becomes_rgb_as_pil_converts_it(mode, suffix, tmp_path):
    noise(mode).save(tmp_path / f"a.{suffix}")
    image = load_image(tmp_path, f"a.{suffix}")
    assert image.mode == "RGB" and image.size == (12, 8)
    assert image.tobytes() == Image.open(tmp_path / f"a.{suffix}").convert("RGB").tobytes()


def test_cmyk_becomes_rgb(tmp_path):
    noise("CMYK").save(tmp_path / "a.jpg")
    assert load_image(tmp_path, "a.jpg").tobytes() == Image.open(tmp_path / "a.jpg").convert("RGB").tobytes()


def test_sixteen_bit_grey_becomes_rgb(tmp_path):
    Image.fromarray((np.arange(96, dtype=np.uint16) * 600).reshape(8, 12)).save(tmp_path / "a.png")
    assert load_image(tmp_path, "a.png").tobytes() == Image.open(tmp_path / "a.png").convert("RGB").tobytes()


def test_a_transparent_palette_leaves_no_note_behind(tmp_path):
    """transformers paints an RGB image on white if it still carries the note of a transparent colour."""
    noise("RGB").quantize(8).save(tmp_path / "a.png", transparency=0)
    assert "transparency" in Image.open(tmp_path / "a.png").convert("RGB").info
    assert load_image(tmp_path, "a.png").info == {}


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    image = noise("RGB")
    image.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path, "a.png").tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    noise("RGB").save(tmp_path / "secret.png")
    noise("RGB").save(tmp_path / "images" / "sub" / "a.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "..", "link.png", "linked/secret.png"])
def test_a_name_cannot_lead_out_of_the_folder(name, folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    with pytest.raises(BadImage, match="leads out of the image folder"):
        load_image(folder, name)


def test_an_absolute_name_is_refused(folder):
    with pytest.raises(BadImage, match="is not relative to the image folder"):
        load_image(folder, str(folder / "sub" / "a.png"))


def test_names_and_links_that_stay_inside_are_fine(folder):
    (folder / "link.png").symlink_to("sub/a.png")
    (folder.parent / "alias").symlink_to(folder)
    for root, name in [(folder, "sub/a.png"), (folder, "link.png"), (folder, "sub/../sub/a.png")]:
        assert load_image(root, name).size == (12, 8)
    assert load_image(folder.parent / "alias", "sub/a.png").size == (12, 8)


@pytest.mark.parametrize("name", ["nothing.png", "sub", ""])
def test_a_missing_image_is_named(name, folder):
    with pytest.raises(BadImage, match=f"the image {name!r} is not in the image folder"):
        load_image(folder, name)


# --- broken files ----------------------------------------------------------------------------------------------------


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(BadImage, match=r"a\.jpg' cannot be read: the file is empty\.$"):
        load_image(tmp_path, "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp"])
def test_a_truncated_file_is_named(suffix, tmp_path):
    noise("RGB", (200, 200)).save(tmp_path / f"a.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match=rf"a\.{suffix}' cannot be read: .* \(a file of {len(content) // 2} bytes\)"):
        load_image(tmp_path, f"a.{suffix}")


def test_a_text_file_is_named(tmp_path):
    (tmp_path / "a.png").write_text("<html>404 Not Found</html>")
    with pytest.raises(BadImage, match=r"a\.png' cannot be read: UnidentifiedImageError"):
        load_image(tmp_path, "a.png")


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_decompression_bomb_is_refused(factor, tmp_path, monkeypatch):
    """Pillow only warns between one and two times its limit."""
    noise("RGB", (60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(60 * 40 / factor))
    with pytest.raises(BadImage, match=r"a\.png' is too large to be read safely"):
        load_image(tmp_path, "a.png")


def test_a_strip_is_refused(tmp_path):
    Image.new("RGB", (2000, 2)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="is 2000x2; sides beyond 1:200 are refused"):
        load_image(tmp_path, "a.png")


# --- pixel values ----------------------------------------------------------------------------------------------------


def test_pad_centres_the_image_on_the_mean_colour(processor):
    values = pixel_values(Image.new("RGB", (56, 28), (255, 0, 0)), processor, "pad")
    assert values.shape == (3, 28, 28) and values.dtype == torch.uint8
    for row in (0, 27):
        assert values[:, row, 14].tolist() == [127, 63, 191]
    assert values[:, 14, 14].tolist() == [255, 0, 0]


def test_square_cuts_off_what_does_not_fit(processor):
    image = Image.new("RGB", (56, 28), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 8, 28))
    values = pixel_values(image, processor, "square")
    assert values[:, 14, 0].tolist() == [255, 0, 0]


def test_an_unknown_aspect_ratio_is_an_error_that_lists_the_known_ones(processor):
    """LLaVA trains `anyres` as `square`, and then infers as anyres."""
    with pytest.raises(ValueError, match=r"'anyres'\. Known: pad, square"):
        pixel_values(noise("RGB"), processor, "anyres")


def test_the_processor_is_the_pil_one_also_when_read_again(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(processor) is type(load_image_processor(tmp_path))
    assert type(processor).__name__ == "CLIPImageProcessorPil"


def test_the_settings_of_openais_own_towers_are_read(tmp_path):
    """They name a feature extractor, and give sizes as single numbers."""
    config = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "resample": 3}
    config |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    config |= {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert pixel_values(noise("RGB", (60, 40)), load_image_processor(tmp_path), "square").shape == (3, 28, 28)


def test_a_processor_without_a_pil_version_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "OwnImageProcessor"}')
    with pytest.raises(ValueError, match=r"is 'OwnImageProcessor', of which transformers .* has no PIL version"):
        load_image_processor(tmp_path)


def test_a_siglip_processor_works_as_well(tmp_path):
    config = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    config |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = load_image_processor(tmp_path)
    assert type(processor).__name__ == "SiglipImageProcessorPil"
    for aspect_ratio in ("pad", "square"):
        assert pixel_values(noise("RGB", (50, 20)), processor, aspect_ratio).shape == (3, 32, 32)


# --- bytes to floats -------------------------------------------------------------------------------------------------

NO_NORMALISATION = dict(image_mean=[0.0] * 3, image_std=[1.0] * 3)  # FastVLM's
PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
    "CLIP, a crop larger than what it is cut from": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=28),
    "SigLIP": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    "DINOv2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=28),
    "mean 0, std 1": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, **NO_NORMALISATION),
    "not normalised": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, do_normalize=False),
    "not rescaled": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, do_rescale=False),
    "bytes as they are": CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=28, do_rescale=False, do_normalize=False
    ),
    "bilinear": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, resample=2),
    "Lanczos": SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=1),
    "nearest": SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=0),
    "no crop": CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False),
    "LLaVA": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, do_pad=False),
    "with a way of its own to resize": ConvNextImageProcessorPil(size={"shortest_edge": 28}),
    "from -1 to 1 by its factor": CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=28, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
}


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_normalised_bytes_are_the_processors_floats_to_the_bit(name, aspect_ratio):
    """Also where Pillow is asked directly, and where a wide image is padded between the two passes of resizing."""
    processor = PROCESSORS[name]
    table = normalisation_table(processor)
    assert table.shape == (3, 256) and table.dtype == torch.float32
    for size in ((640, 480), (480, 640), (1001, 333), (31, 31), (20, 20), (33, 27), (19, 11), (300, 2), (3, 29)):
        image = noise("RGB", size)
        pixels = pixel_values(image, processor, aspect_ratio)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 28, 28) and pixels.is_contiguous()
        if aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in processor.image_mean))
            assert image.size == (max(size), max(size))
        expected = processor(images=image, return_tensors="pt")["pixel_values"].to(torch.float32)
        found = normalise(torch.stack([pixels, pixels]), table)
        assert found.equal(torch.cat([expected, expected]))


@settings(deadline=None, max_examples=150)
@given(
    *(st.integers(1, 700), st.integers(1, 700), st.sampled_from([28, 37, 224, 336, 378, 384])),
    st.sampled_from(list(Image.Resampling)),
)
def test_padding_that_is_not_resized_changes_no_pixel(width, height, size, resample):
    """Rows of padding alone are left out, between edges that Pillow, which keeps them in fp32, does not round."""
    width, height = min(width, 200 * height), min(height, 200 * width)
    image, colour = noise("RGB", (width, height)), (122, 116, 104)
    expected = pad_to_square(image, colour).resize((size, size), resample)
    assert resize_padded(image, (size, size), colour, resample).tobytes() == expected.tobytes()


def test_a_processor_that_does_more_than_a_table_can_is_refused():
    def processor(**settings):
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)(**settings)["pixel_values"]
        return {"pixel_values": np.array(pixels) * 0.5}

    with pytest.raises(ValueError, match="gives float64 where bytes should be"):
        pixel_values(noise("RGB"), processor, "square")


def test_the_table_stays_fp32_whatever_the_tower_is_cast_to_and_is_never_saved():
    processor = load_image_processor(FIXTURES / "clip")
    tower = load_vision_tower(str(FIXTURES / "clip"), -2, "patch", torch.float32)
    tower.pixel_table = normalisation_table(processor)
    assert not any("table" in name for name, _ in [*tower.named_buffers(), *tower.state_dict().items()])
    pixels = pixel_values(noise("RGB", (70, 60)), processor, "square")[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tower.to(dtype)
        with torch.no_grad():
            assert tower(pixels).equal(tower(normalise(pixels, normalisation_table(processor))))
