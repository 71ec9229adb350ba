"""The demo, the default of train.py: a small real data set in LLaVA's format and two miniature pretrained models.

`prepare` converts easy-vqa (5,000 pictures of one coloured shape, 48,000 questions, an official test split) once. The
models beside this file are ordinary Hugging Face directories made by `python -m mini_llava.demo.pretrain`, and the YAML
files are ordinary `--config` files: the demo runs the same code as CLIP and Vicuna.
"""

import functools
import json
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..watch.json_lines import read_lines

HERE = Path(__file__).resolve().parent
VISION_TOWER = HERE / "vision_tower"
LANGUAGE_MODEL = HERE / "language_model"

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# Descriptions of a scene: stage 2's text-only conversations begin with one; the language model has seen more of them.
SCENE_SENTENCES = (
    "a {colour} {shape}",
    "the picture shows a {colour} {shape}.",
    "imagine a {shape}. its color is {colour}.",
    "there is one {shape} and it is {colour}.",
)
CAPTION_REQUESTS = (
    "Describe the picture in a few words.",
    "What does this picture show?",
    "Give a short caption for the image.",
    "Name what you see.",
)
TEXT_ONLY_RECORDS = 800
SCORE = "eval/exact_match"  # in log.jsonl
SEED = 0


@dataclass(frozen=True, slots=True)
class DemoData:
    """Paths of the converted data: three JSON files in LLaVA's format, and the folder of their images."""

    stage1: Path
    stage2: Path
    test: Path
    images: Path


