"""Asks trained models held-out questions with the right pictures and with other ones, and how sure the difference is.

What a model still gets right with another question's picture it did not see. Intervals are bootstrapped over things,
since several questions and drawings are about the same one. Beside the models stands the nearest neighbour among the
training pictures by the tower's own features: what the tower alone knows.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from mini_llava.data.collator import join_pictures
from mini_llava.data.images import Picture
from mini_llava.data.templates import written_answer
from mini_llava.data.tokenization import tokenize_prompt
from mini_llava.evaluation.generate import expand_prompt, generate
from mini_llava.formats.layouts import DTYPES
from mini_llava.tools.chat import Conversation
from mini_llava.tools.saved_models import open_saved

FILES = {"new_hand": "another designer", "photographs": "photographs", "new_things": "things never shown"}
LONGEST_ANSWER = 24  # tokens; the longest name has 19


def exchange(questions: Sequence[dict], seed: int) -> list[str]:
    """For each question the picture of another thing, asked about in a question of the same kind."""
    pictures = [""] * len(questions)
    for kind in {question["kind"] for question in questions}:
        order = [index for index, question in enumerate(questions) if question["kind"] == kind]
        random.Random(seed).shuffle(order)
        for place, index in enumerate(order):
            others = (questions[other] for other in order[place + 1 :] + order[:place])
            pictures[index] = next(q["image"] for q in others if q["thing"] != questions[index]["thing"])
    return pictures


def open_pictures(conversation: Conversation, folder: Path, images: Sequence[str]) -> dict[str, Picture]:
    """All pictures as the tower takes them, uint8: 192 KiB each at 256 pixels."""
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda image: conversation.image_reader.open(folder, image), images)
        return dict(zip(images, read, strict=True))


@torch.inference_mode()
def ask(
    conversation: Conversation,
    questions: Sequence[dict],
    pictures: Sequence[str],
    opened_as: Mapping[str, Picture],
    batch_size: int,
) -> list[str]:
    """The greedy answers to the questions, each with the picture of that name."""
    model, tokenizer, template = conversation.model, conversation.tokenizer, conversation.template
    prompts = [tokenize_prompt(question, template, tokenizer) for question in questions]
    answers = [""] * len(questions)
    # A batch takes as long as its longest answer, and questions of a kind have answers of similar lengths.
    order = sorted(range(len(questions)), key=lambda index: (questions[index]["kind"], len(prompts[index])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        opened = [opened_as[pictures[index]] for index in batch]
        ids = [expand_prompt(prompts[index], [picture]) for index, picture in zip(batch, opened, strict=True)]
        output = generate(model, ids, opened, conversation.device, max_new_tokens=LONGEST_ANSWER)
        for index, text in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            answers[index] = written_answer(template, text)
    return answers


def is_right(question: dict, answer: str, is_caption: bool) -> bool:
    """Whether the answer is the expected one but for case and a full stop; of a caption, its first sentence."""
    if is_caption:
        answer = first_sentence(answer)
    return answer.strip().rstrip(".").lower() == question["conversations"][1]["value"].strip().rstrip(".").lower()


def has_a_word(question: dict, answer: str, is_caption: bool) -> bool:
    """Whether the answer has a word of the thing's name or keywords: what can be right of a name never trained on."""
    if is_caption:
        answer = first_sentence(answer)
    return not set(re.findall(r"\w+", answer.lower())).isdisjoint(question["words"])


def first_sentence(caption: str) -> str:
    """The name in a caption of prepare_data.py; names have dots of their own (U.S. Virgin Islands)."""
    return caption.split(". Keywords:")[0].removesuffix(".")


