"""Draws the figures of docs/: what the sampler's batches are, what packing saves, where the memory goes.

    python benchmarks/figures.py benchmarks/figures

Sampler, dealing and memory estimate are the trainer's own; lengths are drawn as `random_setup.py` draws them, from a
mix like LLaVA-1.5's 665K. No GPU and no data are needed, and the same code draws the same figures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_setup import CLIP_L_336, LANGUAGE_MODELS, VOCABULARY, draw_conversation  # noqa: E402
from mini_llava.arguments import ModelArguments  # noqa: E402
from mini_llava.data.sampler import GlobalBatchSampler, computed_tokens, deal  # noqa: E402
from mini_llava.guards.longest import Shape  # noqa: E402
from mini_llava.model.llava import LlavaModel  # noqa: E402
from mini_llava.model.projector import build_projector  # noqa: E402
from mini_llava.model.trained import apply_plan, freeze_plan  # noqa: E402
from mini_llava.model.vision_tower import VisionTower  # noqa: E402
from mini_llava.tools.memory import GIB, Estimate, Layout, estimate  # noqa: E402
from mini_llava.training.backend import complete_zero  # noqa: E402

GLOBAL_BATCH, GPUS, IMAGE_TOKENS = 128, 8, 576
IMAGE, TEXT, PADDING = "#3b75af", "#e08a3c", "#d9d9d9"
PARTS = ("#1f4e8c", "#6fa1d6", "#b8d0ea", "#d8b365", "#8c6d31", "#5aa469", "#c7e5cc")
LAYOUTS = {"in_order": "LLaVA's micro-batches", "padded": "--packing False", "packed": "--packing True"}
# About the longest micro-batch that `--max_tokens_per_micro_batch 14000` allows.
LONGEST = Shape(rows=1, columns=13_950, images=16, logits=2_500)
H200 = 139.8 * GIB


def conversations(count: int) -> tuple[list[int], list[bool]]:
    """Tokens, images included, of that many records, and which of them have an image."""
    random = np.random.default_rng(0)
    drawn = [draw_conversation(random) for _ in range(count)]
    return [tokens + IMAGE_TOKENS * has_image for has_image, tokens in drawn], [has_image for has_image, _ in drawn]


# --- the sampler's batches -------------------------------------------------------------------------------------------


def draw_batches(file: Path, batches: int = 8) -> None:
    """The samples of the first steps of an epoch in their order: drawn at random, and grouped as LLaVA does."""
    lengths, has_image = conversations(GLOBAL_BATCH * 100)
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    titles = {False: "Random order", True: "--group_by_modality_length True"}
    for axis, (grouped, title) in zip(figure.subplots(2, 1, sharex=True), titles.items(), strict=True):
        sampler = GlobalBatchSampler(lengths, has_image, GLOBAL_BATCH, GPUS, group_by_modality_length=grouped)
        epoch = sampler.global_batches(0)
        first = 0
        if grouped:  # from where a step of text begins, which are few
            first = next(step for step in range(1, len(epoch)) if not any(has_image[index] for index in epoch[step]))
            first = max(0, min(first - 3, len(epoch) - batches))
        shown = [index for batch in epoch[first : first + batches] for index in batch]
        colours = [IMAGE if has_image[index] else TEXT for index in shown]
        axis.bar(range(len(shown)), [lengths[index] for index in shown], width=1, color=colours)
        for step in range(1, batches):
            axis.axvline(step * GLOBAL_BATCH - 0.5, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel("tokens", fontsize=9)
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.set_xticks([(step + 0.5) * GLOBAL_BATCH for step in range(batches)])
        axis.set_xticklabels([f"step {first + step + 1}" for step in range(batches)])
        _plain(axis)
    for colour, name in ((IMAGE, "with an image"), (TEXT, "text only")):
        axis.bar(0, 0, color=colour, label=name)
    figure.legend(loc="upper right", ncols=2, fontsize=9, frameon=False)
    figure.savefig(file)


# --- padding and packing ---------------------------------------------------------------------------------------------


def real_shares(lengths: Sequence[int], has_image: Sequence[bool]) -> dict[str, float]:
    """Of all positions that an epoch computes in each layout, the share that are tokens of a sample."""
    sampler = GlobalBatchSampler(lengths, has_image, GLOBAL_BATCH, GPUS)
    real, computed = 0, dict.fromkeys(LAYOUTS, 0)
    for batch in sampler.global_batches(0):
        real += sum(lengths[index] for index in batch)
        for layout in LAYOUTS:
            [of_gpus] = deal(batch, lengths, GPUS, 1, layout)
            computed[layout] += sum(computed_tokens(samples, lengths, layout) for samples in of_gpus)
    return {layout: real / positions for layout, positions in computed.items()}


def draw_padding(file: Path) -> None:
    """One global batch on eight GPUs in each layout: a line is a row of a micro-batch, what is grey is padding."""
    lengths, has_image = conversations(GLOBAL_BATCH * 100)
    shares = real_shares(lengths, has_image)
    epoch = GlobalBatchSampler(lengths, has_image, GLOBAL_BATCH, GPUS).global_batches(0)
    batch = next(batch for batch in epoch if all(has_image[index] for index in batch))
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    for axis, (layout, name) in zip(figure.subplots(1, 3), LAYOUTS.items(), strict=True):
        [of_gpus] = deal(batch, lengths, GPUS, 1, layout)
        for gpu, samples in enumerate(of_gpus):
            tokens = [lengths[index] for index in samples]
            if layout == "packed":
                starts = np.cumsum([0, *tokens[:-1]])
                axis.barh([gpu] * len(tokens), tokens, left=starts, height=0.75, color=IMAGE, edgecolor="white")
                continue
            rows = gpu + (np.arange(len(tokens)) + 0.5) / len(tokens) * 0.86 - 0.43
            axis.barh(rows, max(tokens), height=0.86 / len(tokens), color=PADDING)
            axis.barh(rows, tokens, height=0.86 / len(tokens), color=IMAGE)
        axis.set_title(f"{name}: {shares[layout]:.1%} real", fontsize=10, loc="left")
        axis.set_xlabel("tokens of a row", fontsize=9)
        axis.set_yticks(range(GPUS))
        axis.set_yticklabels([f"GPU {gpu}" for gpu in range(GPUS)])
        axis.invert_yaxis()
        _plain(axis)
    figure.savefig(file)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_of_7b(gpus: int, recomputed: float) -> Estimate:
    """What stage 2 of LLaVA-1.5 7B needs on each of so many H200s under ZeRO-3, in bf16 with Liger's kernels."""
    zero = {"stage": 3}
    complete_zero(zero, H200)
    layout = Layout(gpus, H200, zero_stage=3, zero=zero)
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=VOCABULARY, **LANGUAGE_MODELS["7b"])
        tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(patch_size=14, **CLIP_L_336)))
        projector = build_projector("mlp2x_gelu", CLIP_L_336["hidden_size"], config.hidden_size)
        model = LlavaModel(tower, projector, LlamaForCausalLM(config)).to(layout.compute_dtype)
    apply_plan(model, freeze_plan(ModelArguments()))
    model.language_model.config._attn_implementation = "varlen"
    if recomputed:
        model.gradient_checkpointing_enable(recomputed)
    return estimate(model.train(), layout, LONGEST, several=True, fused=True)


