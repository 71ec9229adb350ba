"""Which checkpoint a run goes on from: a whole one, written by the same run.

LLaVA resumes from whatever directory has the highest number, complete or not, with whatever flags it is given.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator

from ..training.backend import gather_from_ranks
from ..training.checkpoint import agreement
from ..training.manifest import CheckpointError, digest, read_manifest
from ..words import counted
from .checkpoints import check_requested, complete_checkpoints, named_checkpoints, refuse_earlier_run, step_of


def find_checkpoint(
    accelerator: Accelerator, output_dir: Path, requested: str | None, log: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` names: a directory, or `latest`: the newest complete one.

    Its files are verified, each by one of the ranks. All ranks must call it, and get the same answer. With `latest` a
    torn checkpoint is reported and passed over, and without any checkpoint the answer is None.

    Raises:
        CheckpointError: the directory is torn or missing; or there are checkpoints for `latest`, but no complete one;
            or checkpoints of an earlier run are there, which those of this run would mix with.
    """
    seen = gather_from_ranks(accelerator, (named_checkpoints(output_dir), complete_checkpoints(output_dir)))
    everything, present = seen[0]  # rank 0's view: another machine's may be seconds old
    if requested == "latest":
        for path in reversed(everything):
            try:
                verify(accelerator, path)
                return path
            except CheckpointError as error:
                log(f"Passed over: {error}")
        if everything:
            count = len(everything)
            none = f"None of the {count} checkpoints in {output_dir} is whole" if count > 1 else ""
            raise CheckpointError(
                f"{none or f'The only checkpoint in {output_dir} is not whole'}; what is wrong is said above. Move "
                f"{'them' if none else 'it'} away to start anew."
            )
        return None
    if requested is None:
        refuse_earlier_run(present)
        return None
    check_requested(output_dir, path := Path(requested))
    step = verify(accelerator, path)["step"]
    elsewhere = path.resolve().parent != output_dir.resolve()
    present = [other for other in present if elsewhere or step_of(other) > step]
    if present:
        raise CheckpointError(
            f"{output_dir} also holds {present[-1].name}, which does not come before {path}: `latest` and "
            "--save_total_limit would mix it with what this run saves. Move it away, or use another --output_dir."
        )
    return path


def verify(accelerator: Accelerator, directory: Path) -> dict:
    """Return the manifest if all checksums are right; raise CheckpointError on all ranks else. They share the work."""
    with agreement(accelerator, f"{directory} is torn"):
        manifest = read_manifest(directory)
        files = manifest["files"]
        mine = sorted(files)[accelerator.process_index :: accelerator.num_processes]
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda name: digest(directory / name), mine)
            for name, actual in zip(mine, found, strict=True):
                if actual != files[name]:
                    raise CheckpointError(f"{directory / name} has been altered; use an older checkpoint.")
    return manifest


def refuse_another_run(lines: list[str], names: list[str], shapes: dict, saved_shapes: dict) -> None:
    """Raise CheckpointError if the run differs from the one that wrote the checkpoint, a line for each difference.

    Args:
        lines: in what it differs, apart from what is trained.
        names: by which `--resume_ignore` lets these pass.
        shapes, saved_shapes: of the trained parameters by name, now and in the checkpoint.
    """
    both = shapes.keys() | saved_shapes.keys()
    if differing := sorted(name for name in both if shapes.get(name) != saved_shapes.get(name)):
        example = differing[0]
        lines = [
            *lines,
            f"{counted(len(differing), 'trained parameter')}, first {example}: "
            f"{saved_shapes.get(example, 'not trained')} in the checkpoint, {shapes.get(example, 'not trained')} now",
        ]
    if lines:
        advice = f"Make them equal, or let them differ: --resume_ignore {' '.join(names)}" if names else ""
        lines = ["this run is not the one that wrote it.", *(f"  {line}" for line in lines), advice]
        raise CheckpointError("\n".join(lines).rstrip())
