"""Hours and memory of the published recipes on several GPUs, for docs/planning.md, by `mini_llava.tools.plan`.

    python benchmarks/recipe_plans.py --directory /tmp/plans

No weights and no GPU: the models are configurations of Llama 7B, 13B and CLIP-L/14-336, the records have LLaVA-1.5's
lengths (see `random_setup.py`), one for each hundred, in correspondingly more epochs. How much of the peak goes into
arithmetic is what a benchmark measured on H200s, or assumed; the table says which.
"""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

from transformers import CLIPVisionConfig, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_setup import CLIP_L_336, LANGUAGE_MODELS, VOCABULARY, make_models, make_records  # noqa: E402
from mini_llava.tools.plan import parse_arguments, plan  # noqa: E402

RECORDS = 6_653
EPOCHS = {1: 558_128 / RECORDS, 2: 665_298 / RECORDS}  # of LLaVA-1.5's two files
GPU_MEMORY_GIB = {"A100": 79, "H200": 139}


class Plan(NamedTuple):
    """A recipe and what it is run on.

    expected_mfu: of the GPU's peak.
    recomputed: whether layers are, all of them; `--gradient_checkpointing`.
    tokens: `--max_tokens_per_micro_batch`, if given.
    """

    recipe: str
    stage: int
    config: str
    gpus: int
    gpu: str
    expected_mfu: float
    recomputed: bool
    tokens: int | None = None


# Measured on H200s (docs/performance.md), nothing recomputed: stage 1 60 %, stage 2 51 %, LoRA 48 %. Recomputing all
# layers adds work that does not count: a third in stage 2, a half in stage 1. A100s are assumed to do as well.
PLANS = (
    Plan("llava-1.5-7b-pretrain", 1, "zero2", 8, "A100", 0.60, recomputed=False),
    Plan("llava-1.5-7b-finetune", 2, "zero3", 8, "A100", 0.38, recomputed=True),
    Plan("llava-1.5-7b-finetune-lora", 2, "single_gpu", 1, "A100", 0.48, recomputed=False, tokens=9000),
    Plan("llava-1.5-13b-pretrain", 1, "zero2", 8, "A100", 0.40, recomputed=True),
    Plan("llava-1.5-13b-finetune", 2, "zero3", 8, "A100", 0.38, recomputed=True),
    Plan("llava-1.5-7b-pretrain", 1, "zero2", 8, "H200", 0.60, recomputed=False),
    Plan("llava-1.5-7b-finetune", 2, "zero3", 8, "H200", 0.51, recomputed=False, tokens=14000),
    Plan("llava-1.5-7b-finetune-lora", 2, "single_gpu", 1, "H200", 0.48, recomputed=False, tokens=14000),
    Plan("llava-1.5-13b-finetune", 2, "zero3", 8, "H200", 0.51, recomputed=False, tokens=9000),
    Plan("llava-1.5-13b-finetune-lora", 2, "single_gpu", 1, "H200", 0.48, recomputed=False, tokens=9000),
)


def make_configurations(directory: Path) -> None:
    """Writes the records, and for 7B and 13B a language model and a tower without weights."""
    for size in ("7b", "13b"):
        make_models(directory / size, "tiny")  # for its tokenizer and image processor
        for weights in (directory / size).glob("*/*.safetensors"):
            weights.unlink()
        language_model = LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            architectures=["LlamaForCausalLM"],
            **LANGUAGE_MODELS[size],
        )
        language_model.save_pretrained(directory / size / "language_model")
        CLIPVisionConfig(patch_size=14, **CLIP_L_336).save_pretrained(directory / size / "vision_tower")
    make_records(directory, RECORDS, pictures=1)


def row(run: Plan, directory: Path) -> str:
    """One line of the table; "does not fit" in place of the memory where that is so."""
    models = directory / re.search(r"-(\d+b)-", run.recipe)[1]
    words = [
        *(
            "--stage",
            run.stage,
            "--config",
            ROOT / "mini_llava" / "recipes" / f"{run.recipe}.yaml",
        ),
        *("--model_name_or_path", models / "language_model", "--vision_tower", models / "vision_tower"),
        *("--data_path", directory / f"stage{run.stage}.json", "--image_folder", directory / "images"),
        *("--num_train_epochs", EPOCHS[run.stage], "--output_dir", directory / "out", "--use_liger_kernel", True),
        *("--accelerate_config", ROOT / "accelerate_configs" / f"{run.config}.yaml", "--num_gpus", run.gpus),
        *("--gpu_name", run.gpu, "--gpu_memory_gib", GPU_MEMORY_GIB[run.gpu], "--expected_mfu", run.expected_mfu),
        *("--gradient_checkpointing", run.recomputed),
        *(("--max_tokens_per_micro_batch", run.tokens) if run.tokens else ()),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            plan(*parse_arguments(list(map(str, words))))
        except ValueError as error:  # it does not fit, and says what would
            print(error)
    [hours] = re.findall(r"^Time: (.*?), if", printed.getvalue(), re.MULTILINE)
    [needed] = re.findall(r"^ +([\d.]+) GiB needed", printed.getvalue(), re.MULTILINE)
    fits = "It fits" in printed.getvalue()
    cells = [
        f"`{run.recipe}`",
        f"{run.gpus} {run.gpu}",
        run.config,
        "all" if run.recomputed else "none",
        f"{run.tokens:,}" if run.tokens else "",
        f"{float(needed):.0f}" + ("" if fits else ", does not fit"),
        f"{run.expected_mfu:.0%}",
        hours,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    arguments = parser.parse_args()
    make_configurations(arguments.directory)
    print("| recipe | GPUs | config | recomputed | tokens | GiB each | MFU | time |\n" + "|---" * 8 + "|")
    for run in PLANS:
        print(row(run, arguments.directory), flush=True)


if __name__ == "__main__":
    main()