def draw_memory(file: Path) -> None:
    """A bar of parts for each number of GPUs, with all activations kept and with all recomputed."""
    runs = {(gpus, recomputed): memory_of_7b(gpus, recomputed) for recomputed in (0.0, 1.0) for gpus in (2, 4, 8)}
    parts = list(dict.fromkeys(part for found in runs.values() for part in found.parts))
    parts = [part for part in parts if max(found.parts.get(part, 0.0) for found in runs.values()) >= GIB]
    colours = dict(zip(parts, PARTS, strict=False))
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    places = [0, 1, 2, 3.6, 4.6, 5.6]
    tops = np.zeros(len(runs))
    for part in parts:
        sizes = np.array([found.parts.get(part, 0.0) / GIB for found in runs.values()])
        axis.bar(places, sizes, bottom=tops, width=0.7, color=colours.get(part, "#999999"), label=part)
        tops += sizes
    rest = np.array([found.needed / GIB for found in runs.values()]) - tops
    axis.bar(places, rest, bottom=tops, width=0.7, color=PADDING, label="CUDA, NCCL and all else")
    for place, found in zip(places, runs.values(), strict=True):
        axis.text(place, found.needed / GIB + 1.5, f"{found.needed / GIB:.0f}", ha="center", fontsize=9)
    axis.axhline(H200 / GIB, color="black", linewidth=0.8, linestyle=":")
    axis.text(6.05, H200 / GIB + 1, "an H200 has", fontsize=8, ha="right")
    axis.set_xticks(places)
    axis.set_xticklabels([f"{gpus} GPUs" for gpus, _ in runs])
    for place, words in ((1, "nothing recomputed"), (4.6, "all layers recomputed")):
        axis.text(place, -0.13, words, transform=axis.get_xaxis_transform(), fontsize=9, ha="center")
    axis.set_ylabel("GiB on each GPU", fontsize=9)
    axis.set_title(f"Stage 2, 7B, ZeRO-3 on H200s, {LONGEST.tokens:,} tokens a micro-batch", fontsize=10, loc="left")
    _plain(axis)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(file)


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


FIGURES = {
    "sampler_batches.png": draw_batches,
    "padding_and_packing.png": draw_padding,
    "memory_by_part.png": draw_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the figures go")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(directory / name)
        print(directory / name)


if __name__ == "__main__":
    main()
