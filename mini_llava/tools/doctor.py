"""Checks a whole dataset before it is trained on: `python -m mini_llava.tools.doctor --data_path data.json ...`.

LLaVA has nothing like it: there a bad image ends a run after hours, and a bad conversation trains on nothing. Every
fault comes from the functions that the trainer itself calls, so that the two never disagree. The records with faults
go to a file that `train.py --exclude` takes. Exit code: 0 if all records are good, 1 if some are bad, 2 if flags or
files cannot be read.
"""

import argparse
import functools
import hashlib
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import PRESETS, check_model_place, choices, read_config
from ..command_line import Parser, boolean
from ..data_file import check_data_files
from ..errors import UserError
from ..formats.layouts import MERGE_TYPES, tiles_in
from ..guards.early import refuse_at_once


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m mini_llava.tools.doctor", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE.yaml",
        help="a config file of train.py; it may also hold flags that are of no use here",
    )
    add("--stage", type=int, choices=(1, 2), help="use the preset of this stage for flags that are not given [2]")
    add("--data_path", nargs="+", metavar="PATH", help="JSON or JSON-lines files of records")
    add("--image_folder", nargs="+", metavar="PATH", help="image folder of each data file, in the same order")
    add("--follow_links", nargs="?", type=boolean, const=True, metavar="True|False", help="as for train.py")
    add("--exclude", nargs="+", metavar="PATH", help="lists of records to leave out, as in train.py")
    add("--leave_unread", nargs="+", metavar="NAME", help="keys and marks to ignore, as in train.py")
    add("--allow", nargs="+", metavar="CHECK", help="contradictions to accept, as in train.py")
    add("--resize_token_embeddings", action="store_true", default=None, help="train.py will add missing rows")
    add("--add_tokens", nargs="+", metavar="TOKEN", help="as for train.py")
    add(
        "--data_weights",
        nargs="+",
        type=_above_0,
        metavar="X",
        help="weights of the data files in the padding figures, as in train.py",
    )
    add("--model_name_or_path", metavar="TEXT", help="language model whose tokenizer is used")
    add(
        "--trust_remote_code",
        action="store_true",
        default=None,
        help="run Python code that the models' directories contain",
    )
    add("--version", metavar="TEXT", help="conversation template [stage 1: plain, stage 2: v1]")
    tower = parser.add_mutually_exclusive_group()
    tower.add_argument(
        "--vision_tower", metavar="TEXT", help="vision tower, which decides how many tokens an image takes"
    )
    tower.add_argument(
        "--tokens_per_image", type=_positive, metavar="N", help="give that number (576) instead of a tower"
    )
    add("--mm_vision_select_feature", metavar="TEXT", help="patch or cls_patch [patch]")
    add("--model_max_length", type=_positive, metavar="N", help="longest sequence in tokens [2048]")
    add("--image_size", type=_positive, metavar="N", help="side of the tower's images in pixels [as it was trained]")
    aspect_ratios = choices("image_aspect_ratio")
    add("--image_aspect_ratio", choices=aspect_ratios, help="[the model's anyres, or stage 1: square, stage 2: pad]")
    add("--mm_patch_merge_type", choices=MERGE_TYPES, help="with anyres [spatial_unpad]")
    add("--image_grid_pinpoints", metavar="TEXT", help="with anyres [the model's, or LLaVA-1.6's]")
    add("--global_batch_size", type=_positive, metavar="N", help="used in the padding figures [256, 128]")
    add("--per_device_train_batch_size", type=_positive, metavar="N", help="used in the padding figures [32, 16]")
    add(
        "--check_images",
        choices=("all", "exist"),
        default="all",
        help="open every image, or only check that it exists [all]",
    )
    add("--num_workers", type=_positive, default=os.cpu_count(), metavar="N", help="worker processes [one per core]")
    add("--plot", metavar="FILE.png", help="write a histogram of token counts")
    add(
        "--output",
        default="bad_records.jsonl",
        metavar="FILE",
        help="file for the list of bad records [bad_records.jsonl]",
    )
    given = parser.parse_args(command_line)
    try:
        from_file = read_config(given.config) if given.config else {}
        given.stage = given.stage or from_file.get("stage") or 2
        if given.stage != from_file.get("stage", given.stage):
            raise UserError(f"{given.config} is written for stage {from_file['stage']}, not --stage {given.stage}.")
    except ValueError as error:
        parser.error(str(error))
    for name, value in vars(given).items():
        if value is None and not (name == "vision_tower" and given.tokens_per_image):
            setattr(given, name, from_file.get(name))
    given.mm_vision_select_feature = given.mm_vision_select_feature or "patch"
    for name in ("data_path", "model_name_or_path"):
        if not getattr(given, name):
            parser.error(f"--{name} is missing: give it here or in --config.")
    if not (given.vision_tower or given.tokens_per_image):
        parser.error("--vision_tower is missing, or --tokens_per_image instead of it.")
    for name, value in vars(given).items():
        if value is None and name in PRESETS[given.stage]:
            setattr(given, name, PRESETS[given.stage][name])
    if given.data_weights and len(given.data_weights) != len(given.data_path):
        parser.error("--data_weights and --data_path are matched by position, so give one number for each file.")
    if not all(0 < weight < math.inf for weight in given.data_weights or []):
        parser.error("--data_weights are above 0; a file with none is left out.")
    if given.image_aspect_ratio != "anyres" and (given.mm_patch_merge_type or given.image_grid_pinpoints):
        parser.error("--mm_patch_merge_type and --image_grid_pinpoints do nothing without --image_aspect_ratio anyres.")
    if given.image_size and not given.vision_tower:
        parser.error("--image_size applies to the --vision_tower, which is not given.")
    if given.image_aspect_ratio == "anyres" and not given.vision_tower:
        parser.error("--image_aspect_ratio anyres needs --vision_tower: its tiles are of the tower's size.")
    return given


