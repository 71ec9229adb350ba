"""Which checkpoints an output directory holds, which of them are in the way, and which a run removes.

Looked at before anything is loaded, so without torch.
"""

import re
import shutil
from pathlib import Path

from ..training.manifest import CheckpointError, hide, is_ours, read_manifest


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def named_checkpoints(output_dir: Path) -> list[Path]:
    """Return every directory with a checkpoint's name, torn ones included, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first: those with a manifest, which is written last."""
    return [path for path in named_checkpoints(output_dir) if (path / "manifest.json").is_file()]


def foreign_checkpoints(output_dir: Path) -> list[Path]:
    """Return what has a checkpoint's name and is not ours, such as those of LLaVA's own trainer; oldest first."""
    return [path for path in named_checkpoints(output_dir) if not is_ours(path)]


def check_resume(output_dir: Path, requested: str | None) -> None:
    """Check what one process can check of `find_checkpoint` before anything is loaded. Raises CheckpointError."""
    if requested is None:
        refuse_earlier_run(complete_checkpoints(output_dir))
    elif requested != "latest":
        check_requested(output_dir, Path(requested))
        try:
            read_manifest(Path(requested))
        except CheckpointError as error:
            raise CheckpointError(f"{requested} is torn: {error}") from error


def refuse_earlier_run(present: list[Path]) -> None:
    """Raise CheckpointError if there are checkpoints, which a run that resumes none would mix with."""
    if present:
        raise CheckpointError(
            f"{present[-1]} is there from an earlier run. Use --resume_from_checkpoint latest to go on from it, "
            "another --output_dir to start anew, or delete it."
        )


def check_requested(output_dir: Path, path: Path) -> None:
    """Raise CheckpointError unless the directory is there; the sentence lists the checkpoints that are."""
    if path.is_dir():
        return
    others = complete_checkpoints(path.parent) or complete_checkpoints(output_dir)
    there = f"There are {', '.join(map(str, others))}." if others else f"There is none in {output_dir} either."
    fault = "is not a directory" if path.exists() else "does not exist"
    raise CheckpointError(f"--resume_from_checkpoint {path} {fault}. {there} `latest` takes the newest one.")


def remove_oldest(output_dir: Path, newest: int, keep: int | None) -> list[str]:
    """Remove checkpoints up to step `newest` but the last `keep`; return a sentence for each that cannot be removed."""
    if keep is None:
        return []
    warnings = []
    ours = [path for path in complete_checkpoints(output_dir) if is_ours(path) and step_of(path) <= newest]
    for path in ours[:-keep]:
        try:
            shutil.rmtree(hide(path))
        except OSError as error:
            warnings.append(
                f"Warning: the old {path} could not be removed ({error}); it takes space until you remove it."
            )
    return warnings
