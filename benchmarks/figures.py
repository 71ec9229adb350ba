"""Draws the figures of README and docs/: a record on its way to a loss, batches, what packing saves, memory.

    python benchmarks/figures.py benchmarks/figures

Tokens, freeze plans, sampler, dealing and memory estimate are the trainer's own. The record is one of the demo's;
lengths are drawn as `random_setup.py` draws them, from a mix like LLaVA-1.5's 665K. No GPU and no download are needed,
and the same code draws the same figures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_setup import CLIP_L_336, LANGUAGE_MODELS, VOCABULARY, draw_conversation  # noqa: E402
from mini_llava import demo  # noqa: E402
from mini_llava.arguments import ModelArguments  # noqa: E402
from mini_llava.data.sampler import GlobalBatchSampler, computed_tokens, deal  # noqa: E402
from mini_llava.data.templates import get_template  # noqa: E402
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize  # noqa: E402
from mini_llava.formats.tokenizers import load_tokenizer  # noqa: E402
from mini_llava.guards.longest import Shape  # noqa: E402
from mini_llava.model.llava import LlavaModel  # noqa: E402
from mini_llava.model.projector import build_projector  # noqa: E402
from mini_llava.model.trained import apply_plan, freeze_plan  # noqa: E402
from mini_llava.model.vision_tower import VisionTower  # noqa: E402
from mini_llava.tools.memory import GIB, Estimate, Layout, estimate  # noqa: E402
from mini_llava.training.backend import complete_zero  # noqa: E402

GLOBAL_BATCH, GPUS, IMAGE_TOKENS = 128, 8, 576
IMAGE, TEXT, PADDING = "#3b75af", "#e08a3c", "#d9d9d9"
TRAINED, FROZEN, INK = TEXT, "#e6e6e6", "#222222"
WORDS = "#a34f00"  # the colour of what is trained, dark enough for text on white
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


# --- one record ------------------------------------------------------------------------------------------------------

PICTURE, QUESTION, ANSWER = 27, "what color is the shape?", "blue"  # of easy-vqa's test split
PATCHES = 8  # a side: the demo's tower splits pictures of 64 pixels into patches of 8
STAGES = {
    "Stage 1: captions": freeze_plan(ModelArguments(tune_mm_mlp_adapter=True)),
    "Stage 2: conversations": freeze_plan(ModelArguments()),
    "Stage 2 with LoRA": freeze_plan(ModelArguments(), lora_r=128),
}


def tokens_of_the_record() -> list[tuple[str, bool, bool]]:
    """Each token of the record as (text, whether it is of the image, whether it is trained), in order."""
    tokenizer = load_tokenizer(demo.LANGUAGE_MODEL)
    record = demo.record("test-27", [(f"<image>\n{QUESTION}", ANSWER)], "test/27.png")
    sample = tokenize(record, get_template("v1"), tokenizer, PATCHES**2, 512)
    found = []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        is_image = token == IMAGE_TOKEN_INDEX
        text = "" if is_image else tokenizer.convert_ids_to_tokens(token)
        found.append((text, is_image, label != IGNORE_INDEX))
    return found


def cells_of_the_record() -> list[tuple[str, str]]:
    """The tokens as they are drawn, (text, colour): the system prompt is one cell, the image a few."""
    tokens = tokens_of_the_record()
    texts = [text for text, _, _ in tokens]
    cells = [("<s> A chat between \u2026 questions.", FROZEN)]
    images = 0
    for text, is_image, is_trained in tokens[texts.index("\u2581USER") :]:
        if is_image:
            images += 1
            if images <= 3 or images == PATCHES**2:
                cells.append((str(images), IMAGE))
            elif images == 4:
                cells.append(("\u2026", IMAGE))
            continue
        text = {"\u2581": "\u2423", "<0x0A>": "\u21b5"}.get(text, text.replace("\u2581", ""))
        cells.append((text, TRAINED if is_trained else FROZEN))
    return cells


def draw_record(file: Path) -> None:
    """One record from its picture to the losses of its trained tokens, and which parts each stage trains."""
    figure = Figure(figsize=(10, 4.45), dpi=110, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0.32, 4.77))  # in inches
    axis.axis("off")

    # The tokens come first: projector and losses stand above and below their own.
    cells, row, gap = cells_of_the_record(), (2.22, 0.38), 0.035
    widths = [_write(axis, 0, 0, text).get_window_extent(renderer).width / figure.dpi for text, _ in cells]
    for text in list(axis.texts):
        text.remove()
    spare = (9.6 - sum(widths) - gap * (len(cells) - 1)) / len(cells)
    places, start = [], 0.2
    for (text, colour), width in zip(cells, widths, strict=True):
        axis.add_patch(Rectangle((start, row[0]), width + spare, row[1], color=colour, linewidth=0))
        places.append(start + (width + spare) / 2)
        _write(axis, places[-1], row[0] + row[1] / 2, text, color="white" if colour == IMAGE else INK)
        start += width + spare + gap
    of_image = [place for place, (_, colour) in zip(places, cells, strict=True) if colour == IMAGE]
    of_answer = [number for number, (_, colour) in enumerate(cells) if colour == TRAINED]
    middle = (of_image[0] + of_image[-1]) / 2

    # The picture becomes image tokens.
    picture = axis.inset_axes((0.2, 3.3, 1.1, 1.1), transform=axis.transData)
    picture.imshow(imread(demo.image_paths("test")[PICTURE]), extent=(0, PATCHES, 0, PATCHES))
    picture.set_xticks(range(PATCHES + 1), [])
    picture.set_yticks(range(PATCHES + 1), [])
    picture.grid(color="white", linewidth=0.7)
    picture.tick_params(length=0)
    _write(axis, 0.75, 4.58, f"{PATCHES**2} patches")
    _box(axis, 1.68, 3.5, 0.95, 0.7, "vision\ntower")
    _box(axis, middle - 0.46, 3.5, 0.92, 0.7, "projector")
    _arrow(axis, (1.35, 3.85), (1.66, 3.85))
    _arrow(axis, (2.65, 3.85), (middle - 0.48, 3.85))
    _write(axis, (2.65 + middle - 0.5) / 2 - 0.02, 4.06, "features", fontsize=9.5)
    _arrow(axis, (middle, 3.48), (middle, row[0] + row[1] + 0.05), IMAGE)
    _write(axis, middle - 0.08, 2.98, f"{PATCHES**2} image tokens", ha="right", color=IMAGE, weight="bold")
    _write(axis, 0.2, 2.8, "text tokens", ha="left")
    _write(axis, 9.8, 2.8, "the answer: trained tokens", ha="right", color=WORDS, weight="bold")

    # The language model, and the losses: a token is predicted where the one before it stands.
    for place in places:
        _arrow(axis, (place, row[0] - 0.04), (place, 1.84))
    _box(axis, 0.2, 1.32, 9.6, 0.5, "language model")
    for number in of_answer:
        _arrow(axis, (places[number - 1], 1.3), (places[number - 1], 0.94), WORDS)
    axis.add_patch(Rectangle((6.55, 0.5), 3.25, 0.42, color=TRAINED, linewidth=0))
    losses = ", ".join(f"\u2212log p({cells[number][0]})" for number in of_answer)
    _write(axis, 8.175, 0.71, f"token losses: {losses}")
    _arrow(axis, (6.5, 0.71), (6.05, 0.71), WORDS)
    _write(axis, 6.0, 0.71, "loss = sum over the global batch \u00f7 number of its trained tokens", ha="right")

    # What each stage trains.
    columns = {"vision_tower": (6.7, 0.7), "projector": (7.45, 0.85), "language_model": (8.35, 1.45)}
    for part, (start, width) in columns.items():
        _write(axis, start + width / 2, 4.5, part.replace("_", "\n" if part == "vision_tower" else " "), weight="bold")
    for number, (stage, plan) in enumerate(STAGES.items()):
        low = 3.95 - 0.4 * number
        _write(axis, 6.6, low + 0.17, stage, ha="right")
        for part, (start, width) in columns.items():
            if plan[part].startswith("LoRA"):
                cells = [(start, 0.66, "frozen"), (start + 0.66, width - 0.66, "adapters")]
            else:
                cells = [(start, width, {"full": "trained"}.get(plan[part], plan[part]))]
            for left, wide, text in cells:
                colour = FROZEN if text == "frozen" else TRAINED
                axis.add_patch(Rectangle((left, low), wide, 0.34, color=colour, linewidth=0))
                _write(axis, left + wide / 2, low + 0.17, text, fontsize=9.5)
    figure.savefig(file)


def _write(axis: Axes, x: float, y: float, text: str, **style) -> Text:
    return axis.text(x, y, text, **{"fontsize": 10, "ha": "center", "va": "center", "color": INK, **style})


def _box(axis: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", facecolor="white", edgecolor=INK)
    axis.add_patch(shape)
    _write(axis, x + width / 2, y + height / 2, text, weight="bold")


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)


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
    "one_record.png": draw_record,
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
