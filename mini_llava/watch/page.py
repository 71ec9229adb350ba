"""Images with coloured text on their right for TensorBoard, drawn by matplotlib without a display."""

import itertools
import math
import re
import warnings
from collections.abc import Sequence
from unicodedata import east_asian_width

import numpy as np

WIDTH, PICTURE, MARGIN, MOST_LINES = 720, 180, 12, 16  # pixels, and lines of text
# All letters of a monospaced font are equally wide, so that text is wrapped by counting; the other font has the rest.
FONTS, SIZE, LETTER, LINE = ["DejaVu Sans Mono", "DejaVu Sans"], 13, 13 * 0.602, 18  # pixels


def draw(title: str, pictures: Sequence[np.ndarray], text: Sequence[tuple[str, str, str | None]]) -> np.ndarray:
    """Return uint8 [H, `WIDTH`, 3]: the title, below it the images, and the text on their right.

    Args:
        pictures: uint8 [H, W, 3] each, of any size; shown as a square of small ones.
        text: pieces with their colour and background colour (None: white).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    left = MARGIN + (PICTURE + MARGIN if pictures else 0)
    titles, lines = _lines([(title, "black", None)], WIDTH - 2 * MARGIN), _lines(text, WIDTH - left - MARGIN)
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [[(f"… {len(lines) - MOST_LINES + 1} more lines", "black", None)]]
    top = MARGIN + len(titles) * LINE
    height = top + max(len(lines) * LINE, PICTURE if pictures else 0) + MARGIN
    figure = Figure((WIDTH / 72, height / 72), dpi=72)  # at 72 dots an inch a point is a pixel
    columns = math.ceil(math.sqrt(len(pictures)))
    for number, picture in enumerate(pictures):
        side, (row, column) = PICTURE / columns, divmod(number, columns)
        place = (MARGIN + column * side) / WIDTH, 1 - (top + row * side + side) / height
        axes = figure.add_axes((*place, (side - 2) / WIDTH, (side - 2) / height), anchor="NW")
        axes.imshow(picture)
        axes.set_axis_off()
    for number, line in enumerate(titles + lines):
        x, y = MARGIN if number < len(titles) else left, 1 - (MARGIN + (number + 0.75) * LINE) / height
        for (ink, paper), words in itertools.groupby(line, key=lambda word: word[1:]):
            words = "".join(word for word, *_ in words)
            wide = _columns(words) * LETTER
            if paper:
                corner = x / WIDTH, y - 0.2 * LINE / height
                figure.add_artist(Rectangle(corner, wide / WIDTH, 0.95 * LINE / height, color=paper, linewidth=0))
            figure.text(x / WIDTH, y, words, color=ink, family=FONTS, size=SIZE, parse_math=False)
            x += wide
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in both fonts, drawn as a box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _lines(text: Sequence[tuple], width: int) -> list[list[tuple]]:
    """Wrap pieces of text into lines: between words, at newlines, and within long words."""
    lines, columns = [[]], int(width / LETTER)
    for piece, *colours in text:
        for word in re.findall(rf"\n|[^\S\n]+|\S{{1,{columns // 2}}}", piece):
            full = sum(_columns(word) for word, *_ in lines[-1]) + _columns(word) > columns
            if word == "\n" or full:
                lines.append([])
            if word != "\n" and not (full and word.isspace()):
                lines[-1].append((word, *colours))
    return lines if lines[-1] else lines[:-1]


def _columns(text: str) -> int:
    """Return how many letters wide a text is; Chinese letters and emojis are two."""
    return sum(1 + (east_asian_width(letter) in "WF") for letter in text)
