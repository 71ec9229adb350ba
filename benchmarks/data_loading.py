"""How many samples a second become micro-batches on the CPU, against a straightforward implementation in the same run.

    python benchmarks/data_loading.py --directory /tmp/bench-data

Records and JPEG files (640x480) are those of `random_setup.py`, made if they are not there, for a tower of 336 pixels.
The straightforward one is what LLaVA's code comes to: a list of dicts, one image at a time through transformers' image
processor to floats, each text tokenized as a whole and again round by round for the labels. It runs one sample after
the other, and with our workers: the same torch `DataLoader`, processes and batches. All take turns; ids, labels and
pixels are compared before anything is timed.
`--alternatives` also times other decoders and resizers than Pillow's, as far as they are installed.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, CLIPImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import random_setup  # noqa: E402

from mini_llava.arguments import DataArguments  # noqa: E402
from mini_llava.data.collator import collate  # noqa: E402
from mini_llava.data.images import ImageReader, normalisation_table, normalise, pixel_values  # noqa: E402
from mini_llava.data.loader import RankSteps, rank_step_loader  # noqa: E402
from mini_llava.data.records import RecordStore  # noqa: E402
from mini_llava.data.samples import Samples  # noqa: E402
from mini_llava.data.templates import get_template  # noqa: E402
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX  # noqa: E402
from mini_llava.formats.tokenizers import load_tokenizer  # noqa: E402
from mini_llava.image_files import load_image  # noqa: E402
from mini_llava.training.backend import versions  # noqa: E402

SIZE, IMAGE_TOKENS, MAX_LENGTH, BATCH = 336, 576, 2048, 16
TEMPLATE = get_template("v1")
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)


def make_setup(directory: Path, records: int, pictures: int) -> None:
    """Records, images and a tokenizer, unless they are there."""
    if not (directory / "language_model").exists():
        directory.mkdir(parents=True, exist_ok=True)
        random_setup.make_records(directory, records, pictures)
        random_setup.make_models(directory, "tiny")  # of these only the tokenizer is used


class Straightforward(Dataset):
    """Records to tensors the way that comes to mind first."""

    def __init__(self, directory: Path):
        self.records = json.loads((directory / "stage2.json").read_text())
        self.images = directory / "images"
        self.tokenizer = AutoTokenizer.from_pretrained(directory / "language_model")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        pixels = self.pixels(self.image(record["image"])) if "image" in record else torch.zeros(3, SIZE, SIZE)
        ids, labels = self.text(record)
        return {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH], "pixel_values": pixels}

    def image(self, name: str) -> Image.Image:
        return Image.open(self.images / name).convert("RGB")

    def pixels(self, image: Image.Image) -> torch.Tensor:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in PROCESSOR.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return PROCESSOR(images=square, return_tensors="pt")["pixel_values"][0]

    def text(self, record: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids with one placeholder for the image, and labels from the lengths of the rounds and of their questions."""
        turns = [turn["value"] for turn in record["conversations"]]
        whole = "".join(piece for piece, _ in TEMPLATE.render(turns[0::2], turns[1::2]))
        ids = torch.tensor(self.ids(whole))
        labels, position = ids.clone(), 0
        for a_round in whole.split(TEMPLATE.answer_end)[:-1]:
            question = a_round.split(TEMPLATE.answer_start)[0] + TEMPLATE.answer_start
            labels[position : position + len(self.ids(question))] = IGNORE_INDEX
            position += len(self.ids(a_round + TEMPLATE.answer_end))
        assert position == len(ids)
        return ids, labels

    def ids(self, text: str) -> list[int]:
        first, *others = [self.tokenizer(chunk).input_ids for chunk in text.split("<image>")]
        return first + [token for chunk in others for token in [IMAGE_TOKEN_INDEX, *chunk]]

    @staticmethod
    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
        labels = pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX)
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        return {"input_ids": ids, "labels": labels, "attention_mask": ids != 0, "pixel_values": pixels}

    def batches(self, order: list[list[int]], workers: int) -> Iterable:
        return DataLoader(self, batch_sampler=order, num_workers=workers, collate_fn=self.collate)


class Ours:
    """The store, the functions and the loader that `train.py` uses."""

    def __init__(self, directory: Path):
        store = RecordStore([str(directory / "stage2.json")], [str(directory / "images")])
        textual = (TEMPLATE, load_tokenizer(directory / "language_model"), MAX_LENGTH)
        self.samples = Samples(store, *textual, ImageReader(IMAGE_TOKENS, PROCESSOR, "pad", SIZE))
        self.steps = RankSteps(self.samples, packed=True)

    def batches(self, order: list[list[int]], workers: int) -> Iterable:
        flags = DataArguments(dataloader_num_workers=workers)
        return rank_step_loader(self.steps, [[batch] for batch in order], flags, pin_memory=False)