def prepare(output_root: str | Path = "outputs") -> DemoData:
    """Convert easy-vqa into `output_root/demo-data`, unless it exists, and return the paths.

    The folder is renamed when it is complete, so that several processes may convert at once.
    """
    folder = Path(output_root) / "demo-data"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        _convert(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(unfinished)  # another process was faster
    return DemoData(folder / "stage1.json", folder / "stage2.json", folder / "test.json", folder / "images")


def prepare_run(arguments) -> tuple:
    """Convert the demo's data; return the arguments, and what the user should know before the run.

    Stage 2 starts from stage 1's projector if there is one; otherwise the flag is None in the `Arguments` that are
    returned. Raises FileNotFoundError outside of the repository's root.
    """
    model_flags = arguments.model
    if not Path(model_flags.model_name_or_path).is_dir():
        raise FileNotFoundError(
            f"The demo's {model_flags.model_name_or_path} is not below the current directory, {Path.cwd()}: start "
            "train.py from the repository's root."
        )
    prepare()
    lines = [
        "No model and no data given: training the embedded demo, a miniature LLaVA on easy-vqa. To train on your own: "
        "--model_name_or_path, --vision_tower, --data_path and --image_folder (see --help).",
        f"Guessing its test answers from the questions alone gets {question_only_baseline():.1%} right.",
    ]
    if arguments.stage == 2:
        lines.append(
            "Global batches of text-only questions begin with a loss near 0: the language model already knows the "
            "answers."
        )
    projector = model_flags.pretrain_mm_mlp_adapter
    if projector and Path(projector).exists():
        lines.append(f"The projector comes from stage 1: {projector}.")
    elif projector:
        arguments = arguments.replace(pretrain_mm_mlp_adapter=None)
        lines.append(f"There is no {projector}, so the projector starts at random; run --stage 1 first.")
    return arguments, "\n".join(lines)


def table_of_scores(stage: int, output_dir: str | Path, projector: str | None) -> str:
    """Return the README's table of scores before and after each stage, with images in place and shuffled.

    Args:
        stage, output_dir: of the run that ends, whose log has its scores.
        projector: what stage 2 started from, whose folder has the log of stage 1.
    """
    folders = {stage: Path(output_dir)}
    if stage == 2 and projector:
        folders[1] = Path(projector) if Path(projector).is_dir() else Path(projector).parent
    found: dict[str, dict] = {}
    for of_stage, folder in folders.items():
        for entry in read_lines(folder / "log.jsonl"):
            if f"{SCORE}_shuffled" in entry:  # as before and after a run
                found[f"{'after' if entry['step'] else 'before'} stage {of_stage}"] = entry
    rows, missing = [("", "images in place", "images shuffled")], []
    for name in ("before stage 1", "after stage 1", "after stage 2"):
        if entry := found.get(name):
            rows.append((name, *(f"{entry[key]:.1%}" for key in (SCORE, f"{SCORE}_shuffled"))))
        elif int(name[-1]) <= stage:
            log = folders[int(name[-1])] / "log.jsonl" if int(name[-1]) in folders else None
            why = f"{log} has no such scores." if log else "this run did not start from one."
            missing.append(f"Missing {name}: {why}")
    rows.append(("best guess from the question alone", f"{question_only_baseline():.1%}", ""))
    lines = [f"  {row[0]:<35} {row[1]:>15}  {row[2]:>15}".rstrip() for row in rows]
    after = [] if stage == 2 else ["Stage 2 adds the next row: python train.py --stage 2"]
    return "\n".join(["", "Held-out questions answered exactly:", *lines, *missing, *after])


@functools.cache
def question_only_baseline() -> float:
    """Return the exact match on the test split, in [0, 1], of the most frequent training answer to each question."""
    answers = defaultdict(Counter)
    for turns in read_questions("train").values():
        for question, answer in turns:
            answers[question][answer] += 1
    test = [turn for turns in read_questions("test").values() for turn in turns]
    return sum(answers[question].most_common(1)[0][0] == answer for question, answer in test) / len(test)


def read_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Return the (question, answer) pairs of each image, by image number; split is `train` or `test`."""
    easy_vqa = _easy_vqa()
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    turns = defaultdict(list)
    for question, answer, image in zip(*read(), strict=True):
        turns[image].append((question, answer))
    return {image: turns[image] for image in sorted(turns)}


def image_paths(split: str) -> dict[int, str]:
    """Return the PNG files (64x64, RGB) by image number; split is `train` or `test`."""
    easy_vqa = _easy_vqa()
    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


def shape_and_colour(turns: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return the shape and the colour that follow from the questions of one image, each None if it is open.

    A shape or colour follows if it is named, if a yes/no question affirms it ("is there not a circle?", "no"), or if
    all others are denied.
    """
    shapes, colours = set(SHAPES), set(COLOURS)
    for question, answer in turns:
        words = set(re.findall(r"[a-z]+", question))
        if answer in ("yes", "no"):
            affirmed = (answer == "yes") != bool(words & {"not", "no"})
        else:
            words.add(answer)
            affirmed = True
        for known, named in ((shapes, words & set(SHAPES)), (colours, words & set(COLOURS))):
            if named and affirmed:
                known &= named
            elif named:
                known -= named
    return tuple(known.pop() if len(known) == 1 else None for known in (shapes, colours))


def answers_by_scene(questions: dict[int, list[tuple[str, str]]]) -> dict[tuple[str, str], dict[str, str]]:
    """Return for each (shape, colour) all questions about such images, with their answers."""
    scenes = defaultdict(dict)
    for turns in questions.values():
        scene = shape_and_colour(turns)
        if None not in scene:
            scenes[scene].update(turns)
    return {scene: scenes[scene] for scene in sorted(scenes)}


def _convert(folder: Path) -> None:
    """Write the three JSON files and the images, shuffled by one seed."""
    rng = random.Random(SEED)
    train, test = read_questions("train"), read_questions("test")

    captions = []
    for image, turns in train.items():
        shape, colour = shape_and_colour(turns)
        if shape and colour:  # open for one image in ten
            request = f"<image>\n{rng.choice(CAPTION_REQUESTS)}"
            captions.append(record(f"caption-{image}", [(request, f"a {colour} {shape}")], f"train/{image}.png"))

    conversations = []
    for image, turns in train.items():
        # The package lists yes/no questions last; unshuffled, hardly a conversation would begin with one.
        (question, answer), *rest = rng.sample(turns, len(turns))
        turns = [(f"<image>\n{question}", answer), *rest]
        conversations.append(record(f"image-{image}", turns, f"train/{image}.png"))
    scenes = answers_by_scene(train)
    for number in range(TEXT_ONLY_RECORDS):
        (shape, colour), answers = rng.choice(list(scenes.items()))
        (question, answer), *rest = rng.sample(list(answers.items()), rng.randint(2, 10))
        sentence = rng.choice(SCENE_SENTENCES).format(shape=shape, colour=colour)
        conversations.append(record(f"text-{number}", [(f"{sentence}\n{question}", answer), *rest]))
    rng.shuffle(conversations)

    questions = [
        record(f"test-{image}-{number}", [(f"<image>\n{question}", answer)], f"test/{image}.png")
        for image, turns in test.items()
        for number, (question, answer) in enumerate(turns)
    ]

    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True)
        for image, path in image_paths(split).items():
            shutil.copyfile(path, folder / "images" / split / f"{image}.png")
    for name, records in (("stage1", captions), ("stage2", conversations), ("test", questions)):
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def record(identifier: str, turns: list[tuple[str, str]], image: str | None = None) -> dict:
    """Return a record of LLaVA's JSON: human and gpt turns, and an image's name if there is one."""
    conversations = [
        {"from": speaker, "value": text}
        for question, answer in turns
        for speaker, text in (("human", question), ("gpt", answer))
    ]
    return {"id": identifier} | ({"image": image} if image else {}) | {"conversations": conversations}


def _easy_vqa():
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError(
            "The demo's data come from the package easy-vqa, which is not installed: run `pip install easy-vqa==1.0` "
            "(it is in requirements.txt), or train on your own data with --data_path and --image_folder."
        ) from error
    return easy_vqa
