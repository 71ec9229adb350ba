"""What `tools.plan` estimates against what the GPU shows, on the models and records of `random_setup.py`.

    python benchmarks/random_setup.py --directory /tmp/bench --shape 7b
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/memory.py \
        --setup /tmp/bench --name "ZeRO-3 x 2" --stage 2 --gradient_checkpointing False

Every other flag is `train.py`'s, those of a plan included. The run is that of `throughput.py`, a few steps of it; its
longest micro-batch comes first, with room for AdamW's moments, so that the peak of the first step is that of the run.
Where there is no GPU, or with `--only_estimate`, the estimate stands alone and the models need no weights.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import throughput  # noqa: E402
from mini_llava.errors import UserError  # noqa: E402
from mini_llava.tools import plan  # noqa: E402
from mini_llava.tools.memory import GIB, Estimate  # noqa: E402
from mini_llava.training import backend  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--name", default="", help="of the row")
    parser.add_argument("--steps", type=int, default=3, help="in all")
    parser.add_argument("--output_dir", type=Path, help="of the run, default SETUP/output")
    parser.add_argument("--table", type=Path, default=Path("memory.jsonl"))
    parser.add_argument("--only_estimate", action="store_true", help="train nothing, also where there is a GPU")
    own, others = parser.parse_known_args()
    own.profile = None
    planning, of_train = plan.split_flags(others)
    found = estimated(own, planning, of_train)
    measured = None
    if torch.cuda.is_available() and not own.only_estimate:
        if planning != plan.PlanArguments():
            parser.error("The flags of a plan are for an estimate alone: add --only_estimate, or leave them out.")
        measured = max(step["peak_memory_gib"] for step in throughput.run(own, of_train))
    if backend.launched_rank()[0] == 0:
        with open(own.table, "a") as table:
            table.write(json.dumps(row(own.name, found, measured)) + "\n")
        print_table(own.table)


def estimated(own: argparse.Namespace, planning: plan.PlanArguments, of_train: list[str]) -> Estimate | None:
    """Print the plan, also of what does not fit, and return its estimate; None on ranks that plan nothing."""
    arguments = throughput.arguments_of_the_run(own, of_train)
    if backend.launched_rank()[0] > 0:
        return None
    planned = plan.print_run(arguments, planning)
    found = planned.estimate()
    try:
        plan.print_memory(planned, found)
    except UserError as error:
        print(error)
    return found


def row(name: str, found: Estimate, measured: float | None) -> dict:
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    values = {"name": name, "estimate": round(found.peak / GIB, 1)}
    if measured is not None:
        values |= {"measured": round(measured, 1), "ratio": f"{found.peak / GIB / measured:.3f}"}
    return values | {
        "parts": {part: round(size / GIB, 2) for part, size in found.parts.items()},
        "machine": machine,
        "versions": backend.versions(),
        "commit": throughput.commit(),
        "flags": " ".join(sys.argv[1:]),
    }


def print_table(file: Path) -> None:
    """The rows of `--table` as Markdown."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    print("\n| run | estimated peak GiB | measured peak GiB | ratio |\n|---|---|---|---|")
    for values in rows:
        measured, ratio = values.get("measured", "-"), values.get("ratio", "-")
        print(f"| {values['name']} | {values['estimate']} | {measured} | {ratio} |")
    print(f"\n{rows[-1]['machine']}; commit {rows[-1]['commit']}; {rows[-1]['versions']}")


if __name__ == "__main__":
    main()
