"""Images are upright RGB, stay inside their folder, and broken ones are named."""

import io
import json
import pickle
import struct
import zlib
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

from mini_llava.data.images import normalisation_table, normalise, pad_to_square, pixel_values, resize_padded
from mini_llava.formats.towers import load_image_processor, load_vision_tower
from mini_llava.image_files import (
    CONVERTED,
    MODES,
    SCALED,
    BadImage,
    LinkedFolder,
    as_rgb,
    image_size,
    load_image,
    white_value,
)

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


def test_the_table_has_every_mode_that_pillow_knows():
    assert set(MODES) == set(Image.MODES)


@pytest.mark.parametrize("mode", [mode for mode, what in MODES.items() if what == CONVERTED])
def test_up_to_eight_bits_pillow_converts(mode):
    values = np.random.default_rng(0).integers(0, 256, (8, 12, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    image = Image.frombytes(mode, (12, 8), np.packbits(values[..., 0] > 127, axis=1) if mode == "1" else values)
    if mode in ("P", "PA"):
        image.putpalette(range(256), "RGB")
    rgb = as_rgb(image, white_value(image))
    assert rgb.mode == "RGB" and len(rgb.getcolors()) > 1
    assert rgb.tobytes() == (image.convert("LA") if mode == "La" else image).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", [mode for mode, what in MODES.items() if what == SCALED])
def test_more_bits_are_scaled_to_eight(mode):
    kind = {"I;16B": ">u2", "I;16N": "=u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (len(GREYS), 1), np.array(GREYS).astype(kind).tobytes())
    image.format = "PNG"  # of which older versions of Pillow give the mode I
    assert np.asarray(as_rgb(image, white_value(image)))[0].tolist() == [[value] * 3 for value in (0, 1, 64, 128, 255)]


GREYS = [0, 257, 16448, 32896, 65535]  # 0, 1, 64, 128 and 255, 257 times


def tiff(values, photometric=1, bits=16, sample_format=1, order="<", fill_order=1):
    """A TIFF of one row; Pillow writes none of the odd ones."""
    content = values if isinstance(values, bytes) else values.tobytes()
    width = len(content) * 8 // bits
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 266: fill_order, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(content), 339: sample_format}
    directory = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", tags[tag]) for tag in tags)
    content += bytes(len(content) % 2)
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(tags)) + directory + bytes(4)


def saved(values, kind):
    buffer = io.BytesIO()
    Image.fromarray(values[None]).save(buffer, kind)
    return buffer.getvalue()


CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of PNG's kinds of colour: grey, RGB, and both with alpha


def png(depth, colour_type, row, *chunks):
    """A PNG of one row, of which Pillow writes few kinds."""
    width = 8 * len(row) // depth // CHANNELS[colour_type]
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


LITTLE, BIG = np.array(GREYS, "<u2"), np.array(GREYS, ">u2")
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in LITTLE.tobytes())
DEEP = {
    "PNG": saved(LITTLE, "PNG"),
    "PNG with a transparent grey": png(16, 0, BIG.tobytes(), (b"tRNS", b"\0\0")),
    "TIFF": tiff(LITTLE),
    "TIFF, big-endian": tiff(BIG, order=">"),
    "TIFF, compressed": saved(LITTLE, "TIFF"),
    "TIFF, white is 0": tiff(65535 - LITTLE, photometric=0),
    "TIFF, bits reversed": tiff(REVERSED_BITS, fill_order=2),
    "JPEG 2000": saved(LITTLE, "JPEG2000"),
    "PGM": b"P5 5 1 65535\n" + BIG.tobytes(),
    "PGM as text": b"P2 5 1 65535\n" + " ".join(map(str, GREYS)).encode(),
    "PGM of 10 bits": b"P5 5 1 1020\n" + np.array([0, 4, 256, 512, 1020], ">u2").tobytes(),
    "PGM of 12 bits as text": b"P2 5 1 4080\n0 16 1024 2048 4080",
    "TIFF of 12 bits": tiff(bytes.fromhex("000010404808fff000"), bits=12),
}


@pytest.mark.parametrize("name", DEEP)
def test_files_of_more_than_eight_bits_are_scaled_by_their_formats_range(name, tmp_path):
    (tmp_path / "a").write_bytes(DEEP[name])
    image = load_image(tmp_path, "a")
    assert image.mode == "RGB" and image.info == {}
    assert np.asarray(image)[0, :5].tolist() == [[value] * 3 for value in (0, 1, 64, 128, 255)]


