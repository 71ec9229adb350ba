"""Draws what a real run came to: the losses of both stages, and the scores with the right pictures and with others."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=Path, nargs=2, required=True, help="output directories of stage 1 and 2")
    parser.add_argument("--scores", type=Path, help="what score.py wrote; without it the losses alone")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    given = parser.parse_args()

    widths = (1, 1, 1.3) if given.scores else (1, 1)
    figure, axes = plt.subplots(1, len(widths), figsize=(3.9 * sum(widths), 3.8), width_ratios=widths)
    for axis, directory, name in zip(axes, given.stages, ("Stage 1: captions", "Stage 2: questions"), strict=False):
        entries = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        entries = [entry for entry in entries if "loss" in entry]
        axis.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], linewidth=0.8)
        axis.set(title=name, xlabel="step", ylabel="loss per trained token", ylim=(0, None))

    if given.scores:
        draw_scores(axes[2], json.loads(given.scores.read_text(encoding="utf-8"))["scores"])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(given.output, dpi=110)


def draw_scores(axis: plt.Axes, rows: list[dict]) -> None:
    """Of the last model that was asked, drawings of its training's things by another designer and of new things."""
    model = next(row["model"] for row in reversed(rows) if row["file"] == "new_things")
    names = {
        ("new_hand", "name"): "name",
        ("new_hand", "category"): "category",
        ("new_hand", "yes_no"): "yes or no",
        ("new_things", "category"): "category,\nnew things",
    }
    rows = [row for row in rows if row["model"] == model and (row["file"], row["kind"]) in names]
    places = np.arange(len(rows))
    bars = (("right", "its own picture", "#1f77b4"), ("exchanged", "another picture", "#ff9f4a"))
    for shift, (key, label, colour) in enumerate((*bars, ("commonest", "commonest answer", "#cccccc"))):
        axis.bar(places + 0.27 * (shift - 1), [100 * row[key] for row in rows], 0.27, color=colour, label=label)
    axis.set_xticks(places, [names[row["file"], row["kind"]] for row in rows])
    axis.set(title=f"Held-out pictures, {model}", ylabel="exactly right, %", ylim=(0, 100))
    axis.legend(frameon=False, fontsize="small", loc="upper left")


if __name__ == "__main__":
    main()
