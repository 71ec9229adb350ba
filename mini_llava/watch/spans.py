"""A sample as a person reads it: its tokens as text again, in spans that are masked, trained, or an image.

LLaVA has nothing like it; whether the right tokens are trained is what one most wants to see before a long run.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample

MASKED, TRAINED, IMAGE = "masked", "trained", "image"


@dataclass(frozen=True)
class Span:
    """Tokens of one kind behind each other: `masked`, `trained` or `image`, and how many they are."""

    kind: str
    text: str
    tokens: int


def spans(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of a sample in their order; together their texts are the decoded sample.

    The placeholders of an image are folded into `<image x576>`; those of images without text between are one span.
    """
    return list(_spans(sample, tokenizer))


def _spans(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    kinds = [
        IMAGE if token == IMAGE_TOKEN_INDEX else MASKED if label == IGNORE_INDEX else TRAINED
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
    ]
    ids, text, place = [], "", 0
    for kind, run in itertools.groupby(kinds):
        count = len(list(run))
        if kind == IMAGE:
            yield Span(kind, f"<image x{count}>", count)
        else:
            # Decoded alone a span would lose the blank it may begin with: so what it adds to the text before it.
            ids += sample.input_ids[place : place + count].tolist()
            longer = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            yield Span(kind, longer[len(text) :], count)
            text = longer
        place += count
