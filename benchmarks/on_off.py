"""What each optimisation brings: `throughput.py` with everything on, then with one after the other turned off.

    python benchmarks/on_off.py --setup /tmp/bench --config_file accelerate_configs/zero3.yaml --num_processes 2 \
        --rows liger packing --stage 2 --gradient_checkpointing False --max_tokens_per_micro_batch 6000

Other flags are `train.py`'s, for all rows. Each row is a launch of its own; one that fails, mostly for lack of memory,
is shown as such. Rows measured before are taken from `--table`, so that a long list may be done in several calls.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.without import NAMES  # noqa: E402

EVERYTHING = "everything on"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--config_file", required=True, help="accelerate's")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, help="what to turn off; default all")
    parser.add_argument("--steps", type=int, default=7, help="of each row")
    parser.add_argument("--warmup_steps", type=int, default=2, help="of these, not measured")
    parser.add_argument("--table", type=Path, default=Path("on_off.jsonl"))
    own, flags_of_train = parser.parse_known_args()
    missing = [name for name in (EVERYTHING, *own.rows) if name not in read_table(own.table)]
    for name in missing:
        measure(own, name, flags_of_train)
        print_table(own.table)  # each time, since many rows may take longer than one is given
    if not missing:
        print_table(own.table)


def measure(own: argparse.Namespace, name: str, flags_of_train: list[str]) -> None:
    """Appends a row to the table."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", own.config_file]
    command = [*launcher, "--num_processes", own.num_processes, ROOT / "benchmarks" / "throughput.py"]
    command += ["--setup", own.setup, "--name", name, "--table", own.table]
    command += ["--output_dir", own.setup / f"output-{own.table.stem}"]  # two tables may be filled at once
    command += ["--steps", own.steps, "--warmup_steps", own.warmup_steps, *flags_of_train]
    if name != EVERYTHING:
        command += ["--without", name]
    print(f"\n{shlex.join(map(str, command))}", flush=True)
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        out_of_memory = "OutOfMemoryError" in run.stdout
        print(run.stdout[-300 if out_of_memory else -6000 :], flush=True)
        with open(own.table, "a") as table:
            table.write(json.dumps({"name": name, "failed": "out of memory" if out_of_memory else "failed"}) + "\n")


def read_table(file: Path) -> dict[str, dict]:
    """Rows by name, the last of each."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def print_table(file: Path) -> None:
    """Time and memory of each row, and against everything on."""
    rows = read_table(file)
    base = rows[EVERYTHING]
    if "failed" in base:
        sys.exit(f"on_off.py: error: with everything on: {base['failed']}; see above.")
    print("\n| without | s/step | time | peak GiB | more GiB | samples/s/GPU | MFU (6N) |\n|" + "---|" * 7)
    for name, row in rows.items():
        if "failed" in row:
            print(f"| {name} | {row['failed']} | | | | | |")
            continue
        time = row["seconds"] / base["seconds"] - 1
        memory = row["memory"] - base["memory"]
        print(
            f"| {name} | {row['seconds']} | {time:+.1%} | {row['memory']} | {memory:+.1f} | {row['samples']} | "
            f"{row['mfu_6n']} |"
        )
    print(f"\n{base['machine']}; commit {base['commit']}; {base['versions']}", flush=True)


if __name__ == "__main__":
    main()
