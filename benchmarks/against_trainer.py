"""How much faster `train.py` is than transformers' `Trainer` on the same work, one after the other in one command.

    python benchmarks/random_setup.py --directory /tmp/bench --shape 7b --records 3840
    python benchmarks/against_trainer.py --setup /tmp/bench --config_file accelerate_configs/zero3.yaml \
        --num_processes 2 --stage 2 --ours "--gradient_checkpointing False --max_tokens_per_micro_batch 14000"

The Trainer's side is `transformers_trainer.py`: the same weights, records, tokens, global batches in the same order,
trained parts, AdamW, schedule, clipping, precision, number of loader processes and DeepSpeed bucket sizes. Its are
padded micro-batches dealt as LLaVA does, FlashAttention 2 where it is installed and otherwise SDPA, logits and losses
of all positions, gradients that add up in bf16, and activation checkpointing, which batches of 16 need; `--trainers`
gives it other flags. Each side has processes of its own, because an allocator's settings, Liger's kernels and
DeepSpeed's global state would outlive the first. Steps after the warm-up are cut into segments; the table has medians.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import COLUMNS, read_log, row  # noqa: E402

SHOWN = ("name", "samples", "tokens", "computed", "mfu_6n", "mfu", "memory", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--config_file", required=True, help="accelerate's, for both sides")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=3, help="not measured")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--steps_per_segment", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1, help="how often both sides are started")
    parser.add_argument("--ours", default="", help="flags of train.py for our side alone, in one word")
    parser.add_argument("--trainers", default="", help="flags of train.py for the Trainer's side alone")
    parser.add_argument("--table", type=Path, default=Path("against_trainer.jsonl"), help="rows are appended to it")
    own, flags_of_both = parser.parse_known_args()
    segments: dict[str, list[list[dict]]] = {"Trainer": [], "ours": []}
    for _ in range(own.rounds):
        for name, program, flags in (
            ("Trainer", "transformers_trainer.py", own.trainers),
            ("ours", "throughput.py", own.ours),
        ):
            segments[name] += measure(own, name, program, [*flags_of_both, *shlex.split(flags)])
    report(segments, own.num_processes, own.table)


def measure(own: argparse.Namespace, name: str, program: str, flags: list[str]) -> list[list[dict]]:
    """Launches one side; returns its logged steps after the warm-up, in segments."""
    output_dir = own.setup / f"against_trainer-{name}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", own.config_file]
    launcher += ["--num_processes", own.num_processes]
    steps = own.warmup_steps + own.segments * own.steps_per_segment
    command = [*launcher, ROOT / "benchmarks" / program, "--setup", own.setup, "--output_dir", output_dir]
    command += ["--steps", steps, *flags]
    if name == "ours":
        command += ["--name", name, "--warmup_steps", own.warmup_steps, "--table", output_dir / "table.jsonl"]
    print(f"\n{shlex.join(map(str, command))}\n", flush=True)
    (output_dir / "log.jsonl").unlink(missing_ok=True)
    if subprocess.run(list(map(str, command)), check=False).returncode:
        sys.exit(f"against_trainer.py: error: the side {name!r} has failed, see above.")
    return segments_of(read_log(output_dir)[own.warmup_steps :], own.steps_per_segment)


def segments_of(log: list[dict], steps: int) -> list[list[dict]]:
    return [log[start : start + steps] for start in range(0, len(log), steps)]


def rows_and_medians(
    segments: dict[str, list[list[dict]]], devices: int, table: Path
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """A row for each segment, which the table gets too, and for each side its median, with the highest peak."""
    rows = {name: [row(name, steps, devices) for steps in measured] for name, measured in segments.items() if measured}
    medians = {}
    for name, measured in rows.items():
        middle = sorted(measured, key=lambda values: values["tokens"])[len(measured) // 2]
        medians[name] = middle | {"memory": max(values["memory"] for values in measured)}
        with open(table, "a") as file:
            file.writelines(json.dumps(values) + "\n" for values in measured)
    return rows, medians


def report(segments: dict[str, list[list[dict]]], devices: int, table: Path) -> dict[str, float]:
    """Prints a row for each side and their ratios; returns the ratios of the medians."""
    rows, medians = rows_and_medians(segments, devices, table)
    ratios = {key: medians["ours"][key] / medians["Trainer"][key] for key in ("samples", "tokens")}
    # The meter cannot look into the other model, but both sides do the same work: the same steps, the same arithmetic.
    medians["Trainer"]["mfu"] = f"{float(medians['ours']['mfu'].rstrip('%')) / ratios['tokens']:.1f}%"
    print("\n| " + " | ".join(COLUMNS[key] for key in SHOWN) + " |\n|" + "---|" * len(SHOWN))
    for values in medians.values():
        print("| " + " | ".join(str(values[key]) for key in SHOWN) + " |")
    each = [ours["tokens"] / theirs["tokens"] for ours, theirs in zip(rows["ours"], rows["Trainer"], strict=True)]
    count, steps = len(each), len(segments["ours"][0])
    losses = [statistics.fmean(step["loss"] for part in measured for step in part) for measured in segments.values()]
    print(
        f"\nOurs is {ratios['samples']:.2f} times as fast (medians of {count} segments of {steps} steps); segment by "
        f"segment: {', '.join(f'{ratio:.2f}' for ratio in each)}. Mean loss {losses[0]:.4f} there, {losses[1]:.4f} "
        f"here.\n{medians['ours']['machine']}; commit {medians['ours']['commit']}; {medians['ours']['versions']}"
    )
    return ratios


if __name__ == "__main__":
    main()
