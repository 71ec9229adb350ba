"""Image files of unknown origin, read as upright RGB of 8 bits a channel.

A file that cannot be used becomes one clear sentence instead of a dead run, names cannot leave the image folder, and
photographs are turned upright, which LLaVA forgets.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .data.tokenization import shorten
from .errors import UserError
from .words import counted

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
MAX_NAME_BYTES = 4096  # Linux knows no longer path, and following one of megabytes takes minutes
# The formats of photographs and drawings. Pillow knows some fifty, and starts another program (Ghostscript) for some.
Image.init()
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of which width and height are exchanged
MAX_SIDE_RATIO = 200  # a thinner strip than 1:200 fills gigabytes when its short side is resized to the tower's


class BadImage(UserError):
    """An image cannot be used, in one sentence that does not name the record."""


class LinkedFolder(str):
    """An image folder whose symbolic links are followed, wherever they lead: whoever made it has put them there."""


def image_path(folder: str | os.PathLike, name: str) -> str:
    """Return the path of an image that exists inside `folder`; its name is relative to it, or absolute.

    Raises BadImage if there is no such file, or if the name leads out of the folder, as an absolute one, by `..` or,
    unless it is a LinkedFolder, by a symbolic link: names come with the data, which need not come from whoever runs the
    training.
    """
    follows = isinstance(folder, LinkedFolder)
    resolve = os.path.abspath if follows else os.path.realpath
    root = resolve(folder)
    try:
        possible = len(os.fsencode(name)) <= MAX_NAME_BYTES and "\0" not in name
    except UnicodeEncodeError:
        possible = False
    path = resolve(os.path.join(root, name)) if possible else root
    if os.path.commonpath([root, path]) != root:
        by_link = not follows and os.path.commonpath([root, os.path.abspath(os.path.join(root, name))]) == root
        raise BadImage(
            f"the image {shorten(name)} leads out of the image folder {folder}, to {shorten(path)}."
            + " It does so by a symbolic link, which --follow_links True allows." * by_link
        )
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
    """Return the width and height that `load_image` will give, from the file's header. Raises BadImage."""
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
    """Return whether a PNG has EXIF data or texts after its pixels, as its list of chunks says."""
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
    """Yield a file opened by Pillow; any exception in the block becomes a BadImage."""
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
