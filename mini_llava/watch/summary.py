"""The summary of a finished run: what it did, how long it took, and the command to chat with its model.

All figures come from log.jsonl, so that a resumed run counts all its work once.
"""

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..data.records import RecordStore
from ..data.templates import BadRecord
from ..errors import UserError
from ..files import atomic_write
from ..guards.never_fatal import never_fatal
from ..image_files import BadImage, image_path
from ..words import counted
from .curves import draw_curves
from .json_lines import read_lines

RECORDS_WITH_IMAGES = 1000  # that are looked through for an image to ask about
# In the log: seconds in which nothing was trained.
PAUSES = {"eval/seconds": "evaluation", "save_seconds": "saving", "norm_seconds": "norms"}


def write_summary(
    output_dir: Path, logging_steps: int, pauses: dict[str, float], store: RecordStore, scores: str = ""
) -> str:
    """Write `summary.json` and `curves.png` on rank 0; return the summary as text. A failure is a warning.

    Args:
        logging_steps: steps before the first entry of the log, if the run continues another directory's checkpoint.
        pauses: seconds after the last entry of the log.
        store: the training records, one of whose images is in the command to chat.
        scores: a table that the text has before the command to chat.
    """
    with never_fatal(f"{output_dir}/curves.png is not there"):
        draw_curves(output_dir / "log.jsonl", output_dir / "curves.png")
    text = scores
    with never_fatal(f"{output_dir}/summary.json is not there"):
        values = summarise(list(read_lines(output_dir / "log.jsonl")), logging_steps, pauses)
        values |= {"output_dir": str(output_dir), "talk_to_it": talk_command(output_dir, store)}
        text = describe(values, scores)
        with atomic_write(output_dir / "summary.json") as file:
            file.write(json.dumps(values, indent=1).encode() + b"\n")
    return text


def summarise(entries: Sequence[dict], logging_steps: int, pauses: dict[str, float]) -> dict:
    """Return steps, samples, tokens, seconds by what they were spent on, losses, and the best held-out values.

    Raises UserError if the log has no entry of a step.
    """
    steps = [entry for entry in entries if "seconds_per_step" in entry]
    if not steps:
        raise UserError("log.jsonl has no entry of a step.")
    seconds, samples, tokens = {"training": 0.0}, 0.0, 0.0
    last = max(0, steps[0]["step"] - logging_steps)
    for entry in steps:
        took = entry["seconds_per_step"] * (entry["step"] - last)
        seconds["training"] += took
        samples += entry["samples_per_second"] * took
        tokens += entry["tokens_per_second"] * took
        last = entry["step"]
    for entry in [*entries, pauses]:
        for name, what in PAUSES.items():
            if name in entry:
                seconds[what] = seconds.get(what, 0.0) + entry[name]
    # One step may have samples of one modality only: the mean is over a tenth of the run.
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
    """Return the best of every `eval/` value with its step: the lowest loss, the highest score."""
    best: dict[str, dict] = {}
    for entry in entries:
        for name, value in entry.items():
            if not name.startswith("eval/") or name in PAUSES or name.endswith("_shuffled"):
                continue  # a score with images shuffled is for comparison
            sign = -1 if "loss" in name else 1
            if name not in best or sign * value > sign * best[name]["value"]:
                best[name] = {"value": value, "step": entry["step"]}
    return best


def talk_command(output_dir: Path, store: RecordStore) -> str:
    """Return the command to chat with the result, with an image of the training data if one is found."""
    command = ["python", "-m", "mini_llava.tools.chat", str(output_dir)]
    for index in range(min(len(store), RECORDS_WITH_IMAGES)):
        with contextlib.suppress(BadRecord, BadImage):  # such records may have been skipped
            names, folder = store[index].get("image"), store.image_folder(index)
            name = names[0] if isinstance(names, list) and names else names
            if folder and isinstance(name, str) and image_path(folder, name):
                return shlex.join([*command, "--image", str(Path(folder) / name)])
    return shlex.join(command)


def describe(values: dict, scores: str) -> str:
    """Return the summary as text: figures, the table of scores if there is one, and last the command to chat."""
    took = ", ".join(f"{name} {duration(spent)}" for name, spent in values["seconds"].items())
    lines = [
        "",
        f"{', '.join(counted(values[f'{noun}s'], noun) for noun in ('step', 'sample', 'token'))}. Time: {took}.",
        f"Last logged loss {values['last_loss']:.4f}; mean over the last tenth of the log "
        f"{values['mean_loss_at_the_end']:.4f}.",
    ]
    for name, best in values.get("best_held_out", {}).items():
        lines.append(f"Best {name} {best['value']:.4g} at step {best['step']:,}.")
    lines += [scores] if scores else []
    lines += ["", f"All files are in {values['output_dir']}; curves.png shows the run. Chat with the model:"]
    return "\n".join([*lines, f"  {values['talk_to_it']}"])


def duration(seconds: float) -> str:
    """Format seconds as `42.1 s`, `3 min 5 s` or `2 h 4 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