def _positive(text: str) -> int:
    if (value := int(text)) <= 0:
        raise ValueError
    return value


def _above_0(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def check_given(given: argparse.Namespace) -> None:
    """Raise UserError or OSError for a file or folder that is not there, or that `--output` would overwrite."""
    if os.path.exists(given.output) and any(os.path.samefile(given.output, path) for path in given.data_path):
        raise UserError(f"--output {given.output} would overwrite the data.")
    for name in ("model_name_or_path", "vision_tower"):
        check_model_place(f"--{name}", getattr(given, name))
    check_data_files(given.data_path, given.image_folder, given.exclude)


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_at_once("doctor", 2, check_given, parse_arguments())

import numpy as np
from PIL import Image

from ..data.images import ImageReader, pad_to_square
from ..data.records import RecordStore
from ..data.sampler import GlobalBatchSampler, computed_tokens, deal
from ..data.samples import Samples
from ..data.templates import BadRecord
from ..data.tokenization import IGNORE_INDEX, Sample
from ..formats.read import read_language_config
from ..formats.tokenizers import load_tokenizer
from ..formats.towers import load_vision_config, tower_image_size
from ..guards import preflight
from ..guards.records import RecordCheck
from ..guards.user_errors import USER_ERRORS
from ..hub import read_json
from ..image_files import MODES, SCALED, BadImage, image_path, load_image
from ..model.vision_tower import tokens_per_image
from ..options.chat_template import find_template
from ..options.image_tokens import missing_rows
from ..options.tiles import Tiling, choose_tiling
from ..options.token_rows import add_tokens
from ..processes import map_ranges
from ..watch.skipped import fault_table, log_skipped
from ..words import counted

LARGE_IMAGE = 20e6  # pixels; it takes half a second to open, which is more than the rest of its sample
LAYOUTS = {
    "in_order": "LLaVA's own micro-batches",
    "padded": "--packing False",
    "packed": "--packing True",
}


@dataclass
class Findings:
    """What is known about some records: of a part of the data first, of all of it in the end.

    length: int32 [n], tokens as trained, images included; 0 for a bad record.
    whole_length: int32 [n], the same before the cut to `--model_max_length`.
    content: uint64 [n], equal for records that train the same tokens on the same images.
    faults: index -> why the record cannot be trained on.
    warnings: (index, sentence) of what can be trained on, but was perhaps not meant so.
    images: index -> the names of the images that the trainer would open.
    """

    length: np.ndarray
    whole_length: np.ndarray
    has_image: np.ndarray
    content: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    images: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int) -> "Findings":
        return cls(*(np.zeros(count, kind) for kind in (np.int32, np.int32, bool, np.uint64)))

    @classmethod
    def join(cls, parts: list["Findings"]) -> "Findings":
        arrays = ("length", "whole_length", "has_image", "content")
        whole = cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in arrays))
        for part in parts:
            whole.faults |= part.faults
            whole.warnings += part.warnings
            whole.images |= part.images
        return whole


