"""How many held-out questions a second `train.py` asks, here and in another tree of the project, in turns.

    git worktree add /tmp/before aa201fc
    python benchmarks/evaluation.py --tree /tmp/before      # the demo's stage 2, after --stage 1 was run in both trees
    python benchmarks/random_setup.py --directory /tmp/bench8 --shape 7b --layers 8 --records 1280
    python benchmarks/evaluation.py --tree /tmp/before --setup /tmp/bench8   # short questions, two to a picture
    python benchmarks/evaluation.py --tree /tmp/before --setup /tmp/bench8 --records conversations

Every other flag is `train.py`'s, for both. A run takes four steps and evaluates before them (which warms up), three
times between them, where loss and answers are asked, and after them, where the answers are asked again with the images
shuffled. Its log has the seconds, to which this adds CPU time, that of loader processes included. The table has medians
of `--rounds` runs, and of the three evaluations of each. Losses and answers before step 1, where both trees have the
same weights, are compared.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = {"loss and answers": (1, 2, 3), "and with images shuffled": (4,)}  # the steps after which they are


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tree", type=Path, help="another checkout, to compare with")
    parser.add_argument("--setup", type=Path, help="what random_setup.py wrote; default the demo")
    parser.add_argument("--records", choices=("questions", "conversations"), default="questions", help="of a setup")
    parser.add_argument("--questions", type=int, default=512, help="of a setup")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # a tree, in whose process this one is
    own, flags = parser.parse_known_args(command_line)
    if own.inside:
        return run_inside(own.inside, flags)
    if {"--max_steps", "--eval_steps"} & set(flags):
        parser.error("a run has four steps and an evaluation after each: leave out --max_steps and --eval_steps.")
    flags = [*flags_of(own), *flags]
    runs: dict[str, list[dict[int, dict]]] = {"there": [], "here": []} if own.tree else {"here": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(own.rounds):
            for side, measured in runs.items():
                tree = own.tree.resolve() if side == "there" else ROOT
                measured.append(found := measure(tree, flags, Path(folder) / f"{side}-{number}"))
                seconds = {step: f"{values['eval/seconds']:.1f}" for step, values in found.items()}
                each = (f"{', '.join(map(seconds.get, steps))} s for {name}" for name, steps in MOMENTS.items())
                print(f"round {number + 1} of {own.rounds}, {side}: {'; '.join(each)}", flush=True)
    report(runs)


def flags_of(own: argparse.Namespace) -> list[str]:
    """The flags of `train.py` that are not the caller's."""
    flags = ["--stage", "2", "--max_steps", "4", "--eval_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    flags += ["--eval_samples_shown", "100000"]  # all, to be compared
    if own.setup is None:
        return flags
    held_out = own.setup / f"held_out_{own.records}.json"
    if own.records == "questions":
        write_questions(held_out, own.questions, len(list((own.setup / "images").iterdir())))
    else:
        held_out.write_text(json.dumps(json.loads((own.setup / "stage2.json").read_text())[: own.questions]))
    flags += ["--model_name_or_path", own.setup / "language_model", "--vision_tower", own.setup / "vision_tower"]
    flags += ["--data_path", own.setup / "stage2.json", "--image_folder", own.setup / "images"]
    flags += ["--eval_data_path", held_out, "--eval_image_folder", own.setup / "images"]
    return [*map(str, flags), "--global_batch_size", "4", "--per_device_train_batch_size", "4"]


def write_questions(file: Path, count: int, pictures: int) -> None:
    """Two questions to a picture, of 6 to 16 words, with answers of 1 to 3, as in VQA data."""
    random = np.random.default_rng(1)

    def text(fewest: int, most: int) -> str:
        return " ".join(f"w{word}" for word in random.integers(0, 30_000, random.integers(fewest, most + 1)))

    records = [
        {
            "image": f"{number // 2 % pictures}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{text(6, 16)}"},
                {"from": "gpt", "value": text(1, 3)},
            ],
        }
        for number in range(count)
    ]
    file.write_text(json.dumps(records))


def measure(tree: Path, flags: list[str], output_dir: Path) -> dict[int, dict]:
    """Run a tree's `train.py`; return what it says of each evaluation, by step, with `cpu` seconds and `answers`."""
    command = [sys.executable, Path(__file__).resolve(), "--inside", tree, *flags, "--output_dir", output_dir]
    run = subprocess.run(list(map(str, command)), cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        sys.exit(f"{run.stdout[-6000:]}\nevaluation.py: error: the run of {tree} has failed, see above.")
    for weights in output_dir.glob("*.safetensors"):
        weights.unlink()
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    found = {entry["step"]: entry for entry in entries if "eval/loss" in entry}
    for line in (output_dir / "cpu.jsonl").read_text().splitlines():
        step, seconds = json.loads(line)
        found[step]["cpu"] = seconds
    for line in (output_dir / "eval_samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        found[sample["step"]].setdefault("answers", []).append(sample["answer"])
    return found


def run_inside(tree: Path, flags: list[str]) -> None:
    """Be `train.py` of a tree, and write the CPU time of each evaluation beside its log."""
    sys.path[0] = str(tree)
    sys.argv = [str(tree / "train.py"), *flags]
    import train

    evaluation = getattr(train, "Evaluation", None) or train.HeldOut  # its name until cdd0392
    evaluate = evaluation.evaluate
    file = Path(flags[flags.index("--output_dir") + 1]) / "cpu.jsonl"

    def timed(self, step: int, log) -> object:
        before, is_new = cpu_seconds(), step not in getattr(self, "evaluated", ())
        result = evaluate(self, step, log)
        if is_new:
            with open(file, "a") as lines:
                lines.write(json.dumps([step, cpu_seconds() - before]) + "\n")
        return result

    evaluation.evaluate = timed
    train.main()


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def report(runs: dict[str, list[dict[int, dict]]]) -> dict[str, float]:
    """Print the table; return the ratios of questions a second, if there are two trees."""
    here = runs["here"]
    questions = len(here[0][0]["answers"])
    ratios = {}
    print(f"\n{questions} held-out questions\n\n| evaluation | tree | questions/s | each run | CPU s |")
    print("|---|---|---|---|---|")
    for name, steps in MOMENTS.items():
        medians = {}
        for side, measured in runs.items():
            rates = [questions / found[step]["eval/seconds"] for found in measured for step in steps]
            cpu = medians[f"{side} cpu"] = statistics.median(found[step]["cpu"] for found in measured for step in steps)
            medians[side] = statistics.median(rates)
            each = ", ".join(f"{rate:.1f}" for rate in rates)
            print(f"| {name} | {side} | {medians[side]:.1f} | {each} | {cpu:.1f} |")
        if "there" in runs:
            ratios[name] = medians["here"] / medians["there"]
            print(f"| | ratio | **{ratios[name]:.2f}** | | {medians['there cpu'] / medians['here cpu']:.2f} |")
    if "there" in runs:
        old, new = runs["there"][0][0], here[0][0]
        same = sum(map(str.__eq__, old["answers"], new["answers"]))
        losses = f"the loss is {old['eval/loss']:.6f} there, {new['eval/loss']:.6f} here"
        print(f"\nBefore step 1 {losses}; {same} of {questions} answers are the same.")
    print(f"{machine()}, {os.environ.get('OMP_NUM_THREADS', 'default')} threads")
    return ratios


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


if __name__ == "__main__":
    main()
