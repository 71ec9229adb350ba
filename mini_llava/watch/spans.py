"""A sample for a person to read: its tokens as text, in spans that are masked, trained, or an image."""

import itertools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample

MASKED, TRAINED, IMAGE = "masked", "trained", "image"


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind (`masked`, `trained` or `image`), and their number."""

    kind: str
    text: str
    tokens: int


def spans(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return the spans of a sample in order; their texts together are the decoded sample.

    The tokens of an image become `<image x576>`; consecutive images are one span.
    """
    kinds = [
        IMAGE if token == IMAGE_TOKEN_INDEX else MASKED if label == IGNORE_INDEX else TRAINED
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
    ]
    found, ids, text, place = [], [], "", 0
    for kind, run in itertools.groupby(kinds):
        count = len(list(run))
        if kind == IMAGE:
            found.append(Span(kind, f"<image x{count}>", count))
        else:
            # Decoded alone, a span would lose the blank that it may begin with.
            ids += sample.input_ids[place : place + count].tolist()
            longer = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found.append(Span(kind, longer[len(text) :], count))
            text = longer
        place += count
    return found