def check_that_both_give_the_same(straightforward: Straightforward, ours: Ours, indices: Iterable[int]) -> None:
    table = normalisation_table(PROCESSOR)
    for index in indices:
        theirs = straightforward[index]
        sample = ours.samples[index]
        keep = np.ones(len(sample.input_ids), bool)
        is_image = np.flatnonzero(sample.input_ids == IMAGE_TOKEN_INDEX)
        keep[is_image[1:]] = False  # of the positions of an image they have one
        length = int(keep.sum())
        assert sample.input_ids[keep].tolist() == theirs["input_ids"][:length].tolist(), index
        assert sample.labels[keep].tolist() == theirs["labels"][:length].tolist(), index
        for picture in sample.pictures:
            assert normalise(picture.pixels[0], table).equal(theirs["pixel_values"]), index


def measure_loader(batches: Iterable, samples: int, images: int) -> dict[str, float]:
    """Of one pass, starting the workers included: samples and images a second, CPU time of all processes."""

    def cpu_seconds() -> float:  # the workers' counts once they have ended
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in usage)

    began, cpu = time.perf_counter(), cpu_seconds()
    for batch in batches:
        del batch  # frees its shared memory
    seconds = time.perf_counter() - began
    return {"samples": samples / seconds, "images": images / seconds, "cpu": (cpu_seconds() - cpu) / samples * 1e3}


def parts_of_a_sample(straightforward: Straightforward, ours: Ours, indices: list[int]) -> list[tuple[str, str, str]]:
    """CPU milliseconds of the steps of one sample in this process, medians over samples with an image."""
    folder, store = str(straightforward.images), ours.samples.store
    names = {index: store[index]["image"] for index in indices}
    samples = {index: ours.samples[index] for index in indices}
    opened = {index: load_image(folder, name) for index, name in names.items()}
    floats = {index: straightforward[index] for index in indices}

    def timed(function: Callable[[int], object]) -> str:
        return f"{median_milliseconds([functools.partial(function, index) for index in indices]):.2f}"

    return [
        ("read the record", "0", timed(lambda i: store[i])),
        (
            "tokenize",
            timed(lambda i: straightforward.text(straightforward.records[i])),
            timed(lambda i: ours.samples.tokenize(i)),
        ),
        (
            "read and decode",
            timed(lambda i: straightforward.image(names[i])),
            timed(lambda i: load_image(folder, names[i])),
        ),
        (
            "pad, resize, crop (and normalise)",
            timed(lambda i: straightforward.pixels(opened[i])),
            timed(lambda i: pixel_values(opened[i], PROCESSOR, "pad")),
        ),
        (
            "collate",
            timed(lambda i: straightforward.collate([floats[i]])),
            timed(lambda i: collate([samples[i]], SIZE, True)),
        ),
    ]


def median_milliseconds(calls: list[Callable[[], object]]) -> float:
    def one(call: Callable[[], object]) -> float:
        began = time.process_time()  # which other programs on the machine do not change
        call()
        return (time.process_time() - began) * 1e3

    calls[0]()
    return statistics.median([one(call) for call in calls])


