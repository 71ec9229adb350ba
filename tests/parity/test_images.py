"""Pixel values against LLaVA c121f04 with transformers 4.37.2, recorded in fixtures/, to the last bit."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mini_llava.data.images import normalisation_table, normalise, pixel_values
from mini_llava.formats.towers import load_image_processor
from mini_llava.image_files import load_image

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "images.json").read_text(encoding="utf-8"))["images"]


@pytest.fixture(scope="module")
def processor():
    return load_image_processor(FIXTURES / "clip")


def float_values(name, processor, aspect_ratio):
    """As the tower makes them of the bytes."""
    pixels = pixel_values(load_image(FIXTURES / "data" / "images", name), processor, aspect_ratio)
    return normalise(pixels, normalisation_table(processor)).numpy()


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_pixel_values_equal_llavas_to_the_bit(name, aspect_ratio, processor, agree):
    values = float_values(name, processor, aspect_ratio)
    expected = EXPECTED[name][aspect_ratio]
    assert list(values.shape) == expected["shape"] and values.dtype == np.float32
    for channel, row, column, value in expected["values"]:
        assert values[channel, row, column] == pytest.approx(value, abs=1e-6)
    differs = hashlib.sha256(values.tobytes()).hexdigest() != expected["sha256_float32"]
    agree("pixel values, square and pad, to the bit", "LLaVA c121f04", int(differs), 0)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_normalisation_is_that_of_the_resized_bytes(aspect_ratio, processor):
    resized = np.load(FIXTURES / "images_uint8.npz")
    mean = np.array(processor.image_mean).reshape(3, 1, 1)
    std = np.array(processor.image_std).reshape(3, 1, 1)
    for name in EXPECTED:
        values = float_values(name, processor, aspect_ratio)
        expected = (resized[f"{name}|{aspect_ratio}"] / 255 - mean) / std
        np.testing.assert_allclose(values, expected, atol=1e-6)