@pytest.mark.parametrize("colour_type", CHANNELS)
def test_every_sixteen_bit_value_becomes_the_nearest_byte(colour_type, tmp_path):
    """Of colours and of grey with alpha Pillow itself takes the upper byte, which is one off at most."""
    values = np.arange(65536)
    if colour_type == 0:
        Image.fromarray(values.astype(np.uint16).reshape(256, 256)).save(tmp_path / "a.png")
        assert np.asarray(load_image(tmp_path, "a.png"))[..., 0].ravel().tolist() == np.round(values / 257).tolist()
        return
    values = values[::997]
    (tmp_path / "a.png").write_bytes(
        png(16, colour_type, np.repeat(values, CHANNELS[colour_type]).astype(">u2").tobytes())
    )
    found = np.asarray(load_image(tmp_path, "a.png"))[0].astype(int)
    assert np.abs(found - (values / 257)[:, None]).max() < 1


REFUSED_FILES = {
    "TIFF of floats": tiff(np.linspace(0, 1, 4, dtype=np.float32), bits=32, sample_format=3),
    "PFM": b"Pf 2 1 -1.0\n" + np.array([0, 1], "<f4").tobytes(),
    "TIFF of 32 bits": tiff(LITTLE.astype("<u4"), bits=32),
    "TIFF of 32 bits with a sign": tiff(LITTLE.astype("<i4"), bits=32, sample_format=2),
    "TIFF of 16 bits with a sign": tiff(np.array([-1000, 0, 3000], "<i2"), sample_format=2),
    "TIFF of 8 bits with a sign": tiff(np.array([-100, 0, 100], np.int8), bits=8, sample_format=2),
}


@pytest.mark.parametrize("look", [load_image, image_size])
@pytest.mark.parametrize("name", REFUSED_FILES)
def test_pixels_whose_range_no_format_tells_are_refused(name, look, tmp_path):
    (tmp_path / "a").write_bytes(REFUSED_FILES[name])
    sentence = r"/a' cannot be used: it has .*pixels.* does not say which value is white\. Convert it to 8 bits, or"
    with pytest.raises(BadImage, match=sentence):
        look(tmp_path, "a")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_alpha_and_an_adobe_cmyk_jpeg_are_as_pillow_converts_them(tmp_path):
    noise("RGB").quantize(8).save(tmp_path / "a.png", transparency=bytes(range(0, 256, 32)))
    noise("CMYK").save(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").info["adobe"]
    for name in ("a.png", "a.jpg"):
        assert load_image(tmp_path, name).tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()


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


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_uncompressed_tiff_on_its_side_is_turned_upright(mode, tmp_path):
    """Pillow maps those of most modes into memory, and takes their height for their width."""
    deep = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 680)
    image = deep if mode == "I;16" else noise(mode)
    image.save(tmp_path / "upright.tif")
    upright = np.asarray(load_image(tmp_path, "upright.tif"))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "sideways.tif", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path, "sideways.tif")), np.rot90(upright, -1))
    assert image_size(tmp_path, "sideways.tif") == (8, 12)


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


def test_an_absolute_name_is_taken_inside_the_folder_alone(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert load_image(folder, str(folder / "sub" / "a.png")).size == (12, 8)
    for name in ("../secret.png", "sub/../../secret.png", "link.png", ".."):
        with pytest.raises(BadImage, match="leads out of the image folder"):
            load_image(folder, str(folder / name))
    beside = folder.with_name("images2")  # whose name begins with the folder's
    beside.mkdir()
    noise("RGB").save(beside / "a.png")
    with pytest.raises(BadImage, match="leads out of the image folder"):
        load_image(folder, str(beside / "a.png"))


def test_links_are_followed_in_a_folder_that_says_so_and_names_still_cannot_lead_out(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder.parent / "alias").symlink_to(folder)
    for name in ("link.png", "linked/secret.png"):
        with pytest.raises(BadImage, match="by a symbolic link, which --follow_links True allows"):
            load_image(folder, name)
        for follows in (LinkedFolder(folder), pickle.loads(pickle.dumps(LinkedFolder(folder)))):
            assert load_image(follows, name).size == (12, 8)
            assert load_image(follows, str(folder / name)).size == (12, 8)
    assert load_image(LinkedFolder(folder.parent / "alias"), "sub/a.png").size == (12, 8)
    for name in ("../secret.png", "linked/../../secret.png", str(folder.parent / "secret.png")):
        with pytest.raises(BadImage, match=r"leads out of the image folder .*secret\.png'\.$"):
            load_image(LinkedFolder(folder), name)


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
    with pytest.raises(BadImage, match=rf"a\.{suffix}' cannot be read: .* \(a file of {len(content) // 2:,} bytes\)"):
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

    with pytest.raises(ValueError, match="returns float64 instead of bytes"):
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
