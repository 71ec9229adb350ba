"""Draws what a real run came to: losses, held-out questions, scores, and pictures with what was asked and answered."""

import argparse
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
    ("new_hand", "name"): "name",
    ("new_hand", "category"): "category",
    ("new_hand", "yes_no"): "yes or no",
    ("new_things", "category"): "category,\nnew things",
    ("new_things", "yes_no"): "yes or no,\nnew things",
}


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

    widths = (1, 1, 1, 1.4) if given.scores else (1, 1, 1)
    figure, axes = plt.subplots(1, len(widths), figsize=(3.9 * sum(widths), 3.8), width_ratios=widths)
    draw_losses(axes[0], {"": given.stage1}, "Stage 1: captions")
    draw_losses(axes[1], stage2, "Stage 2: questions")
    draw_held_out(axes[2], stage2)
    if given.scores:
        draw_scores(axes[3], next(iter(stage2)), json.loads(given.scores.read_text(encoding="utf-8"))["scores"])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(given.output, dpi=110)
    if given.examples:
        draw_examples(stage2, given.images).savefig(given.examples, dpi=80)


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


def draw_scores(axis: plt.Axes, model: str, rows: list[dict]) -> None:
    """Of one model, with 95 % intervals."""
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
    axis.legend(frameon=False, fontsize="small", loc="upper left")


def draw_examples(runs: dict[str, Path], images: Path) -> plt.Figure:
    """The held-out questions that the trainer shows: its answers before stage 2 and after it, in each run."""
    shown: dict[str, dict] = {}
    for name, directory in runs.items():
        lines = read_lines(directory / "eval_samples.jsonl")
        last = max(line["step"] for line in lines)
        for line in lines:
            if line["step"] in (0, last):
                question = shown.setdefault(line["record"], {"line": line, "answers": {}})
                question["answers"].setdefault(f"{name}" if line["step"] else "before stage 2", line)
    figure, axes = plt.subplots(2, -(-len(shown) // 2), figsize=(3.4 * -(-len(shown) // 2), 9.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, question in zip(axes.flat, shown.values(), strict=False):
        line = question["line"]
        axis.imshow(Image.open(images / line["images"][0]))
        # Without how to answer and the list of categories, which are the same each time.
        asked = re.split(r" Answer |: smileys", line["question"])[0].rstrip("?") + "?"
        texts = [(asked, "black", "bold"), (f"expected: {line['expected']}", "black", "normal")]
        for name, answer in question["answers"].items():
            text = textwrap.shorten(answer["answer"], 70, placeholder=" …")
            texts.append((f"{name}: {text}", RIGHT if answer["right"] else WRONG, "normal"))
        height = -0.03
        for text, colour, weight in texts:
            wrapped = textwrap.wrap(text, 36)
            style = dict(color=colour, weight=weight, fontsize=10, va="top", ha="center", transform=axis.transAxes)
            axis.text(0.5, height, "\n".join(wrapped), **style)
            height -= 0.08 * len(wrapped)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.19, hspace=0.62, wspace=0.1)
    return figure


if __name__ == "__main__":
    main()
