"""What the optimisations cost in accuracy: how far the loss runs from an fp32 run, with them and without.

    python benchmarks/loss_distance.py --directory /tmp/distance --shape 7b --layers 4

Trainings on one device, same weights, samples and order: fp32, plain bf16 (padded batches, transformers' own modules
and SDPA, logits of all positions), bf16 with everything on, and that with `--fp8 True` on GPUs that have float8. The
whole language model is trained from random weights, on words with the frequencies of a language, so that the loss falls
from log(32,000) at once.
"""

import argparse
import math
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_setup import LANGUAGE_MODELS, make_models, make_records  # noqa: E402
from benchmarks.throughput import read_log  # noqa: E402
from mini_llava.training.backend import versions  # noqa: E402

ON_GPUS = ["fast_attention", "liger", "fused_adamw"] if torch.cuda.is_available() else []
PLAIN = ["--without", "packing", "trained_logits_only", *ON_GPUS]
RUNS = {
    "fp32, plain": ["--bf16", "False", "--tf32", "False", *PLAIN],
    "bf16, plain": ["--bf16", "True", *PLAIN],
    "bf16, everything on": ["--bf16", "True"],
}
WANTED = {"bf16, everything on": 1.5, "float8, everything on": 2.0}  # at most, times plain bf16's distance
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
    RUNS["float8, everything on"] = ["--bf16", "True", "--fp8", "True"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--directory", type=Path, required=True, help="for models, records and logs")
    parser.add_argument("--shape", choices=LANGUAGE_MODELS, default="7b")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of order and new weights; pooled")
    own, flags_of_train = parser.parse_known_args()
    if not (own.directory / "stage2.json").exists():
        own.directory.mkdir(parents=True, exist_ok=True)
        make_models(own.directory, own.shape, own.layers)
        make_records(own.directory, own.steps * own.global_batch_size + own.global_batch_size, pictures=64, zipf=1.2)
    curves = {name: [] for name in RUNS}
    for seed in own.seeds:
        for number, (name, flags) in enumerate(RUNS.items()):
            output_dir = own.directory / f"run{number}-seed{seed}"
            command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--setup", own.directory]
            command += ["--output_dir", output_dir, "--table", own.directory / "throughput.jsonl", "--name", name]
            command += ["--steps", own.steps, "--warmup_steps", min(4, own.steps - 1), *flags, "--stage", 2]
            command += ["--gradient_checkpointing", False, "--per_device_train_batch_size", 4, "--seed", seed]
            command += ["--global_batch_size", own.global_batch_size, "--learning_rate", own.learning_rate]
            command = list(map(str, [*command, *flags_of_train]))
            print(f"\n{shlex.join(command)}", flush=True)
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"loss_distance.py: error: the run {name!r} has failed, see above.")
            curves[name] += [step["loss"] for step in read_log(output_dir)]
    report(curves, own.steps)


def report(curves: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Print each run's loss at the first and last step and its distance to fp32.

    Args:
        curves: losses of all steps, one seed after the other; the first two are fp32's and plain bf16's.

    Returns:
        Name of each of the others -> its distance, as a multiple of plain bf16's.
    """
    exact = next(iter(curves.values()))
    distances = {}
    print(f"\n| run | loss at step 1 | at step {steps} | RMS distance to fp32 | largest distance |\n|" + "---|" * 5)
    for name, losses in curves.items():
        differences = [abs(loss - reference) for loss, reference in zip(losses, exact, strict=True)]
        distances[name] = math.sqrt(sum(difference**2 for difference in differences) / len(differences))
        shown = f"{distances[name]:.2e} | {max(differences):.2e}"
        print(f"| {name} | {losses[0]:.4f} | {losses[steps - 1]:.4f} | {shown} |")
    _, (_, plain), *others = distances.items()
    ratios = {name: distance / plain for name, distance in others}
    print()
    for name, ratio in ratios.items():
        print(
            f"{name}: the distance is {ratio:.2f} times that of plain bf16 (RMS over {len(exact)} steps; wanted: at "
            f"most {WANTED[name]})."
        )
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{machine}; {versions()}")
    return ratios


if __name__ == "__main__":
    main()
