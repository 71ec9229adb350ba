"""Questions asked together, from shared beginnings and with guessed answers, against each asked alone."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mini_llava.data.collator import collate
from mini_llava.data.images import Picture
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample, expand_images
from mini_llava.evaluation.asking import Asker, asked_in_all, deal_beginnings, find_beginnings, group_asked
from mini_llava.evaluation.generate import expand_prompt, generate
from mini_llava.evaluation.questions import Question, shuffle_images
from tests.training.tiny_llava import IMAGE_SIZE, TOKENS_PER_IMAGE, tiny_llava

SHARED = ["llama", "mistral", "gemma2", "gpt_neox", "gpt2", "opt", "bloom", "mpt"]  # positions of every kind
NOT_SHARED = ["mamba"]  # a state that sums up what was read
ENDS, LIMIT = list(range(3, 96, 6)), 7
IMAGES = [[0], [0], [1], [], [2, 3], [1], [], [3, 0], [2], [0]]  # of each record


def pictures_of(record: int) -> list[Picture]:
    generator = torch.Generator().manual_seed(0)
    every = [Picture(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator), TOKENS_PER_IMAGE) for _ in "0123"]
    return [every[image] for image in IMAGES[record]]


def answer_alone(model, prompt, record) -> list[int]:
    """By transformers' `generate`, up to the end."""
    settings = GenerationConfig(do_sample=False, eos_token_id=ENDS, pad_token_id=0, max_new_tokens=LIMIT)
    pictures = pictures_of(record)
    [tokens] = generate(model, [expand_prompt(prompt, pictures)], pictures, "cpu", generation_config=settings)
    return tokens.tolist()


def loss_alone(model, ids, trained, record) -> float:
    pictures = pictures_of(record)[: np.count_nonzero(ids == IMAGE_TOKEN_INDEX)]
    ids, labels = (
        expand_images(values, [TOKENS_PER_IMAGE] * len(pictures))
        for values in (ids, np.where(trained | (ids == IMAGE_TOKEN_INDEX), ids, IGNORE_INDEX))
    )
    labels[labels == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    return model(**collate([Sample(ids, labels, [], pictures)], IMAGE_SIZE, packed=False)).item()


def make_questions(model) -> list[Question]:
    """Prompts of several lengths, one with an answer between images; what is expected is right, half right, wrong."""
    random, questions = np.random.default_rng(0), []
    for record, images in enumerate(IMAGES):
        parts = [[1, 2]] + [[IMAGE_TOKEN_INDEX], [7, 10]] * len(images) + [random.integers(1, 90, 2 + record % 4)]
        prompt = np.concatenate(parts).astype(np.int32)
        answer = answer_alone(model, prompt, record)
        if record % 3 == 1:
            answer = [*answer[: len(answer) // 2], 4, 6, 3]
        elif record % 3 == 2:
            answer = [9, 3]
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        trained = np.arange(len(ids)) >= len(prompt)
        if record == 4:
            trained[3:5] = True  # before the last image
        if record == 5:  # cut, so that the answer does not count
            ids, trained = ids[: len(prompt) - 1], np.arange(len(prompt) - 1) == len(prompt) - 2
        named = [(record, f"{image}.png") for image in images]
        counts = [TOKENS_PER_IMAGE] * len(images)
        questions.append(Question(record, prompt, named, counts, "", "", "exact_match", len(ids), ids, trained))
    return questions


@pytest.mark.parametrize("family, window", [("mistral", 9), *((family, None) for family in SHARED + NOT_SHARED)])
@torch.no_grad()
def test_every_answer_and_every_loss_is_the_one_that_the_question_has_alone(family, window):
    model = tiny_llava(family=family).eval()
    if window:
        model.language_model.config.sliding_window = window
    questions = make_questions(model)
    shuffled = shuffle_images(questions, seed=1)
    limits = [LIMIT] * len(questions)
    asker = Asker(model, torch.device("cpu"), ENDS, limits, bool)
    assert asker.shares is (family in SHARED)
    found = find_beginnings(questions, shuffled, lambda record: "folder", asker.shares)
    with_images = [bool(images) for images in IMAGES]
    assert asked_in_all(found) == len(questions) + sum(with_images)
    assert len(found) < 20 if asker.shares else len(found) == asked_in_all(found) + len(questions)

    losses, answers = defaultdict(float), {}
    units = [unit for units in deal_beginnings(found, 1, 2, tokens=150) for unit in units]
    assert sorted(map(id, found)) == sorted(id(each) for unit in units for each in unit) and len(units) > 2
    for unit in units:
        asker.begin(unit, [pictures_of(each.record) for each in unit])
        for group in group_asked(unit, limits, 150, asker.shares):
            of_rows, written = asker.ask(group)
            for (_, asked), loss, tokens in zip(group, of_rows.tolist(), written, strict=True):
                losses[asked.place] += loss * asked.with_loss
                if asked.start is not None:
                    answers[asked.place, asked.shuffled] = tokens

    for place, question in enumerate(questions):
        expected = loss_alone(model, question.record_ids, question.trained, question.index)
        assert losses[place] == pytest.approx(expected, rel=1e-5), place
        assert answers[place, False] == answer_alone(model, question.input_ids, question.index)
        if with_images[place]:
            of_another = answer_alone(model, question.input_ids, shuffled[place].images[0][0])
            assert answers[place, True] == of_another
    if family == "llama":
        assert len({len(answer) for answer in answers.values()}) > 2, "some end early, some late and some not at all"


def test_ranks_get_beginnings_of_similar_length_and_one_with_many_questions_is_divided():
    prompts = [np.array([1, *range(2, 5 + number % 3)], np.int32) for number in range(40)]
    empty = ([], [], "", "", "exact_match", 0)
    questions = [Question(n, ids, *empty, ids, np.zeros(len(ids), bool)) for n, ids in enumerate(prompts)]
    found = find_beginnings(questions, [], lambda record: None, shares=True)
    assert [len(each.asked) for each in found] == [16, 16, 8], "all begin with the same token"
    rounds = deal_beginnings(found, ranks=2, most=16, tokens=1000)
    assert [[len(unit) for unit in units] for units in rounds] == [[2, 1]]
    groups = group_asked(found[:2], [2] * 40, tokens=40, shares=True)
    assert sum(map(len, groups)) == 32 and len(groups) > 1
    for group in groups:
        assert len(group) == 1 or len(group) * max(1 + len(asked.rest) + 2 for _, asked in group) <= 40 - 2
