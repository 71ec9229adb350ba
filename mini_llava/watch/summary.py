"""What is left to say when a run has ended: what it did, what it took, where everything is, how to talk to it.

All figures come from log.jsonl, so that those of a run that was resumed count its work from the beginning, and none
twice.
"""

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..data.records import RecordStore
from ..data.templates import BadRecord
from ..files import atomic_write
from ..guards.never_fatal import never_fatal
from ..image_files import BadImage, image_path
from ..words import counted
from .curves import draw_curves
from .json_lines import read_lines

LOOKED_THROUGH = 1000  # records, for a picture to talk about
BESIDE_TRAINING = {
    "eval/seconds": "evaluation",
    "save_seconds": "saving",
}  # in the log: the clock of training stood still


def write_summary(output_dir: Path, logging_steps: int, pauses: dict[str, float], store: RecordStore) -> str:
    """Writes `summary.json` and `curves.png`; returns the summary as text. What fails is a warning. For rank 0 alone.

    Args:
        logging_steps: steps before the first entry of the log, if the run came from another directory's checkpoint.
        pauses: seconds that the log does not have yet, of what came after its last entry.
        store: the training records, for a picture in the command that talks to the model.
    """
    with never_fatal(f"{output_dir}/curves.png is not there"):
        draw_curves(output_dir / "log.jsonl", output_dir / "curves.png")
    text = ""
    with never_fatal(f"{output_dir}/summary.json is not there"):
        values = summarise(list(read_lines(output_dir / "log.jsonl")), logging_steps, pauses)
        values |= {"output_dir": str(output_dir), "talk_to_it": talk_command(output_dir, store)}
        text = describe(values)
        with atomic_write(output_dir / "summary.json") as file:
            file.write(json.dumps(values, indent=1).encode() + b"\n")
    return text


def summarise(entries: Sequence[dict], logging_steps: int, pauses: dict[str, float]) -> dict:
    """Steps, samples, tokens, seconds by what they went into, losses, and the best of each held-out value.

    Raises:
        ValueError: the log has no entry of a step.
    """
    steps = [entry for entry in entries if "seconds_per_step" in entry]
    if not steps:
        raise ValueError("log.jsonl has no entry of a step.")
    seconds, samples, tokens = {"training": 0.0}, 0.0, 0.0
    last = max(0, steps[0]["step"] - logging_steps)
    for entry in steps:
        took = entry["seconds_per_step"] * (entry["step"] - last)
        seconds["training"] += took
        samples += entry["samples_per_second"] * took
        tokens += entry["tokens_per_second"] * took
        last = entry["step"]
    for entry in [*entries, pauses]:
        for name, what in BESIDE_TRAINING.items():
            if name in entry:
                seconds[what] = seconds.get(what, 0.0) + entry[name]
    # One step may have had samples of one modality only: a tenth of the run says more.
    ending = [entry["loss"] for entry in steps[-max(1, len(steps) // 10) :]]
    values = {
        "steps": last,
        "samples": round(samples),
        "tokens": round(tokens),
        "seconds": seconds,
        "last_loss": steps[-1]["loss"],
        "mean_loss_at_the_end": sum(ending) / len(ending),
    }
    if best := best_held_out(entries):
        values["best_held_out"] = best
    return values


def best_held_out(entries: Sequence[dict]) -> dict[str, dict]:
    """Of every `eval/` value the best, and its step: the least of a loss, the most of a score."""
    best: dict[str, dict] = {}
    for entry in entries:
        for name, value in entry.items():
            if not name.startswith("eval/") or name in BESIDE_TRAINING or name.endswith("_shuffled"):
                continue  # a score with the images shuffled is there to be compared with, not to be high
            sign = -1 if "loss" in name else 1
            if name not in best or sign * value > sign * best[name]["value"]:
                best[name] = {"value": value, "step": entry["step"]}
    return best


def talk_command(output_dir: Path, store: RecordStore) -> str:
    """The command that talks to the result, with a picture of the training data if there is one nearby."""
    command = ["python", "-m", "mini_llava.tools.chat", str(output_dir)]
    for index in range(min(len(store), LOOKED_THROUGH)):
        with contextlib.suppress(BadRecord, BadImage):  # such records may have been skipped
            names, folder = store[index].get("image"), store.image_folder(index)
            name = names[0] if isinstance(names, list) and names else names
            if folder and isinstance(name, str) and image_path(folder, name):
                return shlex.join([*command, "--image", str(Path(folder) / name)])
    return shlex.join(command)


def describe(values: dict) -> str:
    """The summary for the terminal."""
    took = ", ".join(f"{name} {duration(spent)}" for name, spent in values["seconds"].items())
    lines = [
        "",
        f"{', '.join(counted(values[f'{noun}s'], noun) for noun in ('step', 'sample', 'token'))} in {took}.",
        f"Loss {values['last_loss']:.4f} in the last entry of the log, {values['mean_loss_at_the_end']:.4f} on average "
        "over its last tenth.",
    ]
    for name, best in values.get("best_held_out", {}).items():
        lines.append(f"Best {name} {best['value']:.4g} at step {best['step']:,}.")
    lines.append(f"Everything is in {values['output_dir']}, the curves in curves.png. Talk to it:")
    return "\n".join([*lines, f"  {values['talk_to_it']}"])


def duration(seconds: float) -> str:
    """`42.1 s`, `3 min 5 s`, `2 h 4 min`"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
