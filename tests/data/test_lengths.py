"""Lengths are exact, cached, and never stale."""

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mini_llava.data.images import ImageReader
from mini_llava.data.lengths import measure
from mini_llava.data.records import RecordStore
from mini_llava.data.samples import Samples
from mini_llava.data.templates import BadRecord, get_template
from mini_llava.data.tokenization import Sample, tokenize
from mini_llava.data_file import DataFileError
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.guards.records import RecordCheck
from mini_llava.options.tiles import choose_tiling

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


class Words(Samples):
    """Stands for a tokenizer: a token for each word, ten for an image; every call leaves a line in a file."""

    def __init__(self, store, log, key="key"):
        super().__init__(store, None, None, 100, ImageReader(10))
        self.log, self.key = log, key

    def measurement_key(self):
        return self.key

    def tokenize(self, index, max_length=None):
        record = self.store[index]
        with open(self.log, "a") as file:
            file.write("x\n")
        if "crash" in record:
            raise KeyError(record["crash"])
        if not record.get("text"):
            raise BadRecord("it has no text.")
        images = [record["image"]] if "image" in record else []
        length = len(record["text"].split()) + 10 * len(images)
        labels = np.full(length, -100, np.int32)
        labels[-1] = 1
        return Sample(np.zeros(length, np.int32), labels, images)

    def calls(self):
        return Path(self.log).read_text().count("x") if os.path.exists(self.log) else 0


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "here.png").touch()
    values = [{"text": "a " * (1 + index % 7)} for index in range(1200)]
    values[3]["image"] = "here.png"
    values[5] = {"text": ""}
    values[700]["image"] = "gone.png"
    path = write(tmp_path / "a.json", values)
    return Words(RecordStore([path], [str(tmp_path / "images")]), tmp_path / "calls"), tmp_path / "cache"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_lengths_are_those_of_the_samples(num_workers, data):
    words, cache = data
    lengths = measure(words, num_workers, cache)
    expected = np.array([1 + index % 7 for index in range(1200)])
    expected[3] += 10
    expected[[5, 700]] = 0
    assert lengths.length.tolist() == expected.tolist()
    assert lengths.length.dtype == lengths.trained.dtype == np.int32
    assert lengths.trained.tolist() == (expected > 0).astype(int).tolist()
    assert np.flatnonzero(lengths.has_image).tolist() == [3, 700]
    assert lengths.bad[5] == "it has no text."
    assert "'gone.png' is not in the image folder" in lengths.bad[700]
    assert list(lengths.bad) == [5, 700]


def test_the_second_run_reads_the_cache(data):
    words, cache = data
    first = measure(words, 2, cache)
    second = measure(words, 2, cache)
    assert words.calls() == 1200
    assert all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("length", "trained", "pictures")
    )
    assert first.bad == second.bad


def test_another_key_or_changed_data_is_measured_again(data):
    words, cache = data
    measure(words, 1, cache)
    measure(Words(words.store, words.log, "another key"), 1, cache)
    assert words.calls() == 2400
    path = Path(words.store.data_path[0])
    stamp = path.stat()
    path.write_text(path.read_text().replace("a a a a", "b a a a", 1))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and date
    measure(Words(RecordStore([str(path)]), words.log), 1, cache)
    assert words.calls() == 3600


def test_an_image_put_in_place_later_is_found_without_measuring_again(data):
    words, cache = data
    assert 700 in measure(words, 1, cache).bad
    Path(words.store.image_folder(0), "gone.png").touch()
    lengths = measure(words, 1, cache)
    assert 700 not in lengths.bad and lengths.length[700] == 11
    assert words.calls() == 1200


def test_images_without_a_folder_are_bad_records(data):
    words, cache = data
    without = Words(RecordStore(words.store.data_path), words.log)
    assert "no --image_folder is given" in measure(without, 1, cache).bad[3]