# --- records ---------------------------------------------------------------------------------------------------------


def examine_records(samples: Samples, part: range) -> Findings:
    """Read and tokenize some records as the trainer does, and look whether their images are there."""
    found = Findings.empty(len(part))
    for place, index in enumerate(part):
        try:
            sample = whole = samples.tokenize(index, max_length=sys.maxsize)
            if len(whole.input_ids) > samples.max_length:
                sample = samples.tokenize(index)
            if fault := samples.missing_image(index, sample.images):
                raise BadRecord(fault)
        except (BadRecord, BadImage) as error:
            found.faults[index] = str(error)
            continue
        found.length[place], found.whole_length[place] = len(sample.input_ids), len(whole.input_ids)
        found.has_image[place] = bool(sample.images)
        found.content[place] = _content(samples.store.image_folder(index), sample)
        found.images[index] = sample.images
        found.warnings += [
            (index, sentence) for sentence in _remarks(samples.store[index], sample, whole, samples.max_length)
        ]
    return found


def _content(folder: str | None, sample: Sample) -> int:
    text = repr((folder, sample.images)).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(sample.input_ids.tobytes() + text, digest_size=8).digest(), "little")


def _remarks(record: dict, sample: Sample, whole: Sample, max_length: int) -> list[str]:
    turns = record["conversations"]
    remarks = [f"turn {number} is empty." for number, turn in enumerate(turns, start=1) if not turn["value"].strip()]
    if next(turn["from"] for turn in turns if turn["from"] != "system") == "gpt":
        remarks.append("it begins with an answer, which is left out, as in LLaVA.")
    if turns[-1]["from"] == "human":
        remarks.append("its last question has no answer; it is read and not trained on.")
    if len(whole.input_ids) > len(sample.input_ids):
        trained, kept = (int(np.count_nonzero(s.labels != IGNORE_INDEX)) for s in (whole, sample))
        images = len(whole.images) - len(sample.images)
        remarks.append(
            f"it has {len(whole.input_ids)} tokens, more than --model_max_length {max_length}: {trained - kept} of "
            f"{trained} trained ones are cut off{', and ' + counted(images, 'image') if images else ''}."
        )
    return remarks


def find_duplicates(store: RecordStore, found: Findings) -> Iterable[tuple[int, str]]:
    """Yield a warning for each good record that trains the same tokens on the same images as an earlier one."""
    good = np.flatnonzero(found.length)
    _, first, inverse = np.unique(found.content[good], return_index=True, return_inverse=True)
    for index, earlier in zip(good.tolist(), good[first[inverse]].tolist(), strict=True):
        if index != earlier:
            yield index, f"it trains the same text and images as record {store.position(earlier)} of all."


# --- images ----------------------------------------------------------------------------------------------------------


def examine_images(images: list[tuple[str, str]], aspect_ratio: str, part: range) -> list[tuple[str | None, list[str]]]:
    """Examine some (folder, name): why the trainer could not use the image, or None, and warnings."""
    return [_examine_image(*images[number], aspect_ratio) for number in part]


def _examine_image(folder: str, name: str, aspect_ratio: str) -> tuple[str | None, list[str]]:
    try:
        image = load_image(folder, name)
        if aspect_ratio == "pad":
            pad_to_square(image, (0, 0, 0))
    except BadImage as error:
        return str(error), []
    warnings = []
    with Image.open(image_path(folder, name)) as file:
        kind = "JPEG" if file.format == "MPO" else file.format  # a JPEG with a second picture in it
        deep = MODES.get(file.mode) == SCALED
    named = Image.registered_extensions().get(Path(name).suffix.lower())
    if named not in (None, kind):
        warnings.append(f"the image {name!r} holds {kind}, not {named}; it is read all the same.")
    if image.width * image.height > LARGE_IMAGE:
        warnings.append(f"the image {name!r} has {image.width}x{image.height} pixels, which takes long to open.")
    if deep and max(high for _, high in image.getextrema()) < 64:  # 10 or 12 bits of a camera, stored as 16
        warnings.append(f"the image {name!r} has 16 bits, of which it uses the lowest: the model sees it nearly black.")
    return None, warnings


