"""Pictures of the first batch for TensorBoard: images as the tower gets them, masked tokens grey, trained ones green.

They show a wrong template, a cropped image or answers that are not trained.
"""

from collections.abc import Iterator

import numpy as np
from accelerate import Accelerator

from ..data.samples import Samples
from ..data.templates import BadRecord
from ..data.tokenization import IGNORE_INDEX
from ..guards.never_fatal import never_fatal
from ..image_files import BadImage
from ..words import counted
from .page import draw
from .spans import IMAGE, MASKED, TRAINED, spans

SAMPLES = 8
INK = {MASKED: "#858585", TRAINED: "#0b5d1e", IMAGE: "#2357a5"}
PAPER = {TRAINED: "#d3f0d8", IMAGE: "#e1ebf8"}


def show(accelerator: Accelerator, samples: Samples, dealt: Iterator[list[list[list[int]]]], step: int) -> None:
    """Give TensorBoard, if it is in use, pictures of some samples of the first global batch; never end the run.

    dealt: the global batches to come, dealt over ranks and micro-batches.
    """
    trackers = [tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"]
    if not (trackers and accelerator.is_main_process):
        return
    with never_fatal("there is no picture of the first batch"):
        batch = [index for micro_batch in next(dealt, []) for of_rank in micro_batch for index in of_rank]
        every = max(1, len(batch) // SAMPLES)  # sorted by length: some of each length
        for number, index in enumerate(batch[::every][:SAMPLES], start=1):
            if (pixels := _draw(samples, index)) is not None:
                trackers[0].writer.add_image(f"samples/first_batch_{number}", pixels, step, dataformats="HWC")


def _draw(samples: Samples, index: int) -> np.ndarray | None:
    """Return a sample as it is trained, uint8 [H, W, 3]; None for a bad one, which the loop reports."""
    try:
        sample = samples[index]
    except (BadRecord, BadImage):
        return None
    pictures = [tile.permute(1, 2, 0).numpy() for picture in sample.pictures for tile in picture.pixels]
    trained = int((sample.labels != IGNORE_INDEX).sum())
    title = f"{samples.describe(index)}\n{counted(len(sample.input_ids), 'token')}, {trained:,} trained"
    parts = spans(sample, samples.tokenizer)
    return draw(
        title, pictures, [(part.text.replace("\n", "↵\n"), INK[part.kind], PAPER.get(part.kind)) for part in parts]
    )
