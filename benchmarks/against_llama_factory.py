"""How much faster `train.py` is than LLaMA-Factory 0.9.5 on the same models, records and GPUs, in turns in one command.

    python benchmarks/random_setup.py --directory /tmp/bench --shape 7b
    python benchmarks/against_llama_factory.py --setup /tmp/bench --config_file accelerate_configs/zero3.yaml \
        --num_processes 2 --stage 2 --gradient_checkpointing False --per_device_train_batch_size 22 \
        --max_tokens_per_micro_batch 18500 --ours "--fp8 True"

Flags it does not know are `train.py`'s. `--ours` adds a contender with more of them, `--tree` one from another tree of
this project, say an older commit; `--theirs` gives LLaMA-Factory other arguments. All three may be repeated.

LLaMA-Factory's packages are installed into a folder that its processes alone look into; torch, DeepSpeed and Liger are
the environment's, the same for all. Its side is `llama_factory.py`: full fine-tuning, tower frozen, `neat_packing`,
FlashAttention 2, Liger's kernels, fused AdamW, nothing recomputed where the GPU has the memory. Where flash-attn is not
installed, PyTorch's own FlashAttention 2 kernel stands in for it (`flash_attn_by_torch.py`), as it does for `train.py`,
after a comparison with fp32. Rates count the records and tokens that a model was given. Its global batch is a number of
packs, as near 128 records as that comes. A pack in which no record has a picture fails there: 13,824 tokens have none.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.against_trainer import rows_and_medians, segments_of  # noqa: E402
from benchmarks.throughput import COLUMNS, read_log, row  # noqa: E402

PEER = "LLaMA-Factory"
PACKAGES = (
    *("llamafactory==0.9.5", "transformers==5.5.4", "tokenizers==0.22.2", "accelerate==1.11.0", "peft==0.18.1"),
    *("trl==0.24.0", "datasets==4.0.0", "huggingface-hub==1.33.0", "dill==0.3.8", "multiprocess==0.70.16"),
    *("fsspec==2025.3.0", "fire==0.7.1", "termcolor==3.3.0", "omegaconf==2.3.0", "torchdata==0.11.0"),
    "antlr4-python3-runtime==4.9.3",
)
ANY_VERSION = ("torchaudio", "pandas", "xxhash", "requests", "httpx")  # the environment's own
SHOWN = ("name", "samples", "tokens", "mfu_6n", "memory", "seconds", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--config_file", type=Path, required=True, help="accelerate's, for our side")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs, for both sides")
    parser.add_argument("--warmup_steps", type=int, default=2, help="not measured")
    parser.add_argument("--segments", type=int, default=3, help="of each start")
    parser.add_argument("--steps_per_segment", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each contender, in turns; 0 only prepares")
    parser.add_argument(
        "--ours", action="append", default=[], help="flags of train.py for one more contender, in one word"
    )
    parser.add_argument(
        "--tree", action="append", default=[], type=Path, help="of this project, for one more contender"
    )
    parser.add_argument(
        "--theirs", action="append", help="key=value arguments of LLaMA-Factory and --zero STAGE, in one word"
    )
    parser.add_argument("--without_theirs", action="store_true", help="our contenders alone; installs nothing")
    parser.add_argument(
        "--wheels", type=Path, help="install LLaMA-Factory's packages from this folder, without network"
    )
    parser.add_argument("--site", type=Path, help="where to install them, default SETUP/peer/site")
    parser.add_argument(
        "--table", type=Path, default=Path("against_llama_factory.jsonl"), help="rows are appended to it"
    )
    own, flags = parser.parse_known_args()

    runs = {"ours": (our_command(own, ROOT, flags), dict(os.environ))}
    for more in own.ours:
        runs[f"ours, {more}"] = our_command(own, ROOT, [*flags, *shlex.split(more)]), dict(os.environ)
    for tree in own.tree:
        runs[f"ours at {tree}"] = our_command(own, tree.resolve(), flags), dict(os.environ)
    if not own.without_theirs:
        site = own.site or own.setup / "peer" / "site"
        install(site, own.wheels)
        environment = peer_environment(site)
        prepare(own.setup, site, environment)
        for more in own.theirs or [""]:
            runs[f"{PEER}, {more}" if more else PEER] = peer_command(own, shlex.split(more)), environment

    segments: dict[str, list[list[dict]]] = {}
    for _ in range(own.rounds):
        for number, (name, (command, environment)) in enumerate(runs.items()):
            log = launch(name, command, environment, own.setup / f"against-{number}")
            measured = segments_of(log[own.warmup_steps :], own.steps_per_segment)
            segments.setdefault(name, []).extend(measured)
            for part in measured:
                values = row(name, part, own.num_processes)
                print(f"{values['samples']} samples/s, {values['tokens']:,} tokens/s a GPU", flush=True)
    if own.rounds:
        report(segments, own.num_processes, own.table)
    if failed := [name for name, measured in segments.items() if not measured]:
        sys.exit(f"against_llama_factory.py: error: no run of {failed[0]!r} came to its end, see above.")


def our_command(own: argparse.Namespace, tree: Path, flags: list[str]) -> list:
    """Launches `throughput.py` of a tree of this project; --output_dir is still to come."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", own.config_file.resolve()]
    launcher += ["--num_processes", own.num_processes, "--main_process_port", free_port()]
    program = [tree / "benchmarks" / "throughput.py", "--table", own.setup / "against.jsonl"]
    return [*launcher, *program, "--warmup_steps", own.warmup_steps, *shared_flags(own), *flags]