def open_images(store: RecordStore, found: Findings, aspect_ratio: str, num_workers: int) -> None:
    """Open every image once, however many records have it, and enter what comes out into the findings."""
    wanted = {(store.image_folder(index), name): None for index, names in found.images.items() for name in names}
    images = list(wanted)
    results = map_ranges(functools.partial(examine_images, images, aspect_ratio), len(images), num_workers, "images")
    for number, result in enumerate(result for part in results for result in part):
        wanted[images[number]] = result
    for index, names in found.images.items():
        of_record = [wanted[store.image_folder(index), name] for name in names]
        found.warnings += [(index, sentence) for _, sentences in of_record for sentence in sentences]
        if faults := [fault for fault, _ in of_record if fault]:
            found.faults[index] = faults[0]
            found.length[index] = 0


# --- what the batches will be ----------------------------------------------------------------------------------------


def batch_figures(sampler: GlobalBatchSampler) -> list[str]:
    """Return a table of what one epoch computes in each layout.

    Each micro-batch of a global batch goes to a device of its own, of which the sampler has `slots`, and which waits
    for the one with most positions.
    """
    lengths, devices = sampler.lengths, sampler.slots
    real = sum(lengths[index] for batch in sampler.global_batches(0) for index in batch)
    rows = [f"{'':27}{'positions':>15}  {'padding':>8}  {'largest micro-batch':>20}  {'waiting':>8}"]
    for layout, name in LAYOUTS.items():
        computed = longest = largest = 0
        for batch in sampler.global_batches(0):
            [of_devices] = deal(batch, lengths, devices, 1, layout)
            positions = [computed_tokens(samples, lengths, layout) for samples in of_devices]
            computed, longest = computed + sum(positions), longest + devices * max(positions)
            largest = max(largest, *positions)
        padding, waiting = 1 - real / computed, 1 - computed / longest
        rows.append(f"{name:27}{computed:>15,}  {padding:>8.1%}  {largest:>20,}  {waiting:>8.1%}")
    return rows


# --- what a person sees ----------------------------------------------------------------------------------------------


def with_title(store: RecordStore, sentences: list[tuple[int, str]], title: str) -> str:
    """Return the table of `fault_table` below a line that says how many records are in it."""
    records = len({index for index, _ in sentences})
    return "\n".join([f"{title}: {records:,} of {counted(len(store), 'record')}", *fault_table(store, sentences)])


def histogram(lengths: np.ndarray, max_length: int, bins: int = 20) -> list[tuple[str, int]]:
    """Return (range of tokens, records) in equal steps up to the longest or to `max_length`, then what is longer."""
    width = max(1, math.ceil(min(int(lengths.max()), max_length) / bins))
    edges = [*range(0, min(int(lengths.max()), max_length), width)]
    rows = []
    for low in edges:
        high = min(low + width, max_length)
        rows.append((f"{low + 1}-{high}", int(((lengths > low) & (lengths <= high)).sum())))
    return [*rows, (f"> {max_length}", int((lengths > max_length).sum()))]


def histogram_lines(rows: list[tuple[str, int]], width: int = 50) -> list[str]:
    most = max(count for _, count in rows)
    return [f"{label:>13} {count:>9,} {'█' * math.ceil(width * count / most)}" for label, count in rows]


