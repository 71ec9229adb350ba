"""`curves.png`: loss, learning rates, norms and held-out values of a whole run, drawn from its log.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files import atomic_write
from .json_lines import read_lines

PARTS_AT_MOST = 6  # lines in one panel


def draw_curves(log: Path, file: Path) -> None:
    """Draw a log.jsonl as a PNG. Raises UserError if it has no entry with a loss, ImportError without matplotlib."""
    from matplotlib.colors import TABLEAU_COLORS  # takes a second to import
    from matplotlib.figure import Figure  # without pyplot no display is needed

    entries = list(read_lines(log))
    if not any("loss" in entry for entry in entries):
        raise UserError(f"{log} has no entry with a loss to draw.")
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    begin_with = lambda prefix: [name for name in names if name.startswith(prefix)]  # noqa: E731
    losses, rates, held_out = begin_with("loss"), begin_with("learning_rate/"), begin_with("eval/")
    held_out_losses = [name for name in held_out if "loss" in name]
    scores = [name for name in held_out if "loss" not in name and name != "eval/seconds"]

    panels = [
        ("loss", losses[: PARTS_AT_MOST + 1] + held_out_losses[:PARTS_AT_MOST]),
        ("learning rate", rates or begin_with("learning_rate")),
        ("norms", begin_with("gradient_norm") + begin_with("update_norm")),
        ("held-out questions", scores[:PARTS_AT_MOST]),
    ]
    panels = [(title, series) for title, series in panels if series]
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, series) in zip(axes, panels, strict=True):
        if title == "loss":
            axis.set_prop_cycle(color=list(TABLEAU_COLORS)[1:])  # the first, blue, is the whole loss
        for name in series:
            steps, values = _series(entries, name)
            if name == "loss":
                axis.plot(steps, values, color="#b8cbe3", linewidth=1, label="loss of each entry")
                axis.plot(steps, smoothed(values), color="#1f4e8c", linewidth=1.8, label="loss, smoothed")
            elif name.startswith("loss"):
                axis.plot(steps, smoothed(values), linewidth=1, label=f"{name}, smoothed")
            else:
                axis.plot(steps, values, linewidth=1.2, marker="." if name.startswith("eval/") else None, label=name)
        if title == "norms" and all(max(_series(entries, name)[1]) > 0 for name in series):
            axis.set_yscale("log", nonpositive="mask")  # the first update is zero during warmup from zero
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    with atomic_write(file) as content:
        figure.savefig(content, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential average over about a fiftieth of the values, without bias towards zero at the beginning."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def _series(entries: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    steps_and_values = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in steps_and_values], [value for _, value in steps_and_values]