def alternatives(files: list[Path]) -> list[tuple[str, str, str]]:
    """(what, CPU milliseconds, which values differ from Pillow's): other decoders, and resizers of a square."""

    def pillow(file: Path) -> Image.Image:
        return Image.open(file).convert("RGB")

    def row(name: str, function: Callable, inputs: list, expected: list[np.ndarray]) -> tuple[str, str, str]:
        differences = [np.abs(np.asarray(function(x)).astype(int) - y) for x, y in zip(inputs, expected, strict=True)]
        share, largest = np.mean([d > 0 for d in differences]), max(d.max() for d in differences)
        milliseconds = median_milliseconds([functools.partial(function, x) for x in inputs])
        return name, f"{milliseconds:.2f}", f"{share:.2%}, by up to {largest}" if largest else "none"

    decoded = [pillow(file) for file in files]
    expected = [np.asarray(image) for image in decoded]
    squares = [Image.fromarray(np.pad(image, ((80, 80), (0, 0), (0, 0)))) for image in expected]
    resized = [np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for square in squares]
    arrays = [np.array(square) for square in squares]
    resize = functools.partial(Image.Image.resize, size=(SIZE, SIZE), resample=Image.Resampling.BICUBIC)
    rows = [row("decode: Pillow", pillow, files, expected), row("resize: Pillow", resize, squares, resized)]

    def by_torch(array: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(array).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(image, (SIZE, SIZE), mode="bicubic", antialias=True)[0].permute(1, 2, 0)

    rows.append(row("resize: torch, uint8, antialias", by_torch, arrays, resized))
    try:
        import simplejpeg

        def by_simplejpeg(file: Path) -> np.ndarray:
            return simplejpeg.decode_jpeg(file.read_bytes(), "RGB")

        rows.append(row(f"decode: simplejpeg {simplejpeg.__version__}", by_simplejpeg, files, expected))
    except ImportError:
        print("simplejpeg is not installed.")
    try:
        import cv2

        cv2.setNumThreads(1)

        def by_opencv(file: Path) -> np.ndarray:
            return cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)

        rows.append(row(f"decode: OpenCV {cv2.__version__}", by_opencv, files, expected))
        for name, kind in (("cubic", cv2.INTER_CUBIC), ("area", cv2.INTER_AREA)):
            by_kind = functools.partial(cv2.resize, dsize=(SIZE, SIZE), interpolation=kind)
            rows.append(row(f"resize: OpenCV, {name}", by_kind, arrays, resized))
    except ImportError:
        print("opencv-python-headless is not installed.")
    try:
        import pyvips

        version = importlib.metadata.version("pyvips-binary")
        pictures = [pyvips.Image.new_from_array(array) for array in arrays]

        def by_vips(file: Path) -> np.ndarray:
            return pyvips.Image.new_from_file(str(file), access="sequential").numpy()

        def resized_by_vips(picture: "pyvips.Image") -> np.ndarray:
            return picture.resize(SIZE / 640, kernel="cubic").numpy()

        rows.append(row(f"decode: libvips {version}", by_vips, files, expected))
        rows.append(row("resize: libvips, cubic", resized_by_vips, pictures, resized))
    except ImportError:
        print("pyvips is not installed.")
    return rows


def where() -> str:
    """Machine, commit and versions, for below a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{os.cpu_count()} x {model}; commit {commit}; Python {platform.python_version()}, {found}"


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where records and images are, or are made")
    parser.add_argument("--records", type=int, default=1280)
    parser.add_argument("--pictures", type=int, default=random_setup.PICTURES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alternatives", action="store_true")
    arguments = parser.parse_args(words)
    directory = arguments.directory
    make_setup(directory, arguments.records, arguments.pictures)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    straightforward, ours = Straightforward(directory), Ours(directory)
    samples = len(straightforward)
    with_image = [index for index, record in enumerate(straightforward.records) if "image" in record]
    check_that_both_give_the_same(straightforward, ours, range(min(64, samples)))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).split(BATCH)
    order = [batch.tolist() for batch in order]
    workers = f"{arguments.workers} workers"
    loaders = {
        "straightforward, one sample at a time": (straightforward, 0),
        f"straightforward, {workers}": (straightforward, arguments.workers),
        f"ours, {workers}": (ours, arguments.workers),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):
        for name, (loader, processes) in loaders.items():
            found[name].append(measure_loader(loader.batches(order, processes), samples, len(with_image)))

    keys = ("samples", "images", "cpu")
    medians = {name: {key: statistics.median(r[key] for r in rounds) for key in keys} for name, rounds in found.items()}
    rows = [(name, *(f"{medians[name][key]:.1f}" for key in keys)) for name in loaders]
    one_at_a_time, with_workers, of_ours = medians.values()
    for name, other in (("one sample at a time", one_at_a_time), (workers, with_workers)):
        rows.append((f"ratio to that, {name}", *(f"{of_ours[key] / other[key]:.2f}" for key in keys)))
    print(table([f"{samples} records", "samples/s", "images/s", "CPU ms a sample"], rows), end="\n\n")
    parts = parts_of_a_sample(straightforward, ours, with_image[:100])
    print(table(["CPU ms, in one process", "straightforward", "ours"], parts), end="\n\n")
    if arguments.alternatives:
        files = [directory / "images" / f"{number}.jpg" for number in range(min(100, arguments.pictures))]
        print(table(["640x480", "CPU ms", "values other than Pillow's"], alternatives(files)), end="\n\n")
    print(f"Medians of {arguments.rounds} rounds in turns. {where()}")


if __name__ == "__main__":
    main()
