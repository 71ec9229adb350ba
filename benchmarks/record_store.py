"""What it costs to open a file of 665,000 records, about 1 GB, and to read it with eight workers.

    python benchmarks/record_store.py --directory /tmp/bench-store --lengths

The records have the lengths of `random_setup.py` and share its JPEG files; they are written once, in a minute or two.
Cold is the first open, which finds every record in the file and takes the digest of its content, warm every later one.
`--lengths` also times the pass that tokenizes every record once. Private memory is what Linux counts as such for each
worker (`smaps_rollup`) after it has prepared micro-batches, images included.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import random_setup  # noqa: E402
from data_loading import BATCH, IMAGE_TOKENS, MAX_LENGTH, PROCESSOR, SIZE, TEMPLATE, make_setup, table, where  # noqa: E402

from mini_llava.arguments import DataArguments  # noqa: E402
from mini_llava.data.images import ImageReader  # noqa: E402
from mini_llava.data.lengths import measure  # noqa: E402
from mini_llava.data.loader import RankSteps, rank_step_loader  # noqa: E402
from mini_llava.data.records import RecordStore  # noqa: E402
from mini_llava.data.samples import Samples  # noqa: E402
from mini_llava.formats.tokenizers import load_tokenizer  # noqa: E402


def write_records(file: Path, count: int, pictures: int) -> None:
    """A JSON array with the record lengths of LLaVA's mix; the texts are cut out of one long one."""
    random = np.random.default_rng(0)
    words = " ".join(f"w{number}" for number in random.integers(0, random_setup.VOCABULARY - 3, 1_000_000))

    def text(tokens: int) -> str:
        start = words.index(" ", int(random.integers(0, len(words) - 20_000))) + 1
        return words[start : words.index(" ", start + int(4.5 * tokens))]  # characters a token, as in English

    with open(file, "w") as target:
        for number in range(count):
            with_image = random.random() > 0.06
            tokens = random.lognormal(5.3, 0.6) if with_image else random.lognormal(6.6, 0.7)
            tokens = int(np.clip(tokens, 40, 1400 if with_image else 2048))
            rounds = max(1, tokens // 60)
            turns = [
                {"from": role, "value": text(tokens // (2 * rounds))}
                for _ in range(rounds)
                for role in ("human", "gpt")
            ]
            record = {"id": f"{number:012d}", "conversations": turns}
            if with_image:
                record["image"] = f"{number % pictures}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            target.write(("[" if number == 0 else ", ") + json.dumps(record))
        target.write("]")


def timed(function: Callable, *arguments: object) -> tuple[object, str]:
    began = time.perf_counter()
    result = function(*arguments)
    return result, f"{time.perf_counter() - began:.2f} s"


def memory(process: str | int) -> dict[str, float]:
    """Of a process, in MiB: resident, proportional and private."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"resident": sizes["Rss"], "proportional": sizes["Pss"], "private": private}


def memory_of_workers(steps: RankSteps, workers: int, batches_each: int) -> list[dict[str, float]]:
    """Each worker's memory once it has prepared so many micro-batches from all over the file."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(steps.samples), (workers * (batches_each + 2), BATCH), generator=generator).tolist()
    flags = DataArguments(dataloader_num_workers=workers)
    loader = iter(rank_step_loader(steps, [[batch] for batch in order], flags, pin_memory=False))
    for _ in range(workers * batches_each):
        next(loader)
    found = [memory(child.pid) for child in multiprocessing.active_children()]
    assert len(found) == workers
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--pictures", type=int, default=random_setup.PICTURES)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=20, help="micro-batches that each worker prepares")
    parser.add_argument("--lengths", action="store_true")
    arguments = parser.parse_args(words)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, for the memory's sake
    directory, cache = arguments.directory, arguments.directory / "cache"
    file = directory / "records.json"
    make_setup(directory, 1, arguments.pictures)
    if not file.exists():
        write_records(directory / "unfinished", arguments.records, arguments.pictures)
        os.replace(directory / "unfinished", file)
    shutil.rmtree(cache, ignore_errors=True)
    torch.set_num_threads(1)

    def opened() -> RecordStore:
        store = RecordStore([str(file)], [str(directory / "images")], cache_folder=cache)
        store.digest()
        return store

    rows = []
    store, seconds = timed(opened)
    rows.append(("open, cold: find the records, digest", seconds))
    store, seconds = timed(opened)
    rows.append(("open, warm", seconds))
    rows.append(("the store, pickled", f"{len(pickle.dumps(store)) / 2**20:.1f} MiB"))

    tokenizer = load_tokenizer(directory / "language_model")
    samples = Samples(store, TEMPLATE, tokenizer, MAX_LENGTH, ImageReader(IMAGE_TOKENS, PROCESSOR, "pad", SIZE))
    if arguments.lengths:
        processes = len(os.sched_getaffinity(0))
        length_pass = functools.partial(measure, samples, processes, cache)
        lengths, seconds = timed(length_pass)
        rows.append((f"length pass, {processes} processes, {int(lengths.length.sum()):,} tokens", seconds))
        rows.append(("length pass, again: from its cache", timed(length_pass)[1]))

    found = memory_of_workers(RankSteps(samples, packed=True), arguments.workers, arguments.batches)
    for kind in ("private", "proportional", "resident"):
        total, largest = sum(each[kind] for each in found), max(each[kind] for each in found)
        rows.append((f"{arguments.workers} workers, {kind} memory", f"{total:.0f} MiB, the largest {largest:.0f}"))
    print(table([f"{len(store):,} records, {file.stat().st_size / 1e9:.2f} GB", ""], rows))
    print(f"\nThe file was in the page cache. {where()}")


if __name__ == "__main__":
    main()
