"""The exact length of each record, in tokens: all are tokenized once, in parallel, and the result is cached.

Replaces LLaVA's lengths, which count words.
"""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..data_file import DataFileError
from ..image_files import BadImage
from ..processes import map_ranges
from ..words import counted
from .records import write_arrays
from .samples import Samples
from .templates import BadRecord
from .tokenization import IGNORE_INDEX


@dataclass
class Lengths:
    """What is known about each record before training.

    Attributes:
        length: int32 [n], tokens after truncation, an image counting all its positions; 0 for a bad record.
        trained: int32 [n], trained tokens; 0 for a bad record.
        pictures: int32 [n], images, or all their tiles.
        bad: index -> one sentence, for the records that cannot be trained on.
    """

    length: np.ndarray
    trained: np.ndarray
    pictures: np.ndarray
    bad: dict[int, str]

    @property
    def has_image(self) -> np.ndarray:
        """bool [n]."""
        return self.pictures > 0


def measure(samples: Samples, num_workers: int, cache_folder: str | os.PathLike | None) -> Lengths:
    """Tokenize every record once and return its length, in `num_workers` forked processes.

    The result is kept in `cache_folder` under a digest of the records and of `samples.measurement_key()`. Processes
    of one machine that ask at the same time wait for the first; where nothing can be written, each computes for itself.
    Records that raise BadRecord, and those whose images are missing, are in `bad`; missing images are looked for
    again when the cache is read. Any other error stops the scan and names the record.
    """
    if cache_folder is None:
        return _scan(samples, num_workers).lengths(samples)
    file = _cache_file(samples, cache_folder)
    if scan := _Scan.read(file, len(samples)):
        return scan.lengths(samples)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a read-only folder, or a file system without locks
        warnings.warn(f"Lengths are not cached: {cache_folder} cannot be written ({error}).", stacklevel=2)
        return _scan(samples, num_workers).lengths(samples)
    try:
        scan = _Scan.read(file, len(samples))
        if scan is None:
            scan = _scan(samples, num_workers)
            try:
                scan.write(file)
            except OSError as error:
                warnings.warn(f"Lengths are not cached: {file} cannot be written ({error}).", stacklevel=2)
    finally:
        lock.release()
    return scan.lengths(samples)


def measure_some(samples: Samples, cache_folder: str | os.PathLike, most: int) -> tuple[Lengths, int]:
    """Return lengths estimated from `most` records, unless `measure` has cached them, and how many were measured.

    A record that was not measured gets the length of one that was; images are not looked for.
    """
    if scan := _Scan.read(_cache_file(samples, cache_folder), len(samples)):
        return scan.lengths(samples), len(samples)
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)
    length, trained, pictures = [], [], []
    for index in chosen.tolist():
        with contextlib.suppress(BadRecord, BadImage):
            sample = samples.tokenize(index)
            length.append(len(sample.input_ids))
            trained.append(np.count_nonzero(sample.labels != IGNORE_INDEX))
            pictures.append(samples.tiles(index, sample))
    if not length:
        raise BadRecord(
            f"None of {counted(len(chosen), 'record')} can be trained on; mini_llava.tools.doctor says why."
        )
    some = np.arange(len(samples)) % len(length)
    arrays = (np.asarray(values, np.int32) for values in (length, trained, pictures))
    return Lengths(*(array[some] for array in arrays), bad={}), len(length)


def _cache_file(samples: Samples, cache_folder: str | os.PathLike) -> Path:
    name = f"{samples.store.digest()} {samples.measurement_key()}"
    name += " with links followed" * samples.store.follow_links  # bad records are cached, too
    name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return Path(cache_folder) / f"lengths-{name}.npz"


_MEASURED = ("length", "trained", "pictures")


@dataclass
class _Scan:
    """The part of a measurement that depends on records and code alone, which is cached."""

    length: np.ndarray
    trained: np.ndarray
    pictures: np.ndarray
    faults: dict[int, str]
    missing: dict[int, list[str]]
    """Images that were not there; the next run looks for them again."""
    unopened: dict[int, str]
    """Records whose lengths are unknown, because the size of an image cannot be read; tried again too."""

    def lengths(self, samples: Samples) -> Lengths:
        bad = dict(self.faults)
        for index in self.unopened:
            again = _scan_part(samples, range(index, index + 1))
            for name in _MEASURED:
                getattr(self, name)[index] = getattr(again, name)[0]
            bad |= again.faults | again.unopened
        for index, names in self.missing.items():
            if sentence := samples.missing_image(index, names):
                bad[index] = sentence
        usable = np.ones(len(self.length), dtype=bool)
        usable[list(bad)] = False
        return Lengths(self.length * usable, self.trained * usable, self.pictures, dict(sorted(bad.items())))

    def write(self, file: Path) -> None:
        texts = json.dumps([list(found.items()) for found in (self.faults, self.missing, self.unopened)]).encode()
        measured = {name: getattr(self, name) for name in _MEASURED}
        write_arrays(file, **measured, texts=np.frombuffer(texts, dtype=np.uint8))

    @classmethod
    def read(cls, file: Path, count: int) -> "_Scan | None":
        """Return the cached scan, or None if there is none or the file is damaged."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                faults, missing, unopened = json.loads(arrays["texts"].tobytes())
                measured = (arrays[name] for name in _MEASURED)
                scan = cls(*measured, dict(faults), dict(missing), dict(unopened))
        except Exception:  # a damaged archive raises zipfile, zlib, KeyError, ValueError or OSError
            return None
        return scan if len(scan.length) == count else None


def _scan(samples: Samples, num_workers: int) -> _Scan:
    look_at = functools.partial(_scan_part, samples)
    parts = list(map_ranges(look_at, len(samples), num_workers, "measuring records", "--dataloader_num_workers"))
    return _Scan(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _MEASURED),
        faults={index: sentence for part in parts for index, sentence in part.faults.items()},
        missing={index: names for part in parts for index, names in part.missing.items()},
        unopened={index: sentence for part in parts for index, sentence in part.unopened.items()},
    )


def _scan_part(samples: Samples, part: range) -> _Scan:
    scan = _Scan(*(np.zeros(len(part), np.int32) for _ in _MEASURED), {}, {}, {})
    for place, index in enumerate(part):
        try:
            sample = samples.tokenize(index)
            scan.pictures[place] = samples.tiles(index, sample)
        except BadRecord as error:
            scan.faults[index] = str(error)
            continue
        except BadImage as error:
            scan.unopened[index], scan.pictures[place] = str(error), 1  # or more
            continue
        except DataFileError:
            raise
        except Exception as error:
            raise RuntimeError(f"{samples.describe(index)} could not be tokenized: {error!r}") from error
        scan.length[place] = len(sample.input_ids)
        scan.trained[place] = np.count_nonzero(sample.labels != IGNORE_INDEX)
        if samples.missing_image(index, sample.images):
            scan.missing[index] = sample.images
    return scan
