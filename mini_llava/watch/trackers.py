"""Trackers of `--report_to`: TensorBoard, or another that accelerate knows. Their failures are warnings.

TensorBoard names a run by the path of its folder. Each run has its own folder in `runs/` of the output directory,
called by the time it started and by that directory; a resumed run goes on in the folder in which it began. To the other
trackers the project is `mini_llava`, or what the variable WANDB_PROJECT says.
"""

import os
from datetime import datetime
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import LoggerType

from ..guards.never_fatal import never_fatal, warn_once


def start(accelerator: Accelerator, values: dict, resumed_at: int | None = None, table: str = "") -> None:
    """Start the trackers with all arguments as text, TensorBoard with the table of what is trained, too.

    resumed_at: the step of the checkpoint; TensorBoard hides what was logged beyond it.
    """
    text = {key: str(value) for key, value in values.items()}
    purge_step = 0 if resumed_at is None else resumed_at + 1
    names = ", ".join(str(tracker) for tracker in accelerator.log_with)
    try:
        # accelerate would name TensorBoard's folder by the project.
        folder = f"runs/{run_folder(Path(accelerator.project_dir), resumed_at is not None)}"
        ours = {LoggerType.TENSORBOARD: TensorBoardTracker(folder, accelerator.logging_dir, purge_step=purge_step)}
        accelerator.log_with = [ours.get(tracker, tracker) for tracker in accelerator.log_with]
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "mini_llava"))
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would show a configuration as two more runs
                tracker.store_init_configuration(text)
            elif accelerator.is_main_process:
                rows = "\n".join(f"| {key} | {value} |" for key, value in text.items())
                tracker.writer.add_text("arguments", f"| flag | value |\n|---|---|\n{rows}")
                tracker.writer.add_text("what is trained", f"```\n{table}\n```")
    except Exception as error:
        accelerator.trackers = []
        warn_once(f"{names} could not be started; log.jsonl has the same values", f"{type(error).__name__}: {error}")


def run_folder(output_dir: Path, is_resumed: bool) -> str:
    """Return the name of the run's folder in `output_dir/runs`: of a resumed run the newest one there.

    That may be `runs` itself, ".", to which runs wrote before there were such folders.
    """
    events, runs = "events.out.tfevents.*", output_dir / "runs"
    # Such a file's name goes on with its seconds since 1970; a folder's hour may be that of another time zone.
    written = [*runs.glob(events), *runs.glob(f"????-??-??_??-??-??_*/{events}")]
    if is_resumed and written:
        return str(max(written, key=lambda path: path.name).parent.relative_to(runs))
    name = output_dir.absolute().name.encode()[:200].decode(errors="ignore")  # a file system's names have 255 bytes
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


# TensorBoard groups names by their beginning and opens the first two groups: held-out values and losses.
PAGES = {
    "norms": ("gradient_norm", "update_norm", "parameter_norm"),
    "speed": (
        *("tokens_per_second", "computed_tokens_per_second", "samples_per_second", "seconds_per_step", "mfu", "mfu_6n"),
        *("data_wait", "padding", "peak_memory_gib", "save_seconds", "norm_seconds", "epoch"),
    ),
}


def name_on_page(name: str) -> str:
    """Return the trackers' name of a value in log.jsonl: `speed/mfu`, `rates/projector`, `loss/image_samples`."""
    for page, names in PAGES.items():
        if name in names:
            return f"{page}/{name}"
    if name.startswith("learning_rate"):
        return f"rates/{name.removeprefix('learning_rate/')}"
    if name.startswith("loss_by_modality/"):
        return f"loss/{name.removeprefix('loss_by_modality/')}_samples"
    return name


def log(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Give a step's values to the trackers."""
    values = {name_on_page(name): value for name, value in values.items()}
    for tracker in accelerator.trackers:
        with never_fatal(f"{tracker.name} lacks entries, which log.jsonl has"):
            tracker.log(values, step=step)


def show(accelerator: Accelerator, name: str, picture: np.ndarray, text: str, step: int) -> None:
    """Give TensorBoard an image, uint8 [H, W, 3], and a text in Markdown. Raises what its writer raises."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard" and accelerator.is_main_process:
            tracker.writer.add_image(name, picture, step, dataformats="HWC")
            tracker.writer.add_text(name, text, step)
            tracker.writer.flush()


def end(accelerator: Accelerator) -> None:
    """Let the trackers write what they hold."""
    for tracker in accelerator.trackers:
        with never_fatal(f"{tracker.name} lacks entries, which log.jsonl has"):
            tracker.finish()
    accelerator.trackers = []
