"""Images of any resolution in tiles of the vision tower's size: LLaVA-1.6's `anyres`.

Replaces `process_anyres_image` of LLaVA's `mm_utils.py` and the unpadding in its `llava_arch.py`, which counts and
reshapes on the GPU. Here an image's header gives, on the CPU, how many tokens it has and in which order its features
come, so that texts are tokenized and batches dealt before an image is opened.
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from ..data.images import NEWLINE, Picture
from ..errors import UserError
from ..formats.layouts import MERGE_TYPES, find_projector
from ..image_files import BadImage, image_size
from ..model.projector import read_tensors

NEWLINE_KEY = "image_newline"  # its name in a projector's file
# LLaVA-1.6's resolutions, as columns and rows of tiles.
LLAVA_1_6 = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MOST_RATIO = 1.1  # on a side, by which LLaVA-OneVision lets features be too many
MOST_TILES = 64  # of one image: far more than any model was trained with, and far less than would fill a GPU


@dataclass(frozen=True)
class Tiling:
    """How images are split into tiles, and how the features of the tiles are joined.

    Attributes:
        pinpoints: (width, height) in pixels that the tiles may add up to; the best fitting one is taken.
        merge_type: `flat`: tile after tile; `spatial`: row by row of the whole image; `spatial_unpad`: without the
            padding, and with a newline at the end of each row.
        tile_size: side of a tile, pixels.
        grid: features on a side of a tile.
        max_tiles: N of LLaVA-OneVision's `anyres_max_N`: the features of a picture that has many more than N tiles have
            are interpolated to about as many, and each of several images of a record is shown whole, in one tile;
            only with `spatial_unpad`. None: neither.
    """

    pinpoints: tuple[tuple[int, int], ...]
    merge_type: str
    tile_size: int
    grid: int
    max_tiles: int | None = None

    def __post_init__(self):
        if self.merge_type not in MERGE_TYPES:
            raise UserError(f"--mm_patch_merge_type {self.merge_type}: known values are {', '.join(MERGE_TYPES)}.")
        for width, height in self.pinpoints:
            if min(width, height) <= 0 or width % self.tile_size or height % self.tile_size:
                raise UserError(
                    f"--image_grid_pinpoints: {width}x{height} is not made up of tiles of the vision tower's "
                    f"{self.tile_size} pixels."
                )
            if (tiles := width * height // self.tile_size**2) > MOST_TILES:
                raise UserError(f"--image_grid_pinpoints: {width}x{height} are {tiles} tiles; at most {MOST_TILES}.")

    @property
    def has_newline(self) -> bool:
        return self.merge_type == "spatial_unpad"

    @property
    def interpolates(self) -> bool:
        """Return whether the features of any image are interpolated."""
        features = self.grid / self.tile_size  # a pixel
        return any(self._interpolated_shape(round(h * features), round(w * features)) for w, h in self.pinpoints)

    def shows_whole(self, several: bool) -> bool:
        """Return whether an image is shown in one tile, padded to a square; `several`: its record has others too."""
        return several and self.max_tiles is not None

    def order_of_whole(self) -> np.ndarray:
        """Return `Picture.order` of an image in one tile: its features as they come, and one newline."""
        return np.append(np.arange(self.grid**2, dtype=np.int32), np.int32(NEWLINE))

    def tokens(self, folder: str | None, name: str, several: bool = False) -> int:
        """Return how many image tokens a file has; at most its header is read. Raises BadImage."""
        if self.shows_whole(several):
            return len(self.order_of_whole())
        if folder is None:
            raise BadImage(f"it has the image {name!r}, but no --image_folder is given.")
        return len(self.arrange(image_size(folder, name))[0])

    def tiles(self, folder: str, name: str, several: bool = False) -> int:
        """Return how many tiles a file has, the whole image among them; at most its header is read."""
        if self.shows_whole(several):
            return 1
        width, height = self.resolution(image_size(folder, name))
        return 1 + width * height // self.tile_size**2

    def resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the pinpoint that keeps most pixels of an image of (width, height), then wastes fewest."""
        pinpoints = [(height, width) for width, height in self.pinpoints]
        height, width = select_best_resolution((size[1], size[0]), pinpoints)
        return width, height

    def open(self, image: Image.Image, resample: Image.Resampling) -> Picture:
        """Return an image as tiles, the whole image first, resized with the image processor's filter."""
        pixels = np.stack([np.asarray(tile) for tile in self.cut(image, resample)]).transpose(0, 3, 1, 2)
        tiles = torch.from_numpy(np.ascontiguousarray(pixels))
        return Picture(tiles, len(tiles) * self.grid**2, *self.arrange(image.size))

    def cut(self, image: Image.Image, resample: Image.Resampling) -> list[Image.Image]:
        """Return the whole image resized to one tile, then the tiles row by row, padded with black."""
        side, (width, height) = self.tile_size, self.resolution(image.size)
        scale_x, scale_y = width / image.width, height / image.height
        if scale_x < scale_y:
            inner = width, min(math.ceil(image.height * scale_x), height)
        else:
            inner = min(math.ceil(image.width * scale_y), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        return [image.resize((side, side), resample), *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]

    def arrange(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return `Picture.order` and `Picture.weights` for an image of (width, height)."""
        grid, (width, height) = self.grid, self.resolution(size)
        columns, rows = width // self.tile_size, height // self.tile_size
        of_whole = np.arange(grid**2, dtype=np.int32)
        numbers = np.arange(grid**2, (1 + rows * columns) * grid**2, dtype=np.int32)
        if self.merge_type == "flat":
            return np.concatenate([of_whole, numbers]), None
        picture = numbers.reshape(rows, columns, grid, grid).swapaxes(1, 2).reshape(rows * grid, columns * grid)
        if self.merge_type == "spatial_unpad":
            picture = self._unpadded(picture, size)
            if shape := self._interpolated_shape(*picture.shape):
                return _interpolated(of_whole, picture, shape)
            picture = np.concatenate([picture, np.full((len(picture), 1), NEWLINE, np.int32)], axis=1)
        return np.concatenate([of_whole, picture.reshape(-1)]), None

    def _interpolated_shape(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Return to which rows and columns of features LLaVA-OneVision interpolates so many; None: it leaves them."""
        if self.max_tiles is None:
            return None
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.grid**2))
        # Where LLaVA-OneVision's code would fail, a strip keeps one row or column.
        return (max(1, int(rows // ratio)), max(1, int(columns // ratio))) if ratio > MOST_RATIO else None

    @staticmethod
    def _unpadded(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Remove the rows or columns of padding, counted as transformers' `unpad_image` does."""
        (height, width), (rows, columns) = (size[1], size[0]), picture.shape
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return picture[padding : rows - padding]
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return picture[:, padding : columns - padding]


def choose_tiling(
    tile_size: int,
    tokens_per_tile: int,
    merge_type: str | None = None,
    pinpoints: str | Sequence | None = None,
    max_tiles: int | None = None,
) -> Tiling:
    """Return the tiling for a vision tower with `tokens_per_tile` features for `tile_size` pixels.

    Args:
        merge_type: None: LLaVA-1.6's.
        pinpoints: pairs of width and height, or such a list as text, or a range of columns and rows as LLaVA-OneVision
            writes it, "(1x1),...,(6x6)"; None: LLaVA-1.6's, in tiles of this tower.
        max_tiles: see `Tiling`.

    Raises:
        UserError: the tower's features do not form a square, or a value makes no sense.
    """
    grid = math.isqrt(tokens_per_tile)
    if grid**2 != tokens_per_tile:
        raise UserError(
            f"--image_aspect_ratio anyres arranges features by their place in the picture, but the vision tower gives "
            f"{tokens_per_tile}, not a square number: drop the class token with --mm_vision_select_feature patch."
        )
    if pinpoints is None:
        pinpoints = [(columns * tile_size, rows * tile_size) for columns, rows in LLAVA_1_6]
    if isinstance(pinpoints, str) and (grids := re.findall(r"\((\d+)x(\d+)\)", pinpoints)):
        (left, top), (right, bottom) = [(int(columns), int(rows)) for columns, rows in (grids[0], grids[-1])]
        ranges = range(left, right + 1), range(top, bottom + 1)
        pinpoints = [(columns * tile_size, rows * tile_size) for columns in ranges[0] for rows in ranges[1]]
    return Tiling(read_pinpoints(pinpoints), merge_type or "spatial_unpad", tile_size, grid, max_tiles)


def _interpolated(of_whole: np.ndarray, picture: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return order and weights of a picture whose features, [rows, columns], are interpolated to another shape.

    As `torch.nn.functional.interpolate` does with mode "bilinear": a place of the new grid takes the four features
    around it. A feature that is taken as it is, and a newline, are four quarters of it.
    """
    (upper, lower, down), (left, right, across) = (
        _neighbours(*sides) for sides in zip(picture.shape, shape, strict=True)
    )
    corners = [(upper, left), (upper, right), (lower, left), (lower, right)]
    order = np.stack([picture[rows[:, None], columns] for rows, columns in corners], axis=-1)
    shares = [(rows, columns) for rows in (1 - down, down) for columns in (1 - across, across)]
    weights = np.stack([np.outer(rows, columns) for rows, columns in shares], axis=-1).astype(np.float32)
    at_row_ends = ((0, 0), (0, 1), (0, 0))
    order = np.pad(order, at_row_ends, constant_values=NEWLINE).reshape(-1, 4)
    weights = np.pad(weights, at_row_ends, constant_values=1 / 4).reshape(-1, 4)
    before = ((len(of_whole), 0), (0, 0))
    return np.concatenate([np.tile(of_whole[:, None], 4), order]), np.pad(weights, before, constant_values=1 / 4)


def _neighbours(side: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each of `new` places on a side of features the feature before it, the one after, and its share."""
    place = np.maximum((np.arange(new) + 0.5) * side / new - 0.5, 0)
    before = place.astype(np.int32)
    return before, np.minimum(before + 1, side - 1), place - before


def read_pinpoints(value: str | Sequence) -> tuple[tuple[int, int], ...]:
    """Return the pairs of `[(336, 672), (672, 336)]`, a list or its text. Raises UserError."""
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        pinpoints = tuple((width, height) for width, height in pairs)
    except (ValueError, SyntaxError, TypeError):
        pinpoints = ()
    if not pinpoints or not all(isinstance(side, int) for pair in pinpoints for side in pair):
        raise UserError(
            f"--image_grid_pinpoints {value}: expected a list of widths and heights in pixels, such as "
            f'"[(336, 672), (672, 336), (672, 672)]".'
        )
    return pinpoints


class ImageNewline(nn.Module):
    """LLaVA-1.6's learned embedding at the end of each row of features: trained and saved with the projector."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Append the embedding: [features, width] -> [features + 1, width]."""
        return torch.cat([features, self.weight[None].to(features.dtype)])

    @torch.no_grad()
    def load_beside_projector(self, path: str | Path) -> None:
        """Read the newline from a projector's file, if it has one. Raises UserError for another width."""
        path = find_projector(path)
        for key, tensor in read_tensors(path).items():
            if key.endswith(NEWLINE_KEY):
                if tensor.shape != self.weight.shape:
                    needed = list(self.weight.shape)
                    raise UserError(f"{path}: {key} is {list(tensor.shape)}, but this model needs {needed}.")
                self.weight.copy_(tensor)