def peer_command(own: argparse.Namespace, more: list[str]) -> list:
    """Launches `llama_factory.py`; --output_dir is still to come."""
    launcher = [sys.executable]
    if own.num_processes > 1 or "--zero" in more:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", own.num_processes]
        launcher += ["--master_port", free_port()]
    return [*launcher, ROOT / "benchmarks" / "llama_factory.py", *shared_flags(own), *more]


def shared_flags(own: argparse.Namespace) -> list:
    return ["--setup", own.setup, "--steps", own.warmup_steps + own.segments * own.steps_per_segment]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def install(site: Path, wheels: Path | None) -> None:
    """Puts LLaMA-Factory's packages into a folder, from PyPI or from wheels, once; the versions are looked at."""
    if not (site / "llamafactory").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site]
        packages = ["--no-index", *sorted(wheels.glob("*.whl"))] if wheels else PACKAGES
        subprocess.run(list(map(str, [*pip, *packages])), check=True)
    installed = importlib.metadata.distributions(path=[str(site)])
    found = {part.metadata["Name"].lower().replace("_", "-"): part.version for part in installed}
    for name, version in (package.split("==") for package in PACKAGES):
        if found.get(name) != version:
            sys.exit(f"against_llama_factory.py: error: {site} has {name} {found.get(name)}, not {version}.")
    if missing := [name for name in ANY_VERSION if not ((site / name).exists() or importlib.util.find_spec(name))]:
        found = f"LLaMA-Factory imports {', '.join(missing)} too, which this environment lacks"
        sys.exit(f"against_llama_factory.py: error: {found}: pip install {' '.join(missing)} (torchaudio as torch).")
    if not any(importlib.metadata.distributions(name="flash-attn")):
        (site / "flash_attn").mkdir(exist_ok=True)
        shutil.copy(ROOT / "benchmarks" / "flash_attn_by_torch.py", site / "flash_attn" / "__init__.py")
        # transformers imports these names from there, and looks for the package's name and version.
        names = "_index_first_axis as index_first_axis, _pad_input as pad_input, _unpad_input as unpad_input"
        padding = f"from transformers.modeling_flash_attention_utils import {names}\n"
        (site / "flash_attn" / "bert_padding.py").write_text(padding)
        described = site / "flash_attn-2.8.3.dist-info"
        described.mkdir(exist_ok=True)
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
        (described / "RECORD").write_text("flash_attn/__init__.py,,\nflash_attn/bert_padding.py,,\n")


def peer_environment(site: Path) -> dict[str, str]:
    """The environment with the folder's packages in front, and no network."""
    searched = os.pathsep.join([str(site.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    more = {"PYTHONPATH": searched, "HF_HOME": str(site.resolve().parent / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ | offline | more


def prepare(setup: Path, site: Path, environment: dict[str, str]) -> None:
    """Writes what LLaMA-Factory reads, once, and holds the stand-in for flash-attn against fp32."""
    if (stand_in := site / "flash_attn" / "__init__.py").exists():
        subprocess.run([sys.executable, str(stand_in)], check=True)
    if not (setup / "peer" / "data" / "dataset_info.json").exists():
        command = [sys.executable, ROOT / "benchmarks" / "llama_factory.py", "--setup", setup, "--convert"]
        subprocess.run(list(map(str, command)), env=environment, check=True)


def launch(name: str, command: list, environment: dict[str, str], output_dir: Path) -> list[dict]:
    """Trains; returns the logged steps, none if it failed: then the end of what it printed is shown."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "log.jsonl").unlink(missing_ok=True)
    words = list(map(str, [*command, "--output_dir", output_dir]))
    print(f"\n{name}: {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    with open(output_dir / "printed.txt", "w") as printed:
        code = subprocess.run(words, env=environment, stdout=printed, stderr=subprocess.STDOUT, check=False).returncode
    print(f"ended with {code} after {time.perf_counter() - started:.0f} s", flush=True)
    if code:
        print((output_dir / "printed.txt").read_text(errors="replace")[-3000:], flush=True)
        return []
    return read_log(output_dir)


def report(segments: dict[str, list[list[dict]]], devices: int, table: Path) -> dict[str, dict]:
    """Prints a row for each contender, the median of its segments, and its tokens over the peer's; returns the rows."""
    rows, medians = rows_and_medians(segments, devices, table)
    theirs = [values for name, values in medians.items() if name.startswith(PEER)]
    if "ours" in medians:  # the same language model: 6N is as many FLOP a token
        for values in theirs:
            share = float(medians["ours"]["mfu_6n"].rstrip("%")) * values["tokens"] / medians["ours"]["tokens"]
            values["mfu_6n"] = f"{share:.1f}%"
    if not medians:
        return {}
    base = max(theirs or medians.values(), key=lambda values: values["tokens"])
    print("\n| " + " | ".join(COLUMNS[key] for key in SHOWN) + " | ratio |\n|" + "---|" * (len(SHOWN) + 1))
    for values in medians.values():
        ratio = values["tokens"] / base["tokens"]
        print("| " + " | ".join(str(values[key]) for key in SHOWN) + f" | {ratio:.2f} |")
    print(f"\nRatio: tokens over those of {base['name']!r}.")
    for name, measured in rows.items():
        loss = statistics.fmean(step["loss"] for part in segments[name] for step in part)
        each = ", ".join(f"{values['tokens']:,}" for values in measured)
        print(f"{name}: tokens/s/GPU of each segment {each}; mean loss {loss:.3f}")
    if "ours" in medians:
        print(f"{medians['ours']['machine']}; commit {medians['ours']['commit']}; {medians['ours']['versions']}")
    if theirs:
        print(f"{PEER}'s side: {', '.join(PACKAGES[:6])}")
    return medians


if __name__ == "__main__":
    main()
