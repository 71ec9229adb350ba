"""The recipes for one small GPU: what `mini_llava.tools.plan` says they need, and what they take.

    python benchmarks/small_gpu.py --directory /tmp/small

Runs on any larger GPU: PyTorch's allocator gets no more than a card of 24 or 12 GB has left beside CUDA's own context,
and fails like that card where it is not enough. Speed is the larger GPU's. Models have random weights of the recipes'
shapes, records the lengths of LLaVA's mix (see `random_setup.py`). Each recipe runs one epoch of them, so that the
longest micro-batch that is planned for also runs. `--plan_only` needs no GPU.
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen2Config, SiglipVisionConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_setup import QWEN2_HALF_B, SIGLIP_B_512, make_models, make_records  # noqa: E402
from benchmarks.throughput import read_log  # noqa: E402
from mini_llava import arguments as flags  # noqa: E402
from mini_llava.tools.plan import parse_arguments, plan  # noqa: E402

SHAPE = "0.5b-384"
RECORDS = 1024  # 4 steps of stage 1, 8 of stage 2
GIB = 2**30
CARD_GIB = {12: 11.6, 24: 23.5}  # what cards sold as 12 and 24 GB report, about
CONTEXT_GIB = 0.6  # CUDA's own, which PyTorch's allocator does not count; that of an H200, about


class Recipe(NamedTuple):
    """A recipe, its stage and the size of the card it is for, in GB."""

    name: str
    stage: int
    card: int


RECIPES = tuple(
    Recipe(f"qwen2-0.5b-{card}gb-{name}", stage, card)
    for card in (24, 12)
    for stage, name in ((1, "pretrain"), (2, "finetune"))
)


def make_configurations(directory: Path) -> None:
    """Writes what a plan reads: the models' configurations without weights, tokenizer, image processor, records."""
    make_models(directory, "tiny")  # for its tokenizer
    for weights in directory.glob("*/*.safetensors"):
        weights.unlink()
    language_model = Qwen2Config(max_position_embeddings=4096, architectures=["Qwen2ForCausalLM"], **QWEN2_HALF_B)
    language_model.save_pretrained(directory / "language_model")
    SiglipVisionConfig(**SIGLIP_B_512 | {"image_size": 384}).save_pretrained(directory / "vision_tower")
    make_records(directory, RECORDS, pictures=1)


def words_of(recipe: Recipe, directory: Path) -> list[str]:
    """The trainer's flags: the recipe, but for its models and data."""
    words = [
        *("--stage", str(recipe.stage)),
        *("--config", str(ROOT / "mini_llava" / "recipes" / f"{recipe.name}.yaml")),
        *("--model_name_or_path", str(directory / "language_model")),
        *("--vision_tower", str(directory / "vision_tower")),
        *("--data_path", str(directory / f"stage{recipe.stage}.json"), "--image_folder", str(directory / "images")),
        *("--output_dir", str(directory / "output" / recipe.name)),
        *("--use_liger_kernel", "True", "--save_strategy", "no", "--report_to", "none", "--logging_steps", "1"),
    ]
    if recipe.stage == 2:  # the random tokenizer has no template of its own; the projector may be random too
        words += ["--version", "v1", "--pretrain_mm_mlp_adapter", ""]
    return words


def planned(recipe: Recipe, directory: Path) -> dict[str, float | bool]:
    """What the plan says: the log's `peak_memory_gib`, all that is needed in GiB, and whether the card has it."""
    words = [
        *words_of(recipe, directory),
        *("--accelerate_config", str(ROOT / "accelerate_configs" / "single_gpu.yaml"), "--num_gpus", "1"),
        *("--gpu_memory_gib", str(CARD_GIB[recipe.card])),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            plan(*parse_arguments(words))
        except ValueError as error:  # it does not fit, and says what would
            print(error)
    text = printed.getvalue()
    [peak] = re.findall(r"^ +([\d.]+) peak_memory_gib", text, re.MULTILINE)
    [needed] = re.findall(r"^ +([\d.]+) GiB needed", text, re.MULTILINE)
    return {"planned_peak": float(peak), "planned": float(needed), "fits": "It fits" in text}


def measured(recipe: Recipe, directory: Path) -> dict[str, float | str]:
    """Runs the recipe in a process of its own, under the card's memory: its peak in GiB and samples a second."""
    command = [sys.executable, str(Path(__file__)), "--directory", str(directory), "--only", recipe.name]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"failed": "\n".join(ran.stderr.strip().splitlines()[-15:])}
    log = read_log(directory / "output" / recipe.name)
    steps = [entry for entry in log if "samples_per_second" in entry][1:]
    seconds = sum(step["seconds_per_step"] for step in steps)
    samples = sum(step["samples_per_second"] * step["seconds_per_step"] for step in steps)
    return {"peak": max(step["peak_memory_gib"] for step in steps), "samples_per_second": samples / seconds}


def run_capped(recipe: Recipe, directory: Path) -> None:
    """Trains in this process, with as much memory as the card leaves to PyTorch."""
    import train

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((CARD_GIB[recipe.card] - CONTEXT_GIB) * GIB / total)
    train.train(flags.parse_arguments(words_of(recipe, directory)))


def row(recipe: Recipe, values: dict) -> str:
    """One line of the table."""
    cells = [
        f"`{recipe.name}`",
        f"{CARD_GIB[recipe.card]}",
        f"{values['planned']:.1f}" + ("" if values["fits"] else ", does not fit"),
        f"{values['planned_peak']:.1f}",
        f"{values['peak']:.1f}" if "peak" in values else "failed" if "failed" in values else "",
        f"{values['samples_per_second']:.1f}" if "samples_per_second" in values else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for the models, records and results")
    parser.add_argument("--plan_only", action="store_true", help="measure nothing")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="run this one here, under its cap")
    given = parser.parse_args()
    if given.only:
        return run_capped(next(recipe for recipe in RECIPES if recipe.name == given.only), given.directory)
    given.directory.mkdir(parents=True, exist_ok=True)
    if given.plan_only:
        make_configurations(given.directory)
    else:
        make_records(given.directory, RECORDS)
        make_models(given.directory, SHAPE)
    print("| recipe | card, GiB | planned, GiB | planned peak | measured peak | samples/s |\n|" + "---|" * 6)
    for recipe in RECIPES:
        values = planned(recipe, given.directory)
        if not given.plan_only:
            values |= measured(recipe, given.directory)
        print(row(recipe, values), flush=True)
        if "failed" in values:
            print(values["failed"], file=sys.stderr)


if __name__ == "__main__":
    main()
