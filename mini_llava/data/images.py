"""From an upright RGB image to the pixel values that the vision tower takes.

Replaces the image half of LLaVA's dataset and its `expand2square`. The processor is pinned to its PIL version, so that
pixels do not depend on what else is installed. Pixels stay bytes until they are on the device, a quarter of the floats'
size; there a table gives the processor's own floats.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import UserError
from ..image_files import BadImage, load_image

ASPECT_RATIOS = ("pad", "square")  # of one picture as a whole; tiles are made in options/tiles.py
SMOOTH_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
FURTHEST_TAP = 3  # radius of the widest filter, Lanczos, in pixels of the result
NEWLINE = -1  # in the order of a picture's features: the learned embedding that ends a row of them


@dataclass(frozen=True)
class Picture:
    """The pixels of an image for the vision tower, and which features go to the image's placeholders.

    Attributes:
        pixels: uint8 [tiles, 3, S, S]; one tile, unless options/tiles.py has split the image up.
        features: number of features that the tower computes for all tiles.
        order: int32 [tokens], for each placeholder the number of its feature, counted through the tiles, or NEWLINE;
            None: all features as they come.
        weights: float32 [tokens, 4], for a picture whose features are interpolated: each placeholder takes the sum of
            four, so weighted, and `order` is [tokens, 4]; None: they are taken as they are.
    """

    pixels: torch.Tensor
    features: int
    order: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """Return how many placeholders it takes."""
        return self.features if self.order is None else len(self.order)


@dataclass(frozen=True)
class ImageReader:
    """Reads image files as input for the vision tower.

    Attributes:
        features: number of features that the tower computes for an image of `size` x `size` pixels.
        processor: the tower's image processor, None like `size` where no image is opened.
        aspect_ratio: "pad", "square", or "anyres" with a tiling.
        tiling: what splits images into tiles (`options.tiles.Tiling`); None: they stay whole.
    """

    features: int
    processor: BaseImageProcessor | None = None
    aspect_ratio: str = "pad"
    size: int | None = None
    tiling: object | None = None

    def open(self, folder: str, name: str, several: bool = False) -> Picture:
        """Return an image file as the tower takes it. Raises BadImage; ValueError for a processor that does not fit.

        several: whether its record has other images too: some tilings then show each of them whole.
        """
        return self.prepare(load_image(folder, name), several)

    def prepare(self, image: Image.Image, several: bool) -> Picture:
        """Return an upright RGB image as `open` does."""
        if self.tiling is not None and not self.tiling.shows_whole(several):
            return self.tiling.open(image, self.processor.resample)
        pixels = pixel_values(image, self.processor, "pad" if self.tiling else self.aspect_ratio)
        if pixels.shape[1:] != (self.size, self.size):
            raise UserError(
                f"The image processor gives {pixels.shape[2]}x{pixels.shape[1]} pixels, but the vision tower takes "
                f"{self.size}x{self.size}: its directory holds a preprocessor_config.json of another tower."
            )
        return Picture(pixels[None], self.features, self.tiling and self.tiling.order_of_whole())

    def tokens(self, folder: str | None, name: str, several: bool = False) -> int:
        """Return how many placeholders an image takes; for images in tiles this reads the header. Raises BadImage."""
        return self.features if self.tiling is None else self.tiling.tokens(folder, name, several)

    def tiles(self, folder: str | None, name: str, several: bool = False) -> int:
        """Return how many times the tower runs for an image. Raises BadImage."""
        return 1 if self.tiling is None else self.tiling.tiles(folder, name, several)


def pixel_values(image: Image.Image, processor: BaseImageProcessor, aspect_ratio: str) -> torch.Tensor:
    """Return the pixels of an RGB image, resized and cropped, uint8 [3, H, W], for `normalise` to make floats of.

    `square`: the processor's own resize and centre crop, which cuts off what does not fit. `pad`: the image is first
    centred on a square of the processor's mean colour, so that all of it is seen. Raises UserError for another value.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"Unknown --image_aspect_ratio {aspect_ratio!r}. Known: {', '.join(ASPECT_RATIOS)}.")
    padded = aspect_ratio == "pad" and image.width != image.height
    shape = resized_shape((max(image.size), max(image.size)) if padded else image.size, processor)
    if padded:
        colour = tuple(int(mean * 255) for mean in processor.image_mean)
        image = resize_padded(image, shape, colour, processor.resample) if shape else pad_to_square(image, colour)
    pixels = resize_and_crop(image, shape, processor)
    if pixels.dtype != np.uint8:
        raise UserError(
            f"The image processor {type(processor).__name__} returns {pixels.dtype} instead of bytes: it does more "
            f"than resize, crop, rescale and normalise, and more is not supported."
        )
    return torch.from_numpy(np.ascontiguousarray(pixels))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Return the image centred on a square of one colour. Raises BadImage if that would be too large."""
    return _centred(image, (_side_of_square(image),) * 2, colour)


def resize_padded(
    image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int], resample: int
) -> Image.Image:
    """Return what `pad_to_square(...).resize(size, resample)` does, bit for bit, in less time.

    Pillow resizes the width first and then the height, and neither changes an area of one colour. So the padding above
    and below a wide image is added between the two, and rows or columns of padding alone are not computed.
    """
    side = _side_of_square(image)
    axis = 1 if image.width > image.height else 0  # along which there is padding
    length, shrinks = size[axis], max(side / size[axis], 1)
    margin = 0
    if resample in SMOOTH_FILTERS:
        # Pillow keeps the edges of a part in fp32. Those at multiples of the length's odd factor have no rounded ends.
        step = length // (length & -length)
        first_seen = (side - image.size[axis]) // 2 - FURTHEST_TAP * shrinks
        margin = max(int(first_seen * length / side), 0) // step * step
    edge, kept = margin * side / length, length - 2 * margin
    if axis == 1:
        image = _centred(image.resize((size[0], image.height), resample), (size[0], side), colour)
        image = image.resize((size[0], kept), resample, box=(0, edge, size[0], side - edge))
    else:
        image = _centred(image, (side, side), colour)
        image = image.resize((kept, size[1]), resample, box=(edge, 0, side - edge, side))
    return image if margin == 0 else _centred(image, size, colour)


def _side_of_square(image: Image.Image) -> int:
    side = max(image.size)
    if Image.MAX_IMAGE_PIXELS is not None and side**2 > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"an image of {image.width}x{image.height} is too large to be padded to a square.")
    return side


def _centred(image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def resize_and_crop(image: Image.Image, shape: tuple[int, int] | None, processor: BaseImageProcessor) -> np.ndarray:
    """Return an RGB image as the processor resizes and crops it, [3, H, W]. `shape`: see `resized_shape`.

    transformers turns the image into an array, back, and into an array again, which takes nearly as long as resizing;
    with a shape Pillow does the same directly.
    """
    if shape is None:
        return processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    image = image.resize(shape, processor.resample)
    if processor.do_center_crop:  # beyond the image's edges it is black, for Pillow as for transformers
        width, height = processor.crop_size["width"], processor.crop_size["height"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if image.size != (width, height):
            image = image.crop((left, top, left + width, top + height))
    return np.stack([np.asarray(channel) for channel in image.split()])


def resized_shape(size: tuple[int, int], processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Return (width, height) to which a processor resizes; None for one that resizes or crops in its own way."""
    # That of saved LLaVA models pads before it resizes, if told to, and differs in nothing else.
    usual = LlavaImageProcessorPil if isinstance(processor, LlavaImageProcessorPil) else PilBackend
    steps = ("preprocess", "process_image", "_preprocess", "resize", "center_crop")
    if any(getattr(type(processor), step, None) is not getattr(usual, step) for step in steps):
        return None
    wanted = dict(processor.size) if processor.do_resize and not processor.do_pad else {}
    if wanted.keys() == {"height", "width"}:
        return wanted["width"], wanted["height"]
    if wanted.keys() == {"shortest_edge"}:
        return tuple(int(wanted["shortest_edge"] * side / min(size)) for side in size)
    return None


def normalisation_table(processor: BaseImageProcessor) -> torch.Tensor:
    """Return the processor's float of each byte in each channel, float32 [3, 256].

    Computed by the processor itself, so that `normalise` gives its floats bit for bit.
    """
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (1, 1, 3)))
    as_it_is = dict(do_resize=False, do_center_crop=False, do_pad=False)
    values = processor(images=ramp, **as_it_is, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(values.astype(np.float32).reshape(3, 256))


def normalise(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return pixels, uint8 [..., 3, H, W], as floats of `normalisation_table`, [3, 256], on the same device."""
    channel = torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
    places = pixels.int() + 256 * channel
    return table.flatten().index_select(0, places.flatten()).view(pixels.shape)
