"""How long a save stops a run: written while it stands, behind its steps, or in DeepSpeed's own format, in turn.

    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/checkpoints.py \
        --directory /tmp/states --layers 64

All times end when the bytes are on the disk: our files are flushed one by one, DeepSpeed's by a sync at the end. Ours
have checksums and a manifest, and any number of processes reads them; DeepSpeed's are pickles, for as many as wrote.
"""

import argparse
import functools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mini_llava.options.background import BackgroundWriter
from mini_llava.training import backend, checkpoint
from mini_llava.training.sharded_state import KINDS, ShardedState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=64, help="linear, of width x width parameters each")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1, help="of a step")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--without_deepspeeds", action="store_true", help="leave DeepSpeed's own format out")
    arguments = parser.parse_args()

    accelerator = backend.build_accelerator("bf16", 1.0, "none", arguments.directory)
    with accelerator.device:
        model = nn.Sequential(*(nn.Linear(arguments.width, arguments.width) for _ in range(arguments.layers)))
        inputs = torch.ones(arguments.tokens, arguments.width, dtype=torch.bfloat16)
    # AdamW's usual rate of 1e-3 would make the outputs of 400 layers infinite within ten steps, and steps are left out.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    model, optimizer = accelerator.prepare(model, optimizer)
    backend.create_moments(accelerator, optimizer)
    state, writer = ShardedState(accelerator, model, optimizer), BackgroundWriter(accelerator)

    def step() -> None:
        with backend.micro_step(accelerator, model, is_last=True), accelerator.autocast():
            backend.backward(accelerator, model(inputs).float().sum())
        if not backend.optimizer_step(accelerator, optimizer, 1.0)[1]:
            sys.exit("A gradient was not finite: the step was left out, and its time says nothing.")

    def seconds(work: Callable[[], None]) -> float:
        """Of the slowest rank."""
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        work()
        accelerator.wait_for_everyone()
        return time.perf_counter() - started

    def standing(folder: Path) -> None:
        checkpoint.save_checkpoint(state, folder, 1, {})

    def behind(folder: Path) -> None:
        def copy() -> None:
            nonlocal writing
            begun = checkpoint.begin_checkpoint(state, folder, 1, {})
            writing = writer.start(functools.partial(begun.write, writer.copied(begun.tensors()), writer.gather))

        writing = None
        pauses.append(seconds(copy))
        ended = False
        while not ended:
            steps.append(seconds(step))
            ended = all(backend.gather_from_ranks(accelerator, writing.done()))
        writing.result()

    def deepspeeds(folder: Path) -> None:
        model.save_checkpoint(str(folder), tag="1", exclude_frozen_parameters=True)
        os.sync()

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text, flush=True)

    alone, steps, pauses = statistics.median([seconds(step) for _ in range(6)][1:]), [], []
    needed = len(KINDS) * sum(piece.own.stop - piece.own.start for piece in state.pieces())
    notes = []
    say(f"Memory for the copy is taken in {seconds(lambda: notes.append(writer.reserve(needed))):.2f} s.")
    if notes != [None]:
        sys.exit(*notes)
    ways = [standing, behind]
    if backend.is_deepspeed(accelerator) and not arguments.without_deepspeeds:
        ways.append(deepspeeds)
    took = {way: [] for way in ways}
    for number in range(arguments.times):
        for way, measured in took.items():
            folder = arguments.directory / f"{way.__name__}-{number}"
            measured.append(seconds(functools.partial(way, folder)))
            if accelerator.is_main_process:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
                stood = f", for which the run stood {pauses[-1]:.2f} s" if way is behind else ""
                say(f"{way.__name__}: {size:.3f} GB in {measured[-1]:.2f} s{stood}")
                shutil.rmtree(folder)
    own, pause = statistics.median(took[standing]), statistics.median(pauses)
    say(
        f"{backend.describe(accelerator)}: behind the steps a save stops the run for {pause / own:.3f} of the time "
        f"({pause:.2f} instead of {own:.2f} s), and each of {len(steps)} steps beside it takes "
        f"{statistics.median(steps) / alone:.2f} of its time alone ({alone:.3f} s; medians)."
    )
    if deepspeeds in took:
        say(f"Ours takes {own / statistics.median(took[deepspeeds]):.2f} of DeepSpeed's time.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
