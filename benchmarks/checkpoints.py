"""How fast a training state is written: our own format against DeepSpeed's, the same state, in turn.

    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/checkpoints.py \
        --directory /tmp/states --layers 64

Both times end when the bytes are on the disk: our files are flushed one by one, DeepSpeed's by a sync at the end. Ours
have checksums and a manifest, and any number of processes reads them; DeepSpeed's are pickles, for as many as wrote.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mini_llava.training import backend, checkpoint
from mini_llava.training.sharded_state import ShardedState

WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=64, help="of a million parameters each")
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()

    accelerator = backend.build_accelerator("bf16", 1.0, "none", arguments.directory)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(arguments.layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    inputs = torch.ones(1, WIDTH, dtype=torch.bfloat16, device=accelerator.device)
    with backend.micro_step(accelerator, model, is_last=True):
        backend.backward(accelerator, model(inputs).float().sum())
    backend.optimizer_step(accelerator, optimizer, 1.0)

    def ours(folder: Path) -> None:
        checkpoint.save_checkpoint(ShardedState(accelerator, model, optimizer), folder, 1, {})

    def deepspeeds(folder: Path) -> None:
        model.save_checkpoint(str(folder), tag="1", exclude_frozen_parameters=True)
        os.sync()

    seconds = {ours: [], deepspeeds: []}
    for number in range(arguments.times):
        for save, measured in seconds.items():
            folder = arguments.directory / f"{save.__name__}-{number}"
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            save(folder)
            accelerator.wait_for_everyone()
            measured.append(time.perf_counter() - started)
            if accelerator.is_main_process:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
                print(f"{save.__name__}: {size:.3f} GB in {measured[-1]:.2f} s", flush=True)
                shutil.rmtree(folder)
    if accelerator.is_main_process:
        own, other = (statistics.median(measured) for measured in seconds.values())
        print(f"{backend.describe(accelerator)}: ours takes {own / other:.2f} of DeepSpeed's time (medians).")
    accelerator.end_training()


if __name__ == "__main__":
    main()