def test_a_damaged_cache_is_measured_again(data):
    words, cache = data
    expected = measure(words, 1, cache)
    (file,) = cache.glob("*.npz")
    content = file.read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:200] + b"\0" * 50 + content[250:]):
        file.write_bytes(damage)
        assert measure(words, 1, cache).length.tolist() == expected.length.tolist()
    assert words.calls() == 4 * 1200


@pytest.mark.parametrize("cache_folder", [None, "in/a/file"])
def test_where_nothing_can_be_written_lengths_are_computed_all_the_same(cache_folder, data, tmp_path):
    words, cache = data
    expected = measure(words, 1, cache).length.tolist()
    if cache_folder is None:
        assert measure(words, 1, None).length.tolist() == expected
    else:
        (tmp_path / "in").touch()
        with pytest.warns(UserWarning, match="Lengths are not cached"):
            assert measure(words, 1, tmp_path / cache_folder).length.tolist() == expected


class SlowWords(Words):
    def tokenize(self, index, max_length=None):
        time.sleep(0.0005)
        return super().tokenize(index)


def test_ranks_of_one_machine_measure_once(data):
    words, cache = data
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=measure, args=(SlowWords(words.store, words.log), 1, cache)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert words.calls() == 1200


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unexpected_error_names_the_record_and_stops(num_workers, tmp_path):
    values = [{"id": f"n{index}", "text": "a"} for index in range(600)]
    values[550]["crash"] = "inside"
    store = RecordStore([write(tmp_path / "a.json", values)])
    with pytest.raises(RuntimeError, match=r"a\.json, record 550 \(id n550\) could not be tokenized: KeyError"):
        measure(Words(store, tmp_path / "calls"), num_workers, tmp_path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_touched_file_is_measured_and_one_cut_short_is_not(num_workers, tmp_path):
    path = Path(write(tmp_path / "a.json", [{"text": "a"}] * 20))
    words, size = Words(RecordStore([str(path)]), tmp_path / "calls"), path.stat().st_size
    path.touch()
    assert measure(words, num_workers, None).length.tolist() == [1] * 20
    os.truncate(path, 30)
    with pytest.raises(DataFileError, match=f"it had {size} bytes and has 30"):
        measure(words, num_workers, None)


def test_the_key_follows_everything_that_decides_a_length():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_llama")
    other = load_tokenizer(FIXTURES / "tokenizer_qwen")
    v1, plain = get_template("v1"), get_template("plain")
    samples = Samples(None, v1, tokenizer, 384, ImageReader(16))
    others = [{"template": plain}, {"tokenizer": other}, {"image_reader": ImageReader(17)}, {"max_length": 385}]
    others += [{"check": RecordCheck(["video"])}, {"image_reader": ImageReader(16, tiling=choose_tiling(56, 16))}]
    keys = {dataclasses.replace(samples, **other).measurement_key() for other in [{}, *others]}
    assert len(keys) == 7
    again = dataclasses.replace(
        samples, tokenizer=load_tokenizer(FIXTURES / "tokenizer_llama"), image_reader=ImageReader(16, None, "square")
    )
    assert again.measurement_key() in keys


def test_real_records_are_measured_as_they_are_tokenized(tmp_path):
    store = RecordStore([str(FIXTURES / "data" / "records.json")], [str(FIXTURES / "data" / "images")])
    tokenizer, template = load_tokenizer(FIXTURES / "tokenizer_llama"), get_template("v1")
    lengths = measure(Samples(store, template, tokenizer, 384, ImageReader(16)), 2, tmp_path)
    for index in range(len(store)):
        try:
            sample = tokenize(store[index], template, tokenizer, 16, 384)
        except BadRecord as error:
            assert lengths.bad[index] == str(error)
        else:
            if store[index]["id"] == "image_missing_file":
                assert "'no_such_file.png'" in lengths.bad[index]
            else:
                assert lengths.length[index] == len(sample.input_ids)
                assert lengths.trained[index] == np.count_nonzero(sample.labels != -100)
