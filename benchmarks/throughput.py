"""How fast `train.py` trains: its real loop, data loading included, on models and records of `random_setup.py`.

    python benchmarks/random_setup.py --directory /tmp/bench --shape 7b
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/throughput.py \
        --setup /tmp/bench --name "ZeRO-3 x 2" --stage 2 --gradient_checkpointing False

Every other flag is `train.py`'s. Each run appends a row to `--table` (throughput.jsonl) and prints the table so far.
Writing the result is not measured, and its weights are removed. `--without NAME` turns an optimisation off (see
`without.py`; `on_off.py` tables them all).
`--profile FILE` writes what the GPU did in the last step but one, and leaves that and the last out of the row.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks import without  # noqa: E402
from benchmarks.steps import before_each_step  # noqa: E402
from mini_llava import arguments as flags  # noqa: E402
from mini_llava.training import backend  # noqa: E402

COLUMNS = {
    "name": "run",
    "samples": "samples/s/GPU",
    "tokens": "tokens/s/GPU",
    "computed": "computed tokens/s/GPU",
    "mfu_6n": "MFU (6N)",
    "mfu": "MFU",
    "memory": "peak GiB",
    "wait": "waits for data",
    "seconds": "s/step",
    "steps": "steps",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--name", default="", help="of the row")
    parser.add_argument("--steps", type=int, default=12, help="in all")
    parser.add_argument("--warmup_steps", type=int, default=4, help="of these, not measured")
    parser.add_argument("--output_dir", type=Path, help="of the run, default SETUP/output")
    parser.add_argument("--table", type=Path, default=Path("throughput.jsonl"))
    parser.add_argument("--without", nargs="+", choices=without.NAMES, default=[], help="optimisations to turn off")
    parser.add_argument("--profile", type=Path, help="write the GPU's busiest kernels in a step to this file")
    own, flags_of_train = parser.parse_known_args()
    if own.warmup_steps >= own.steps - 2 * bool(own.profile):
        parser.error(f"--warmup_steps {own.warmup_steps} leaves none of --steps {own.steps} to measure.")
    try:
        flags_of_train += without.turn_off(own.without)
    except ValueError as error:
        parser.error(str(error))
    log = run(own, flags_of_train)
    rank, devices = backend.launched_rank()
    if own.profile:
        log = log[:-2]  # the profiled step is slower, and the next one waits for the profiler
    if rank == 0:
        with open(own.table, "a") as table:
            table.write(json.dumps(row(own.name, log[own.warmup_steps :], devices)) + "\n")
        print_table(own.table)


def arguments_of_the_run(own: argparse.Namespace, flags_of_train: list[str]) -> flags.Arguments:
    """The trainer's arguments for what random_setup.py wrote."""
    stage = flags_of_train[flags_of_train.index("--stage") + 1]
    return flags.parse_arguments(
        [
            *("--model_name_or_path", str(own.setup / "language_model")),
            *("--vision_tower", str(own.setup / "vision_tower")),
            *("--data_path", str(own.setup / f"stage{stage}.json"), "--image_folder", str(own.setup / "images")),
            *("--max_steps", str(own.steps), "--save_strategy", "no", "--report_to", "none"),
            *("--output_dir", str(own.output_dir or own.setup / "output"), "--logging_steps", "1"),
            *flags_of_train,
        ]
    )


def run(own: argparse.Namespace, flags_of_train: list[str]) -> list[dict]:
    """Trains, and returns the logged steps."""
    arguments = arguments_of_the_run(own, flags_of_train)
    if own.profile:
        profile_step(own.profile, own.steps - 1)
    train.train(arguments)
    output_dir = Path(arguments.training.output_dir)
    if backend.launched_rank()[0] == 0:
        for weights in (*output_dir.glob("*.safetensors"), *output_dir.glob("*.bin")):
            weights.unlink()
    return read_log(output_dir)


def read_log(output_dir: Path) -> list[dict]:
    """A run's logged steps."""
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def profile_step(file: Path, step: int) -> None:
    """Have rank 0 run this step of the trainer under torch's profiler, and write what it found."""
    profiler, begun = torch.profiler.profile(), 0

    def act(_model, _micro_batches) -> None:
        nonlocal begun
        begun += 1
        if backend.launched_rank()[0] > 0 or begun not in (step, step + 1):
            return
        torch.cuda.synchronize()
        if begun == step:
            return profiler.start()
        profiler.stop()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        computing = [event for event in events if "nccl" not in event.name]
        span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
        hosts = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
        gaps = "\n".join(idle_times(events))
        busy = f"{busy_time(computing) / span:.1%} computing, {busy_time(events) / span:.1%} with communication"
        file.write_text(
            f"{span / 1e6:.3f} s from the first to the last kernel; busy: {busy}\n{gaps}\n{table}\n{hosts}\n"
        )

    before_each_step(act)


def busy_time(events: list) -> float:
    """Microseconds in which at least one of the events runs."""
    total, until = 0.0, 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def idle_times(events: list) -> list[str]:
    """Where nothing runs: how much in each tenth of the time, and the ten longest pieces with their neighbours."""
    events = sorted(events, key=lambda event: event.time_range.start)
    first = until = events[0].time_range.start
    before, gaps = events[0].name, []
    for event in events:
        if event.time_range.start > until:
            gaps.append((event.time_range.start - until, until - first, before, event.name))
        if event.time_range.end > until:
            until, before = event.time_range.end, event.name
    longest = sorted(sorted(gaps, reverse=True)[:10], key=lambda gap: gap[1])
    tenths = [0.0] * 10
    for length, at, _, _ in gaps:
        tenths[min(9, int(10 * at / (until - first)))] += length / 1e3
    in_tenths = ", ".join(f"{milliseconds:.0f}" for milliseconds in tenths)
    return [f"idle {sum(tenths):.0f} ms in {len(gaps)} pieces, {in_tenths} in each tenth; the longest:"] + [
        f"  {length / 1e3:.2f} ms at {at / 1e3:.0f} ms, after {before[:60]}, before {name[:60]}"
        for length, at, before, name in longest
    ]


def commit() -> str:
    """Of the code that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def row(name: str, steps: list[dict], devices: int) -> dict:
    """Means over the measured steps, by time: what a longer run would show."""
    seconds = [step["seconds_per_step"] for step in steps]

    def rate(key: str) -> float:
        return sum(step.get(key, 0.0) * time for step, time in zip(steps, seconds, strict=True)) / sum(seconds)

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "name": name,
        "samples": round(rate("samples_per_second") / devices, 2),
        "tokens": round(rate("tokens_per_second") / devices),
        "computed": round(rate("computed_tokens_per_second") / devices),
        "mfu_6n": f"{rate('mfu_6n'):.1%}",
        "mfu": f"{rate('mfu'):.1%}",
        "memory": round(max(step.get("peak_memory_gib", 0.0) for step in steps), 1),
        "wait": f"{rate('data_wait'):.1%}",
        "seconds": round(statistics.median(seconds), 3),
        "steps": len(steps),
        "machine": f"{devices} x {machine}",
        "versions": backend.versions(),
        "commit": commit(),
        "flags": " ".join(sys.argv[1:]),
    }


def print_table(file: Path) -> None:
    """The rows of `--table` as Markdown."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [values for values in rows if "failed" not in values]  # on_off.py's
    print("\n| " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * len(COLUMNS))
    for values in rows:
        print("| " + " | ".join(str(values[key]) for key in COLUMNS) + " |")
    print(f"\n{rows[-1]['machine']}; commit {rows[-1]['commit']}; {rows[-1]['versions']}")


if __name__ == "__main__":
    main()
