"""Draws what a real run came to: losses, held-out questions, scores, and pictures with what was asked and answered."""

import argparse
import io
import json
import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

RIGHT, WRONG = "#1a7f37", "#b35900"
NAMES = {  # of the rows of scores
    ("new_hand", "name"): "another designer:\nname",
    ("new_hand", "category"): "another designer:\ncategory",
    ("new_hand", "yes_no"): "another designer:\nyes or no",
    ("photographs", "name"): "photographs:\nname",
    ("photographs", "category"): "photographs:\ncategory",
    ("photographs", "yes_no"): "photographs:\nyes or no",
    ("new_things", "category"): "never shown:\ncategory",
    ("new_things", "yes_no"): "never shown:\nyes or no",
}
NEAREST = "nearest training picture"  # score.py's name for it
SIDE, LINE = 2.7, 0.19  # inches: pictures in the examples, and lines of text under them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage1", type=Path, required=True, help="output directory of stage 1")
    parser.add_argument("--stage2", metavar="NAME=DIR", nargs="+", required=True, help="those of stage 2")
    parser.add_argument(
        "--scores", type=Path, help="what score.py wrote: one more plot, of the model of the first name"
    )
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--images", type=Path, help="the records' folder of images, for --examples")
    parser.add_argument("--examples", type=Path, help="PNG file for held-out pictures with questions and answers")
    given = parser.parse_args()
    stage2 = {name: Path(directory) for name, _, directory in (text.partition("=") for text in given.stage2)}

    layout = [["stage 1", "stage 2", "held out"]] + [["scores"] * 3] * bool(given.scores)
    figure, axes = plt.subplot_mosaic(layout, figsize=(11, 3.4 * len(layout)))
    draw_losses(axes["stage 1"], {"": given.stage1}, "Stage 1: captions")
    draw_losses(axes["stage 2"], stage2, "Stage 2: questions")
    draw_held_out(axes["held out"], stage2)
    if given.scores:
        draw_scores(axes["scores"], next(iter(stage2)), json.loads(given.scores.read_text(encoding="utf-8"))["scores"])
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, given.output)
    if given.examples:
        save(draw_examples(stage2, given.images), given.examples)


def save(figure: plt.Figure, file: Path) -> None:
    """As a PNG of 256 colours: a third of the size of one with all colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    Image.open(drawn).convert("RGB").quantize(256).save(file, format="PNG", optimize=True)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw_losses(axis: plt.Axes, runs: dict[str, Path], title: str) -> None:
    for name, directory in runs.items():
        entries = [entry for entry in read_lines(directory / "log.jsonl") if "loss" in entry]
        axis.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], linewidth=0.8, label=name)
    axis.set(title=title, xlabel="step", ylabel="loss per trained token", ylim=(0, None))
    if len(runs) > 1:
        axis.legend(frameon=False)


def draw_held_out(axis: plt.Axes, runs: dict[str, Path]) -> None:
    """Shares of held-out questions answered exactly while stage 2 trains; crosses: with the pictures shuffled."""
    for name, directory in runs.items():
        log = read_lines(directory / "log.jsonl")
        [line] = axis.plot(*points(log, "eval/exact_match"), ".-", label=name)
        axis.plot(*points(log, "eval/exact_match_shuffled"), "x", color=line.get_color())
    axis.set(title="Held-out questions in stage 2", xlabel="step", ylabel="exactly right, %", ylim=(0, 100))
    axis.plot([], [], "x", color="black", label="pictures shuffled")
    axis.legend(frameon=False, loc="upper left")


def points(log: list[dict], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [100 * entry[key] for entry in entries]


def draw_scores(axis: plt.Axes, model: str, all_rows: list[dict]) -> None:
    """Of one model, with 95 % intervals, and the nearest neighbour's names."""
    rows = [row for row in all_rows if row["model"] == model and (row["file"], row["kind"]) in NAMES]
    places = np.arange(len(rows))
    bars = (("right", "its own picture", "#1f77b4"), ("exchanged", "another picture", "#ff9f4a"))
    for shift, (key, label, colour) in enumerate((*bars, ("commonest", "commonest answer", "#cccccc"))):
        heights = np.array([100 * row[key] for row in rows])
        ends = 100 * np.array([row["right_interval"][1:] for row in rows]).T
        errors = np.abs(ends - heights) if key == "right" else None
        axis.bar(places + 0.27 * (shift - 1), heights, 0.27, yerr=errors, color=colour, label=label)
    neighbours = {(row["file"], row["kind"]): 100 * row["right"] for row in all_rows if row["model"] == NEAREST}
    found = [neighbours.get((row["file"], row["kind"]), np.nan) for row in rows]
    axis.plot(places - 0.27, found, "D", color="black", markersize=5, label="nearest training picture's name")
    axis.set_xticks(places, [NAMES[row["file"], row["kind"]] for row in rows], fontsize="small")
    axis.set(title=f"Held-out pictures, {model}", ylabel="exactly right, %", ylim=(0, 100))
    axis.legend(frameon=False, ncols=4, loc="upper left")


def draw_examples(runs: dict[str, Path], images: Path) -> plt.Figure:
    """The held-out questions that the trainer shows: its answers before stage 2 and after it, in each run."""
    shown: dict[str, dict] = {}
    for name, directory in runs.items():
        lines = read_lines(directory / "eval_samples.jsonl")
        last = max(line["step"] for line in lines)
        for line in lines:
            if line["step"] in (0, last):
                question = shown.setdefault(line["record"], {"line": line, "answers": {}})
                question["answers"].setdefault(name if line["step"] else "before stage 2", line)
    texts = [texts_under(question["line"], question["answers"]) for question in shown.values()]
    under = LINE * (1 + max(sum(text.count("\n") + 1.3 for text, *_ in of_one) for of_one in texts))
    columns = -(-len(shown) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.1 * columns, 2 * (SIDE + under)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, question, of_one in zip(axes.flat, shown.values(), texts, strict=False):
        axis.imshow(Image.open(images / question["line"]["images"][0]))
        height = -0.03
        for text, colour, weight in of_one:
            style = dict(color=colour, weight=weight, fontsize=10, va="top", ha="center", transform=axis.transAxes)
            axis.text(0.5, height, text, **style)
            height -= LINE / SIDE * (text.count("\n") + 1.3)
    share = under / (2 * (SIDE + under))
    figure.subplots_adjust(left=0, right=1, top=1, bottom=share, hspace=under / SIDE, wspace=0)
    return figure


def texts_under(line: dict, answers: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(text, colour, weight) of the question, the expected answer and the answers."""
    # Without how to answer and the list of categories, which are the same each time.
    asked = re.split(r" Answer |: smileys", line["question"])[0].rstrip("?") + "?"
    texts = [(asked, "black", "bold"), (f"expected: {line['expected']}", "black", "normal")]
    for name, answer in answers.items():
        text = textwrap.shorten(answer["answer"], 70, placeholder=" …")
        texts.append((f"{name}: {text}", RIGHT if answer["right"] else WRONG, "normal"))
    return [(textwrap.fill(text, 36), colour, weight) for text, colour, weight in texts]


if __name__ == "__main__":
    main()
