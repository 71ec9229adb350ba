"""Some held-out questions with the model's answers, as JSON lines, as a table and as a picture for TensorBoard.

They are the same at every evaluation, so that one sees how the answers change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageOps

from ..image_files import load_image
from ..watch.page import PICTURE, draw

MOST_PICTURES = 2  # of one question
BLACK, GREY, GREEN, RED = "#111111", "#777777", "#0a7d28", "#b81414"


@dataclass
class ShownAnswer:
    """One question of an evaluation. images: (image folder, image name); loss: mean over the record's tokens."""

    record: str
    images: list[tuple[str, str]]
    question: str
    expected: str
    answer: str
    right: bool
    loss: float

    def as_entry(self, step: int) -> dict:
        """Return the line in `eval_samples.jsonl`."""
        return {"step": step, **vars(self), "images": [name for _, name in self.images]}


def as_table(shown: Sequence[ShownAnswer]) -> str:
    """Return a table in Markdown for TensorBoard, with the characters that the picture's font lacks."""
    rows = ["| record | question | expected | answer | | loss |", "|---|---|---|---|---|---|"]
    for sample in shown:
        cells = [sample.record, sample.question, sample.expected, sample.answer]
        # Markup is escaped, and a line break would end the row.
        cells = [cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|") for cell in cells]
        cells = ["<br>".join(cell.splitlines()) for cell in cells]
        rows.append(f"| {' | '.join(cells)} | {'right' if sample.right else 'wrong'} | {sample.loss:.4f} |")
    return "\n".join(rows)


def as_picture(shown: Sequence[ShownAnswer]) -> np.ndarray:
    """Return uint8 [H, W, 3]: the questions below each other, each with its images on the left."""
    drawn = []
    for sample in shown:
        texts = (
            (sample.question, 200, BLACK),
            (f"expected: {sample.expected}", 130, GREY),
            (f"answer: {sample.answer}", 130, GREEN if sample.right else RED),
            (f"loss {sample.loss:.4f}", 130, GREY),
        )
        texts = [(f"{text[:most]} ...\n" if len(text) > most else f"{text}\n", ink, None) for text, most, ink in texts]
        pictures = [load_image(folder, name) for folder, name in sample.images[:MOST_PICTURES]]
        small = [np.asarray(ImageOps.contain(picture, (PICTURE, PICTURE))) for picture in pictures]
        drawn.append(draw(sample.record, small, texts))
    return np.concatenate(drawn)