def draw_histogram(rows: list[tuple[str, int]], title: str, file: Path) -> None:
    """Draw the rows of `histogram` as a PNG."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(0.45 * len(rows) + 1.5, 5), layout="constrained")
    axis = figure.subplots()
    colours = ["#c0504d" if label.startswith(">") else "#4f81bd" for label, _ in rows]
    axis.bar([label for label, _ in rows], [count for _, count in rows], color=colours)
    axis.set_title(title)
    axis.set_xlabel("tokens, images included")
    axis.tick_params(axis="x", labelrotation=90)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(axis="y", color="#dddddd")
    axis.set_axisbelow(True)
    figure.savefig(file, format="png")


# --- the program -----------------------------------------------------------------------------------------------------


def _tokens_of_tower(given: argparse.Namespace) -> tuple[int, Tiling | None]:
    """Return how many tokens an image takes, and for images in tiles the tiling."""
    config = load_vision_config(given.vision_tower, given.trust_remote_code)
    image_size = given.image_size or tower_image_size(given.vision_tower, config)
    tokens = tokens_per_image(config, given.mm_vision_select_feature, image_size)
    # What a LLaVA model fixes in a run that starts from it.
    of_model = read_json(given.model_name_or_path, "config.json")
    merge_type, pinpoints, max_tiles = tiles_in(given.model_name_or_path, of_model)
    if not merge_type and given.image_aspect_ratio != "anyres":
        return tokens, None
    merge_type, pinpoints = merge_type or given.mm_patch_merge_type, given.image_grid_pinpoints or pinpoints
    return tokens, choose_tiling(image_size, tokens, merge_type, pinpoints, max_tiles)


def examine(given: argparse.Namespace) -> int:
    """Check, print, write the list of bad records, and return how many faults there are."""
    check_given(given)
    image_tokens, tiling = (given.tokens_per_image, None) if given.tokens_per_image else _tokens_of_tower(given)
    tokenizer = load_tokenizer(given.model_name_or_path, given.trust_remote_code)
    known_tokens = len(tokenizer)
    add_tokens(tokenizer, given.add_tokens)
    template = find_template(given.version, tokenizer)
    findings = list(preflight.check_template(template, tokenizer))
    language_config = read_language_config(given.model_name_or_path, given.trust_remote_code)
    if language_config is not None:
        rows = language_config.get_text_config().vocab_size
        missing = missing_rows(tokenizer, language_config) if given.resize_token_embeddings else 0
        new_tokens = max(len(tokenizer) - known_tokens, missing)
        findings += preflight.check_token_rows(tokenizer, rows, new_tokens)
    store = RecordStore(given.data_path, given.image_folder, given.exclude, follow_links=given.follow_links)
    image_reader, check = ImageReader(image_tokens, tiling=tiling), RecordCheck(given.leave_unread or [])
    samples = Samples(store, template, tokenizer, given.model_max_length, image_reader, check)
    print(f"{counted(len(store), 'record')}, measured with the template {template.name} (--version).\n")
    examine_part = functools.partial(examine_records, samples)
    found = Findings.join(list(map_ranges(examine_part, len(store), given.num_workers, "records")))
    if given.check_images == "all":
        open_images(store, found, given.image_aspect_ratio, given.num_workers)
    found.warnings += find_duplicates(store, found)
    warnings = [(index, sentence) for index, sentence in found.warnings if index not in found.faults]

    if found.faults:
        print(with_title(store, sorted(found.faults.items()), "Cannot be trained on"), end="\n\n")
    if warnings:
        print(with_title(store, warnings, "To look at"), end="\n\n")
    good = np.flatnonzero(found.length)
    if len(good):
        lengths, whole = found.length[good], found.whole_length[good]
        rows = histogram(whole, given.model_max_length)
        title = f"Tokens of {counted(len(good), 'good record')}: mean {whole.mean():,.0f}, longest {whole.max():,}"
        print(title, *histogram_lines(rows), sep="\n", end="\n\n")
        if given.plot:
            draw_histogram(rows, title, Path(given.plot))
        grouped = PRESETS[given.stage].get("group_by_modality_length", False)
        size, micro_batch = given.global_batch_size, given.per_device_train_batch_size
        of_files = np.bincount([store.source(index) for index in good.tolist()], minlength=len(given.data_path))
        sampler = GlobalBatchSampler(
            lengths.tolist(),
            found.has_image[good].tolist(),
            size,
            slots=-(-size // micro_batch),
            group_by_modality_length=grouped,
            source_sizes=of_files.tolist(),
            weights=given.data_weights,
        )
        print(f"An epoch of global batches of {size}, {counted(micro_batch, 'sample')} a device:")
        print(*batch_figures(sampler), sep="\n", end="\n\n")

    if language_config is not None:
        longest = int(found.length.max(initial=0))
        findings += preflight.check_positions(longest, language_config)
    refused = preflight.refusals(findings, given.allow or [])
    print(*(finding.line() for finding in findings), sep="\n", end="\n\n")

    output = Path(given.output)
    if output.exists():
        output.write_bytes(b"")  # what an earlier check has listed
    log_skipped(store, sorted(found.faults.items()), output)
    if found.faults:
        listed = "1 bad record is" if len(found.faults) == 1 else f"{len(found.faults):,} bad records are"
        print(f"{listed} listed in {output}: train.py --exclude {output} leaves out what it lists.")
    else:
        print("The 1 record can" if len(store) == 1 else f"All {len(store):,} records can", "be trained on.")
    if refused:
        print("train.py would refuse to start:", *refused, sep="\n")
    return len(found.faults) + len(refused)


def main(command_line: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    given = parse_arguments(command_line)
    try:
        return 1 if examine(given) else 0
    except USER_ERRORS as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
