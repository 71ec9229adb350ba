"""From an image file to pixel values.

Replaces the image half of LLaVA's dataset and its `expand2square`. A file that cannot be used becomes one clear
sentence instead of a dead run, names cannot leave the image folder, and the processor is pinned to its PIL version, so
that pixels do not depend on what else is installed. Photographs are turned upright, which LLaVA forgets. Pixels stay
bytes until they are on the device, a quarter of the floats' size; there a table gives the processor's own floats.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from PIL import ExifTags, Image, ImageOps
from transformers import LlavaImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor

from ..words import counted
from .tokenization import shorten

CONVERTED, SCALED, REFUSED = "by Pillow's convert", "scaled to 8 bits", "refused"
# Each of Pillow's modes, as its formats give them, and how it becomes RGB. Pillow's own convert is right up to 8 bits;
# of more it makes white whatever is above 255.
MODES = {
    "1": CONVERTED,
    "L": CONVERTED,
    "P": CONVERTED,  # transparent colours are seen, as in LLaVA
    "PA": CONVERTED,
    "LA": CONVERTED,  # alpha is dropped, as in LLaVA
    "La": CONVERTED,  # by way of LA, as Pillow knows no other
    "RGB": CONVERTED,  # 16-bit colours too: Pillow reads the upper 8 bits of them
    "RGBA": CONVERTED,
    "RGBa": CONVERTED,
    "RGBX": CONVERTED,
    "CMYK": CONVERTED,
    "YCbCr": CONVERTED,
    "LAB": CONVERTED,
    "HSV": CONVERTED,
    "I;16": SCALED,  # 16-bit grey of PNG, TIFF and JPEG 2000, 12-bit grey of TIFF
    "I;16L": SCALED,
    "I;16B": SCALED,
    "I;16N": SCALED,
    "I": SCALED,  # of PGM and PNG, where Pillow has brought it to 16 bits; of TIFF refused: signed, or of 32 bits
    "F": REFUSED,  # no format tells which value is white
}
PHOTOMETRIC, BITS, SAMPLE_FORMAT = 262, 258, 339  # tags of a TIFF
ASPECT_RATIOS = ("pad", "square")  # of one picture as a whole; tiles are made in options/tiles.py
MAX_NAME_BYTES = 4096  # Linux knows no longer path, and following one of megabytes takes minutes
# The formats of photographs and drawings. Pillow knows some fifty, and starts another program (Ghostscript) for some.
Image.init()
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of which width and height are exchanged
SMOOTH_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
FURTHEST_TAP = 3  # pixels of the result that a value looks beyond itself: those of Lanczos, the others fewer
MAX_SIDE_RATIO = 200  # a thinner strip than 1:200 fills gigabytes when its short side is resized to the tower's


NEWLINE = -1  # in the order of a picture's features: the learned embedding that ends a row of them


class BadImage(ValueError):
    """One sentence about why an image cannot be used; whoever knows it adds the record."""


@dataclass(frozen=True)
class Picture:
    """What the vision tower gets of an image, and which of its features go to the image's placeholders.

    Attributes:
        pixels: uint8 [tiles, 3, S, S]; one tile, unless options/tiles.py has split the image up.
        features: how many the tower makes of all tiles.
        order: int32 [tokens], for each placeholder the number of its feature, counted through the tiles, or NEWLINE;
            None: all features as they come.
    """

    pixels: torch.Tensor
    features: int
    order: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """How many placeholders it takes."""
        return self.features if self.order is None else len(self.order)


def image_path(folder: str | os.PathLike, name: str) -> str:
    """The path of an image that exists inside `folder`.

    Raises BadImage if there is no such file, if the name is absolute, or if it leads out of the folder by `..` or a
    symbolic link: names come with the data, which need not come from whoever runs the training.
    """
    root = os.path.realpath(folder)
    if os.path.isabs(name) or "\0" in name:
        raise BadImage(f"the image name {shorten(name)} is not relative to the image folder {folder}.")
    try:
        possible = len(os.fsencode(name)) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        possible = False
    path = os.path.realpath(os.path.join(root, name)) if possible else root
    if os.path.commonpath([root, path]) != root:
        raise BadImage(f"the image {shorten(name)} leads out of the image folder {folder}, to {shorten(path)}.")
    if not os.path.isfile(path):
        raise BadImage(f"the image {shorten(name)} is not in the image folder {folder}.")
    return path


def load_image(folder: str | os.PathLike, name: str) -> Image.Image:
    """Read an image as upright RGB, 8 bits a channel, from the modes that `MODES` lists.

    Pillow's limit against decompression bombs holds. Raises BadImage for whatever keeps a file from being read whole,
    and for pixels that no format says the range of.
    """
    path = image_path(folder, name)
    with _opened(path) as file:
        white = white_value(file)
        ImageOps.exif_transpose(file, in_place=True)
        file.load()
        image = as_rgb(file, white)
    _check_sides(path, image.size)
    # convert() keeps a palette's transparent colour as a note, for which transformers would paint the image on white.
    image.info = {}
    return image


def image_size(folder: str | os.PathLike, name: str) -> tuple[int, int]:
    """Width and height that `load_image` will give, from the file's header. Raises BadImage."""
    path = image_path(folder, name)
    with _opened(path) as file:
        white_value(file)  # refuses what load_image will refuse
        size = file.size
        # Asked for its EXIF data Pillow decodes a whole PNG, for they may stand behind its pixels.
        header_only = file.format == "PNG" and not _has_notes_behind_pixels(path)
        exif = Image.Image.getexif(file) if header_only else file.getexif()
        # A TIFF's size is that of the upright picture already.
        if file.format != "TIFF" and exif.get(ExifTags.Base.Orientation) in SIDEWAYS:
            size = size[::-1]
    _check_sides(path, size)
    return size