def interval(
    values: Sequence[float], things: Sequence[str], seed: int = 0, resamples: int = 2_000
) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by resampling whole things with all that was asked about them."""
    names = {thing: index for index, thing in enumerate(dict.fromkeys(things))}
    place = [names[thing] for thing in things]
    sums, counts = np.bincount(place, values, len(names)), np.bincount(place, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)), dtype=np.int32)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean(values)), float(low), float(high)


@torch.inference_mode()
def nearest(
    conversation: Conversation, shown: Sequence[str], asked: Sequence[str], opened_as: Mapping[str, Picture]
) -> list[str]:
    """For each picture asked about, the training picture nearest to it by the mean of the tower's features."""
    tower = conversation.model.vision_tower

    def features(names: Sequence[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(names), 128):
            images, *_ = join_pictures([opened_as[name] for name in names[start : start + 128]], tower.image_size)
            parts.append(tower(images.to(conversation.device)).float().mean(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    return [shown[index] for index in (features(asked) @ features(shown).T).argmax(1).tolist()]


def table_of(scores: list[dict]) -> str:
    """One row for each model, file and kind of question, as Markdown."""
    lines = [
        "| model | held out | question | n | right picture | another picture | difference, 95 % interval | commonest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scores:
        mean, low, high = (f"{100 * value:.1f}" for value in row["difference"])
        commonest = "" if row["commonest"] is None else f"{row['commonest']:.1%}"
        lines.append(
            f"| {row['model']} | {FILES[row['file']]} | {row['kind']} | {row['n']:,} | {row['right']:.1%} | "
            f"{row['exchanged']:.1%} | {mean} [{low}, {high}] | {commonest} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("models", metavar="NAME=DIR[:VERSION]", nargs="+", help="what train.py wrote, and the template to ask it with")
    add("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    add("--output", type=Path, required=True, help="JSON file for the scores and all answers")
    add("--max_things", type=int, help="ask about so many things of each file [all]")
    add("--every_neighbour", type=int, default=1, help="look for neighbours among each so-manieth picture [1]")
    add("--batch_size", type=int, default=256)
    add("--samples", type=int, default=12, help="answers to print of each file [12]")
    add("--dtype", choices=DTYPES, help="[bfloat16 on a GPU, float32 on a CPU]")
    given = parser.parse_args()
    if given.max_things is not None and given.max_things < 2:
        parser.error(f"--max_things {given.max_things} is too few: each is also asked about with another's picture.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype or ("float32" if device == "cpu" else "bfloat16"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    asked = {file: json.loads((given.data / f"{file}.json").read_text(encoding="utf-8")) for file in FILES}
    if given.max_things:
        for file, questions in asked.items():
            things = sorted({question["thing"] for question in questions})
            kept = set(random.Random(0).sample(things, min(given.max_things, len(things))))
            asked[file] = [question for question in questions if question["thing"] in kept]

    # The captions of stage 1: what the neighbours among the training pictures are called.
    shown = json.loads((given.data / "stage1.json").read_text(encoding="utf-8"))[:: given.every_neighbour]
    names = {record["image"]: first_sentence(record["conversations"][1]["value"]) for record in shown}

    scores, answers, opened_as = [], {file: {} for file in FILES}, {}
    clock = Clock()
    for model in given.models:
        name, _, place = model.partition("=")
        directory, _, version = place.partition(":")
        conversation = Conversation(
            open_saved(directory, version=version or None), dtype, device, {"max_new_tokens": LONGEST_ANSWER}
        )
        clock.say(f"{name}: opened")
        if not opened_as:  # all models have the same tower, and so the same pixels
            images = sorted({question["image"] for questions in asked.values() for question in questions})
            opened_as = open_pictures(conversation, given.data / "images", images)
            clock.say(f"{len(images):,} held-out pictures opened")
        is_caption = conversation.template.captions_only
        for file, questions in asked.items():
            if is_caption:  # which has no question: the name is what it should begin with
                questions = [question for question in questions if question["kind"] == "name"]
            if not questions:
                continue
            written = [
                ask(conversation, questions, pictures, opened_as, given.batch_size)
                for pictures in ([question["image"] for question in questions], exchange(questions, seed=0))
            ]
            answers[file][name] = {q["id"]: both for q, both in zip(questions, zip(*written, strict=True), strict=True)}
            clock.say(f"{name}: {2 * len(questions):,} answers about {FILES[file]}")
            scores += score(name, file, questions, written, is_caption)
            write(given.output, scores, answers)  # now already: the rest takes a while
            clock.say("scored and written")

    opened_as |= open_pictures(conversation, given.data / "images", list(names))
    clock.say(f"{len(names):,} training pictures opened")
    neighbours = dict(zip(images, nearest(conversation, list(names), images, opened_as), strict=True))
    for file in ("new_hand", "photographs", "new_things"):
        questions = [question for question in asked[file] if question["kind"] == "name"]
        written = [
            [names[neighbours[image]] for image in pictures]
            for pictures in ([question["image"] for question in questions], exchange(questions, seed=0))
        ]
        scores += score("nearest training picture", file, questions, written, False)
    clock.say("nearest training pictures found and scored")

    write(given.output, scores, answers)
    print(table_of(scores) + "\n\n" + samples_of(asked, answers, given.samples))


class Clock:
    """Prints what was done and how long it took since the last time."""

    def __init__(self):
        self.last = time.perf_counter()

    def say(self, done: str) -> None:
        now = time.perf_counter()
        print(f"{done} in {now - self.last:.1f} s.", flush=True)
        self.last = now


def write(file: Path, scores: list[dict], answers: dict[str, dict]) -> None:
    file.write_text(json.dumps({"scores": scores, "answers": answers}, ensure_ascii=False, indent=1), encoding="utf-8")


def score(
    model: str, file: str, questions: Sequence[dict], written: Sequence[Sequence[str]], is_caption: bool
) -> list[dict]:
    """One row for each kind of question, and for names also one by `has_a_word`.

    `written`: the answers with the right pictures and with others.
    """
    rows = []
    kinds = list(dict.fromkeys(question["kind"] for question in questions))
    for kind, counts in [(kind, is_right) for kind in kinds] + [("name", has_a_word)] * ("name" in kinds):
        places = [index for index, question in enumerate(questions) if question["kind"] == kind]
        right, exchanged = (
            np.array([counts(questions[index], texts[index], is_caption) for index in places], dtype=float)
            for texts in written
        )
        things = [questions[index]["thing"] for index in places]
        expected = Counter(questions[index]["conversations"][1]["value"] for index in places)
        rows.append(
            dict(
                model=model,
                file=file,
                kind=kind if counts is is_right else "a word of it",
                n=len(places),
                right=right.mean(),
                right_interval=interval(right, things),
                exchanged=exchanged.mean(),
                difference=interval(right - exchanged, things),
                commonest=expected.most_common(1)[0][1] / len(places) if counts is is_right else None,
            )
        )
    return rows


def samples_of(asked: dict[str, list[dict]], answers: dict[str, dict], count: int) -> str:
    """Answers of all models to the same questions, drawn at random and not chosen, as Markdown."""
    models = list(dict.fromkeys(model for of_file in answers.values() for model in of_file))
    lines = ["| picture | question | expected | " + " | ".join(models) + " |", "|---" * (3 + len(models)) + "|"]
    for file, questions in asked.items():
        for question in random.Random(1).sample(questions, min(count, len(questions))):
            texts = (answers[file].get(model, {}).get(question["id"], ("-",))[0] for model in models)
            cells = (question["image"], question["kind"], question["conversations"][1]["value"], *texts)
            lines.append("| " + " | ".join(cell.replace("\n", " ").replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
