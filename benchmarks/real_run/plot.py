"""Draws what a real run came to: losses and scores, and held-out pictures with what was asked and answered."""

import argparse
import json
import random
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

RIGHT, WRONG = "#1a7f37", "#b35900"
NAMES = {  # of the rows of scores
    ("new_hand", "name"): "name",
    ("new_hand", "category"): "category",
    ("new_hand", "yes_no"): "yes or no",
    ("new_things", "category"): "category,\nnew things",
    ("new_things", "yes_no"): "yes or no,\nnew things",
}
EXAMPLES = (("new_hand", 8), ("new_things", 4))
EXAMPLES_HAND = "fluent/"  # by a licence that lets the figure be in a repository: MIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=Path, nargs=2, required=True, help="output directories of stage 1 and 2")
    parser.add_argument("--scores", type=Path, nargs="*", help="what score.py wrote; without it the losses alone")
    parser.add_argument("--output", type=Path, required=True, help="PNG file for losses and scores")
    parser.add_argument("--data", type=Path, help="folder that prepare_data.py wrote, for --examples")
    parser.add_argument("--examples", type=Path, help="PNG file for pictures with questions and answers")
    given = parser.parse_args()
    scores, answers = read_scores(given.scores or ())

    widths = (1, 1, 1.4) if scores else (1, 1)
    figure, axes = plt.subplots(1, len(widths), figsize=(3.9 * sum(widths), 3.8), width_ratios=widths)
    for axis, directory, name in zip(axes, given.stages, ("Stage 1: captions", "Stage 2: questions"), strict=False):
        draw_losses(axis, directory, name)
    if scores:
        draw_scores(axes[2], scores)
    figure.tight_layout()
    figure.savefig(given.output, dpi=110)
    if given.examples:
        draw_examples(given.data, answers).savefig(given.examples, dpi=110)


def read_scores(files: list[Path]) -> tuple[list[dict], dict[str, dict]]:
    """The rows and answers of all files; a row that two have counts once."""
    rows, answers = {}, {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows |= {(row["model"], row["file"], row["kind"]): row for row in content["scores"]}
        for name, of_models in content["answers"].items():
            answers.setdefault(name, {}).update(of_models)
    return list(rows.values()), answers


def draw_losses(axis: plt.Axes, directory: Path, name: str) -> None:
    """A stage's losses, and what share of held-out questions was answered exactly in between where that was asked."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    axis.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], linewidth=0.8)
    axis.set(title=name, xlabel="step", ylabel="loss per trained token", ylim=(0, None))
    axis.spines["top"].set_visible(False)
    asked = [entry for entry in entries if "eval/exact_match" in entry]
    if asked:
        shares = axis.twinx()
        shares.plot([e["step"] for e in asked], [100 * e["eval/exact_match"] for e in asked], ".-", color=RIGHT)
        shares.set(ylim=(0, 100))
        shares.set_ylabel("held-out questions right, %", color=RIGHT)
        shares.spines["top"].set_visible(False)
    else:
        axis.spines["right"].set_visible(False)


def draw_scores(axis: plt.Axes, rows: list[dict]) -> None:
    """Of the model called "stage 2", with 95 % intervals."""
    model = "stage 2"
    rows = [row for row in rows if row["model"] == model and (row["file"], row["kind"]) in NAMES]
    places = np.arange(len(rows))
    bars = (("right", "its own picture", "#1f77b4"), ("exchanged", "another picture", "#ff9f4a"))
    for shift, (key, label, colour) in enumerate((*bars, ("commonest", "commonest answer", "#cccccc"))):
        heights = np.array([100 * row[key] for row in rows])
        ends = 100 * np.array([row["right_interval"][1:] for row in rows]).T
        errors = np.abs(ends - heights) if key == "right" else None
        axis.bar(places + 0.27 * (shift - 1), heights, 0.27, yerr=errors, color=colour, label=label)
    axis.set_xticks(places, [NAMES[row["file"], row["kind"]] for row in rows], fontsize="small")
    axis.set(title=f"Held-out pictures, {model}", ylabel="exactly right, %", ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small", loc="upper left")


def draw_examples(data: Path, answers: dict[str, dict]) -> plt.Figure:
    """Held-out pictures drawn at random, not chosen: question, and answers of the models "before" and "stage 2"."""
    figure, axes = plt.subplots(3, 4, figsize=(13, 11.5))
    places = iter(axes.flat)
    for file, count in EXAMPLES:
        models = {name: texts for name, texts in answers[file].items() if name in ("before", "stage 2")}
        questions = json.loads((data / f"{file}.json").read_text(encoding="utf-8"))
        questions = [
            question
            for question in questions
            if question["image"].startswith(EXAMPLES_HAND) and all(question["id"] in texts for texts in models.values())
        ]
        for question in random.Random(1).sample(questions, count):
            axis = next(places)
            axis.imshow(Image.open(data / "images" / question["image"]))
            axis.axis("off")
            asked, expected = (turn["value"] for turn in question["conversations"])
            asked = asked.replace("<image>\n", "").split(" Answer ")[0].split(": smileys")[0].rstrip("?") + "?"
            lines = [(asked, "black", "bold"), (f"expected: {expected}", "black", "normal")]
            for name, texts in models.items():
                answer = texts[question["id"]][0].strip().replace("\n", " ")
                is_right = answer.rstrip(".").lower() == expected.lower()
                text = f"{name}: {textwrap.shorten(answer, 70, placeholder=' …')}"
                lines.append((text, RIGHT if is_right else WRONG, "normal"))
            height = -0.03
            for text, colour, weight in lines:
                wrapped = textwrap.wrap(text, 38)
                style = dict(color=colour, weight=weight, fontsize=9, va="top", ha="center", transform=axis.transAxes)
                axis.text(0.5, height, "\n".join(wrapped), **style)
                height -= 0.075 * len(wrapped)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.14, hspace=0.6, wspace=0.1)
    return figure


if __name__ == "__main__":
    main()