def white_value(image: Image.Image) -> int:
    """Return the pixel value that is white in an opened file, as its format says; 255 where Pillow's convert is right.

    Raises BadImage where the format leaves it open, for guessed ranges make a picture black or white.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    what = MODES.get(image.mode, REFUSED)
    if tags.get(SAMPLE_FORMAT, (1,))[0] == 2:
        raise BadImage("it has pixels with a sign, and its format does not say which value is white")
    if what == CONVERTED:
        return 255
    if what == REFUSED or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point pixels" if image.mode == "F" else f"pixels of Pillow's mode {image.mode}"
        raise BadImage(f"it has {kind}, and its format does not say which value is white")
    return 2 ** tags.get(BITS, (16,))[0] - 1


def as_rgb(image: Image.Image, white: int) -> Image.Image:
    """Return an image of any mode of `MODES` as RGB; `white`: see `white_value`."""
    if image.mode == "RGB":
        return image  # which convert would copy
    if white == 255:
        return (image.convert("LA") if image.mode == "La" else image).convert("RGB")
    grey = np.asarray(image).astype(np.uint32)
    grey = ((grey * 255 + white // 2) // white).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # white is 0: of 8 bits Pillow knows, not of 16
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _has_notes_behind_pixels(path: str) -> bool:
    """Whether a PNG has EXIF data or texts after its pixels, as its list of chunks says."""
    pixels_seen = False
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            pixels_seen = pixels_seen or kind == b"IDAT"
            if pixels_seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """A file opened by Pillow; whatever goes wrong in the block becomes a BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd EXIF data and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From a stream: of a name Pillow maps uncompressed TIFFs into memory, and reads sideways ones by rows of
            # their height.
            with open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as file:
                yield file
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"the image {shorten(path)} is too large to be read safely: {error}") from error
    except BadImage as error:
        raise BadImage(
            f"the image {shorten(path)} cannot be used: {error}. Convert it to 8 bits, or to 16 without a sign."
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        size = os.path.getsize(path)
        detail = (
            "the file is empty" if size == 0 else f"{type(error).__name__}: {error} (a file of {counted(size, 'byte')})"
        )
        raise BadImage(f"the image {shorten(path)} cannot be read: {detail}.") from error


def _check_sides(path: str, size: tuple[int, int]) -> None:
    if max(size) > MAX_SIDE_RATIO * min(size):
        raise BadImage(
            f"the image {shorten(path)} is {size[0]}x{size[1]}; sides beyond 1:{MAX_SIDE_RATIO} are refused."
        )


def open_picture(
    folder: str | os.PathLike,
    name: str,
    processor: BaseImageProcessor,
    aspect_ratio: str,
    size: int,
    features: int,
    tiling,
) -> Picture:
    """Open an image file for a vision tower that takes `size` pixels square and makes `features` of them.

    Args:
        tiling: what splits images of `aspect_ratio` "anyres" (`options.tiles.Tiling`); None: they stay whole.

    Raises:
        BadImage: the file cannot be used.
        ValueError: processor and tower disagree.
    """
    image = load_image(folder, name)
    if tiling is not None:
        return tiling.open(image, processor.resample)
    pixels = pixel_values(image, processor, aspect_ratio)
    if pixels.shape[1:] != (size, size):
        raise ValueError(
            f"The image processor gives {pixels.shape[2]}x{pixels.shape[1]} pixels, but the vision tower takes "
            f"{size}x{size}: its directory holds a preprocessor_config.json of another tower."
        )
    return Picture(pixels[None], features)


def pixel_values(image: Image.Image, processor: BaseImageProcessor, aspect_ratio: str) -> torch.Tensor:
    """Pixel values of one RGB image, uint8 [3, H, W]: resized and cropped, for `normalise` to make floats of.

    `square`: the processor's own resize and centre crop, which cuts off what does not fit. `pad`: the image is first
    centred on a square of the processor's mean colour, so that all of it is seen. Raises ValueError for another value.
    """
    if aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(f"Unknown --image_aspect_ratio {aspect_ratio!r}. Known: {', '.join(ASPECT_RATIOS)}.")
    padded = aspect_ratio == "pad" and image.width != image.height
    shape = resized_shape((max(image.size), max(image.size)) if padded else image.size, processor)
    if padded:
        colour = tuple(int(mean * 255) for mean in processor.image_mean)
        image = resize_padded(image, shape, colour, processor.resample) if shape else pad_to_square(image, colour)
    pixels = resize_and_crop(image, shape, processor)
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"The image processor {type(processor).__name__} gives {pixels.dtype} where bytes should be: it does more "
            f"than resize, crop, rescale and normalise, which is all that can be done to images here."
        )
    return torch.from_numpy(np.ascontiguousarray(pixels))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of one colour. Raises BadImage if that would be too large."""
    return _centred(image, (_side_of_square(image),) * 2, colour)


def resize_padded(
    image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int], resample: int
) -> Image.Image:
    """What `pad_to_square(...).resize(size, resample)` gives, to the last bit, for less work.

    Pillow resizes the width first and then the height, and what is of one colour comes out of both as it is. So what is
    above and below a wide image is added between the two, and what shows padding alone in the end is not computed.
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
    """What the processor does to an RGB image before it makes floats of it, [3, H, W]. `shape`: see `resized_shape`.

    transformers turns the image into an array, back, and into an array again, which takes nearly as long as resizing;
    with a shape the same is asked of Pillow directly.
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
    """Width and height to which the processor resizes an image; None if it does so, or crops, in a way of its own."""
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
    """What the processor makes of each of the 256 values of a byte in each channel, float32 [3, 256].

    Made by the processor itself, so that `normalise` gives its floats to the last bit.
    """
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (1, 1, 3)))
    as_it_is = dict(do_resize=False, do_center_crop=False, do_pad=False)
    values = processor(images=ramp, **as_it_is, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(values.astype(np.float32).reshape(3, 256))


def normalise(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] and `normalisation_table`'s [3, 256], on one device -> the table's dtype, same shape."""
    channel = torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
    places = pixels.int() + 256 * channel
    return table.flatten().index_select(0, places.flatten()).view(pixels.shape)


