"""Pictures of the first batch for TensorBoard: pixels as the tower gets them, masked tokens grey, trained ones green.

Most that goes wrong with data shows here at a glance: a wrong template, a picture cut in half, answers not trained.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from ..data.images import BadImage
from ..data.samples import Samples
from ..data.tokenization import IGNORE_INDEX, BadRecord
from ..guards.never_fatal import never_fatal
from ..words import counted
from .spans import IMAGE, MASKED, TRAINED, Span, spans

SAMPLES = 8
WIDTH, PICTURE, MARGIN, LINE, MOST_LINES = 720, 180, 12, 22, 16  # pixels, and lines of text a sample
INK = {MASKED: "#858585", TRAINED: "#0b5d1e", IMAGE: "#2357a5"}
PAPER = {TRAINED: "#d3f0d8", IMAGE: "#e1ebf8"}


@dataclass
class Shown:
    """A sample as it is drawn: what stands above it, its pictures uint8 [3, H, W], its text."""

    title: list[str]
    pictures: list[torch.Tensor]
    text: list[Span]


def show(
    accelerator: Accelerator,
    samples: Samples,
    dealt: Iterator[list[list[list[int]]]],
    step: int,
) -> None:
    """Gives TensorBoard, if it is in use, pictures of some samples of the first global batch; never ends the run.

    dealt: the global batches to come, dealt over ranks and micro-batches.
    """
    trackers = [tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"]
    if not (trackers and accelerator.is_main_process):
        return
    with never_fatal("there is no picture of the first batch"):
        batch = [index for micro_batch in next(dealt, []) for of_rank in micro_batch for index in of_rank]
        every = max(1, len(batch) // SAMPLES)  # they are sorted by length: some of all lengths
        for number, index in enumerate(batch[::every][:SAMPLES], start=1):
            if sample := _sample(samples, index):
                name, pixels = f"samples/first_batch_{number}", np.asarray(draw(sample))
                trackers[0].writer.add_image(name, pixels, step, dataformats="HWC")


def _sample(samples: Samples, index: int) -> Shown | None:
    """None for a bad one, of which the loop tells."""
    try:
        sample = samples[index]
    except (BadRecord, BadImage):
        return None
    pictures = [tile for picture in sample.pictures for tile in picture.pixels]
    trained = int((sample.labels != IGNORE_INDEX).sum())
    title = [samples.describe(index), f"{counted(len(sample.input_ids), 'token')}, {trained:,} trained"]
    return Shown(title, pictures, spans(sample, samples.tokenizer))


def draw(sample: Shown) -> Image.Image:
    """The sample, RGB, `WIDTH` pixels wide: its title, below it its pictures beside its text."""
    font, bold = _font("DejaVuSans"), _font("DejaVuSans-Bold")
    left, top = MARGIN + (PICTURE + MARGIN if sample.pictures else 0), MARGIN
    title = [line for words in sample.title for line in _lines([Span(MASKED, words, 0)], bold, WIDTH - 2 * MARGIN)]
    lines = list(_lines(sample.text, font, WIDTH - left - MARGIN))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [[(MASKED, f"… {len(lines) - MOST_LINES + 1} more lines")]]
    below_title = top + len(title) * LINE + 6
    height = max(len(lines) * LINE, PICTURE if sample.pictures else 0)
    image = Image.new("RGB", (WIDTH, below_title + height + MARGIN), "white")
    canvas = ImageDraw.Draw(image)
    for number, line in enumerate(title):
        canvas.text((MARGIN, top + number * LINE), "".join(text for _, text in line), fill="black", font=bold)
    columns = math.ceil(math.sqrt(len(sample.pictures)))
    for number, picture in enumerate(sample.pictures):
        side = PICTURE // columns
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side - 2, side - 2))
        image.paste(small, (MARGIN + number % columns * side, below_title + number // columns * side))
    for number, line in enumerate(lines):
        x, y = left, below_title + number * LINE
        for kind, text in line:
            width = font.getlength(text)
            if kind in PAPER:
                canvas.rectangle((x, y, x + width, y + LINE - 2), fill=PAPER[kind])
            canvas.text((x, y), text, fill=INK[kind], font=font)
            x += width
    return image


def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings fonts for Greek, Cyrillic and signs; Pillow's own knows Latin letters only

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", 16)


def _lines(text: Sequence[Span], font: ImageFont.FreeTypeFont, width: int) -> Iterator[list[tuple[str, str]]]:
    """(kind, text) of each line: broken between words, at newlines, and within words that are wider than a line."""
    line, used = [], 0.0
    for span in text:
        for word in re.findall(r"\n|[^\S\n]+|\S{1,60}", span.text):
            newline = word == "\n"
            size = font.getlength("↵" if newline else word)
            if line and used + size > width:
                yield line
                line, used = [], 0.0
                if word.isspace() and not newline:
                    continue
            line.append((span.kind, "↵" if newline else word))
            used += size
            if newline:
                yield line
                line, used = [], 0.0
    if line:
        yield line
