"""Held-out records as questions: what is asked, and about which images.

LLaVA's training has none; the records are LLaVA's, as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data.samples import Samples
from ..data.templates import IMAGE_MARK, BadRecord
from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample
from ..image_files import BadImage
from ..watch.skipped import fault_table
from ..words import counted
from .scoring import metric_of


@dataclass
class Question:
    """A held-out record, ready to be asked.

    Attributes:
        index: in the store of held-out records.
        input_ids: the prompt up to the answer, int32 [L], with one token for each image.
        images: (record, name) of its images; of another record where images are shuffled.
        image_tokens: how many each of them takes.
        text, answer: the last question and the expected answer.
        metric: how an answer is scored, see `scoring.py`.
        tokens: of the whole record as in training, image tokens included.
        record_ids, trained: of the whole record as in training, with one token for each image, int32 and bool [R].
    """

    index: int
    input_ids: np.ndarray
    images: list[tuple[int, str]]
    image_tokens: list[int]
    text: str
    answer: str
    metric: str
    tokens: int
    record_ids: np.ndarray
    trained: np.ndarray


def read_questions(samples: Samples, most: int | None, seed: int) -> list[Question]:
    """Return held-out records as questions, at most `most` of them, drawn by `seed`.

    Raises BadRecord with all records that cannot be asked: without them the score would not be comparable.
    """
    chosen = range(len(samples))
    if most and most < len(samples):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(samples), generator=generator)[:most].tolist()
    questions, faults = [], []
    for index in chosen:
        try:
            sample, prompt = samples.tokenize(index), samples.prompt(index)
            names = samples.store.image_names(index)
            if fault := samples.missing_image(index, names):
                raise BadRecord(fault)
            record = samples.store[index]
            *_, question, answer = record["conversations"]
            if answer["from"] != "gpt":
                raise BadRecord("its last question has no answer to compare with.")
            text = question["value"].replace(IMAGE_MARK, "").strip()
            images = [(index, name) for name in names]
            folder = samples.store.image_folder(index)
            image_tokens = [samples.image_reader.tokens(folder, name, sample.several) for name in names]
            asked = (prompt, images, image_tokens, text, answer["value"], metric_of(record))
            questions.append(Question(index, *asked, len(sample.input_ids), *_one_token_an_image(sample, image_tokens)))
        except (BadRecord, BadImage) as error:
            faults.append((index, str(error)))
    if len(faults) == 1:
        [(index, sentence)] = faults
        raise BadRecord(f"--eval_data_path: {samples.describe(index)}: {sentence}")
    if faults:
        title = f"--eval_data_path: {len(faults):,} of {counted(len(chosen), 'record')} cannot be asked; fix them."
        raise BadRecord("\n".join([title, *fault_table(samples.store, faults)]))
    return questions


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions with their images permuted among questions with equally many images."""
    shuffled = list(questions)
    generator = torch.Generator().manual_seed(seed)
    for count in {len(question.images) for question in questions} - {0}:
        places = [i for i, question in enumerate(questions) if len(question.images) == count]
        for place, other in zip(places, torch.randperm(len(places), generator=generator).tolist(), strict=True):
            others = questions[places[other]]
            shuffled[place] = replace(questions[place], images=others.images, image_tokens=others.image_tokens)
    return shuffled


def _one_token_an_image(sample: Sample, image_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, and which of them are trained. A sample that was cut has the first of the images."""
    is_image = sample.input_ids == IMAGE_TOKEN_INDEX
    kept, firsts = ~is_image, np.cumsum([0, *image_tokens])[: len(sample.images)]
    kept[np.flatnonzero(is_image)[firsts]] = True
    return sample.input_ids[kept], sample.labels[kept] != IGNORE_INDEX