def load_image_processor(path: str | os.PathLike) -> BaseImageProcessor:
    """The image processor of a vision tower, folder or hub name, in its PIL version.

    Chosen by the class name in the settings, CLIP's old feature extractor included: AutoImageProcessor would take the
    torchvision version where it is installed, whose pixels differ slightly, and in some versions demands it. Code from
    the folder is never run. Raises ValueError if there is no PIL version.
    """
    settings, _ = BaseImageProcessor.get_image_processor_dict(path)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "none"
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    processor_class = getattr(transformers, f"{family}ImageProcessorPil", None)
    if processor_class is None:
        raise ValueError(
            f"The image processor of {path} is {name!r}, of which transformers {transformers.__version__} has no PIL "
            f"version; CLIP's and SigLIP's have one."
        )
    return processor_class.from_pretrained(path)


def of_size(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """The same processor for square pictures of another size, pixels."""
    settings = processor.to_dict()
    settings.pop("image_processor_type", None)
    for name in ("size", "crop_size"):
        if settings.get(name):
            settings[name] = {key: size for key, value in dict(settings[name]).items() if value is not None}
    return type(processor)(**settings)


def output_size(processor: BaseImageProcessor) -> int:
    """Side of the square pictures that the processor makes, pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    return dict(size)["height"]
