"""The embedded default: a small real data set in LLaVA's format and two miniature pretrained models.

`prepare` converts easy-vqa (5,000 pictures of one coloured shape, 48,000 questions, an official test split) into
LLaVA's JSON and an image folder, once. The vision tower and the language model beside this file are ordinary Hugging
Face directories made by `python -m mini_llava.demo.pretrain`, and the two YAML files are ordinary `--config` files: the
demo takes the same path through the code as CLIP and Vicuna do.
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

from ..watch.json_lines import read_lines

HERE = Path(__file__).resolve().parent
VISION_TOWER = HERE / "vision_tower"
LANGUAGE_MODEL = HERE / "language_model"

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# Ways to say a scene in a sentence: the text-only conversations of stage 2 begin with one, and the language model was
# pretrained on more of the same.
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
    """Where the converted data lie: three JSON files in LLaVA's format, and the folder of the images that they name."""

    stage1: Path
    stage2: Path
    test: Path
    images: Path


def prepare(output_root: str | Path = "outputs") -> DemoData:
    """Convert easy-vqa into `output_root/demo-data`, unless that was done before, and return the paths.

    The folder is written under another name and renamed at the end, so that it is whole or absent; several processes
    may call this at once, and the first to finish wins.
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
            shutil.rmtree(unfinished)  # another process was faster, and wrote the same bytes
    return DemoData(folder / "stage1.json", folder / "stage2.json", folder / "test.json", folder / "images")


def prepare_run(arguments) -> tuple:
    """Make what the demo's `--config` files name; return the arguments, and what a person should know beforehand.

    Stage 2 starts from stage 1's projector if there is one; if not, the flag is None in the `Arguments`
    that are returned. Raises
    FileNotFoundError if the paths in the demo's files lead nowhere from the current directory.
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
    projector = model_flags.pretrain_mm_mlp_adapter
    if projector and Path(projector).exists():
        lines.append(f"The projector comes from stage 1: {projector}.")
    elif projector:
        arguments = arguments.replace(pretrain_mm_mlp_adapter=None)
        lines.append(f"There is no {projector}, so the projector starts at random; run --stage 1 first.")
    return arguments, "\n".join(lines)


def table_of_scores(stage: int, output_dir: str | Path, projector: str | None) -> str:
    """Return what the runs have logged as the README's table: before and after each stage, images shuffled as well.

    Args:
        stage: of the run that ends.
        output_dir: of that run; its log has the scores.
        projector: what stage 2 has started from, whose folder has the log of stage 1; None: none.
    """
    folders = {stage: Path(output_dir)}
    if stage == 2 and projector:
        folders[1] = Path(projector) if Path(projector).is_dir() else Path(projector).parent
    found: dict[str, dict] = {}
    for of_stage, folder in folders.items():
        # Only where a run begins and where it ends are the images shuffled.
        entries = [entry for entry in read_lines(folder / "log.jsonl") if f"{SCORE}_shuffled" in entry]
        for entry in entries:
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
    after = [] if stage == 2 else ["The next stage adds its row: python train.py --stage 2"]
    return "\n".join(["", "Held-out questions answered exactly:", *lines, *missing, *after])


@functools.cache
def question_only_baseline() -> float:
    """Exact match on the test questions, in [0, 1], of the best guess that sees the question alone.

    The guess is the most frequent training answer to the same question text.
    """
    answers = defaultdict(Counter)
    for turns in read_questions("train").values():
        for question, answer in turns:
            answers[question][answer] += 1
    test = [turn for turns in read_questions("test").values() for turn in turns]
    return sum(answers[question].most_common(1)[0][0] == answer for question, answer in test) / len(test)


def read_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """The (question, answer) pairs of each image of easy-vqa's `train` or `test` split, by image number."""
    easy_vqa = _easy_vqa()
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    turns = defaultdict(list)
    for question, answer, image in zip(*read(), strict=True):
        turns[image].append((question, answer))
    return {image: turns[image] for image in sorted(turns)}


def image_paths(split: str) -> dict[int, str]:
    """The PNG file (64x64, RGB) of each image of easy-vqa's `train` or `test` split, by image number."""
    easy_vqa = _easy_vqa()
    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


def shape_and_colour(turns: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """What the questions of one image tell about it: its shape and its colour, None where they leave it open.

    A named shape or colour is a fact; so is one that a yes/no question affirms ("is there not a circle?", "no"). Where
    all but one are denied, the last is a fact too.
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
    return (
        shapes.pop() if len(shapes) == 1 else None,
        colours.pop() if len(colours) == 1 else None,
    )


def answers_by_scene(questions: dict[int, list[tuple[str, str]]]) -> dict[tuple[str, str], dict[str, str]]:
    """For each (shape, colour): every question asked of such an image, with its answer (it is the same each time)."""
    scenes = defaultdict(dict)
    for turns in questions.values():
        scene = shape_and_colour(turns)
        if None not in scene:
            scenes[scene].update(turns)
    return {scene: scenes[scene] for scene in sorted(scenes)}


def _convert(folder: Path) -> None:
    """Write the three JSON files and the images. Everything random comes from one seed."""
    rng = random.Random(SEED)
    train, test = read_questions("train"), read_questions("test")

    captions = []
    for image, turns in train.items():
        shape, colour = shape_and_colour(turns)
        if shape and colour:  # the questions of one image in ten leave one of them open
            request = f"<image>\n{rng.choice(CAPTION_REQUESTS)}"
            captions.append(record(f"caption-{image}", [(request, f"a {colour} {shape}")], f"train/{image}.png"))

    conversations = []
    for image, turns in train.items():
        # The package lists "what ..." first and yes/no last; unshuffled, hardly a conversation would begin with yes/no.
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
    """One record of LLaVA's JSON: human and gpt turns, and the image's name where there is one."""
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
        raise ImportError(
            "The demo's data come from the package easy-vqa, which is not installed: run `pip install easy-vqa==1.0` "
            "(it is in requirements.txt), or train on your own data with --data_path and --image_folder."
        ) from error
    return easy_vqa
