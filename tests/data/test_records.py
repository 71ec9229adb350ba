"""Records are bytes and offsets; lengths are exact, cached, and never stale."""

import json
import multiprocessing
import os
import pickle
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_llava.data import records
from mini_llava.data.records import DataFileError, RecordStore, measure, measurement_key
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import BadRecord, Sample, tokenize
from mini_llava.formats.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


# --- reading ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.dictionaries(st.text(max_size=4), st.text() | st.lists(st.integers() | st.none(), max_size=3), max_size=4),
        min_size=1,
        max_size=12,
    ),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    chunk=st.integers(1, 60),
)
def test_any_array_is_read_back_with_any_size_of_chunk(values, ascii_only, indent, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk)
    try:
        text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
        path = write(tmp_path / "a.json", text)
    except UnicodeEncodeError:  # a lone surrogate is not UTF-8; JSON may only escape it
        path = write(tmp_path / "a.json", json.dumps(values, indent=indent))
    store = RecordStore([path])
    assert [store[index] for index in range(len(store))] == values


def test_sources_have_sizes_without_what_is_excluded_and_names_of_their_own(tmp_path):
    for folder, count in (("a", 3), ("b", 1), ("c", 4)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.json", [{"id": number} for number in range(count)])
    (tmp_path / "c" / "train.json").rename(tmp_path / "c" / "chats.v2.json")
    files = [str(tmp_path / name) for name in ("a/train.json", "b/train.json", "c/chats.v2.json")]
    store = RecordStore(files)
    assert store.source_sizes() == [3, 1, 4]
    assert store.source_names() == ["train.1", "train.2", "chats.v2"]
    listed = [{"index": index, "digest": store.record_digest(index)} for index in (0, 3, 7)]
    excluding = RecordStore(files, exclude=[write(tmp_path / "bad.jsonl", lines(listed))])
    assert excluding.source_sizes() == [2, 0, 3]
    assert [excluding.source(index) for index in range(len(excluding))] == [0, 0, 2, 2, 2]


def test_json_lines_are_recognised_by_their_first_byte(tmp_path):
    values = [{"id": index, "text": "é\u2028" * index} for index in range(5)]
    text = "\n" + lines(values).replace("\n", "\n\n", 2)
    store = RecordStore([write(tmp_path / "a.json", text), write(tmp_path / "b.jsonl", json.dumps(values))])
    assert [store[index] for index in range(len(store))] == values * 2


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"id": 1}]')
    assert RecordStore([str(tmp_path / "a.json")])[0] == {"id": 1}


def test_several_files_follow_each_other_each_with_its_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [write(tmp_path / "a.json", [{"id": "a0"}, {"id": "a1"}]), write(tmp_path / "b.json", [{"id": "b0"}])]
    store = RecordStore(paths, [str(tmp_path / "one"), str(tmp_path / "two")])
    assert len(store) == 3
    assert [store.source(index) for index in range(3)] == [0, 0, 1]
    assert store.image_folder(1) == str(tmp_path / "one") and store.image_folder(2) == str(tmp_path / "two")
    assert store.describe(2) == f"{paths[1]}, record 0 (id b0)"


def test_without_image_folders_there_is_none(tmp_path):
    assert RecordStore([write(tmp_path / "a.json", [{}])]).image_folder(0) is None


def test_an_index_beyond_the_end_is_an_error(tmp_path):
    store = RecordStore([write(tmp_path / "a.json", [{}])])
    for index in (-1, 1):
        with pytest.raises(IndexError):
            store[index]


def test_an_element_that_is_no_object_is_a_bad_record(tmp_path):
    store = RecordStore([write(tmp_path / "a.json", [{"id": 1}, 7])])
    with pytest.raises(BadRecord, match="not a JSON object but a int"):
        store[1]
    assert store.describe(1).endswith("a.json, record 1")


def test_a_broken_line_is_one_bad_record(tmp_path):
    store = RecordStore([write(tmp_path / "a.jsonl", '{"id": 1}\n{"id": \n{"id": 3}\n')])
    assert len(store) == 3 and store[2] == {"id": 3}
    with pytest.raises(BadRecord, match=r"not JSON: Expecting value.*\(bytes 10 to 17 of the file\)"):
        store[1]


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1},\n{"b": }\n]', "Expecting value at byte 17, line 2"),
        ('[{"a": 1},\n{"b": 2}\n', "the file ends where a comma or the closing bracket should be, at byte 20, line 3"),
        ('[{"a": 1}\n{"b": 2}]', "expected a comma or the closing bracket, found '{' at byte 10, line 2"),
        ('[{"a": 1},\n]', "Expecting value at byte 11, line 2"),
        ('[,{"a": 1}]', "Expecting value at byte 1, line 1"),
        ('[{"a": "x\n"}]', "Invalid control character at byte 9, line 1"),
        ('[{"a": "x}]', "Unterminated string starting at byte 7, line 1"),
        ('[{"a": 1}] x', "something follows the closing bracket at byte 11, line 1"),
        ("[", "the file ends where an element or the closing bracket should be, at byte 1, line 1"),
    ],
)
def test_a_broken_array_is_an_error_with_byte_and_line(text, message, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "a.json", text)
    with pytest.raises(ValueError) as error:
        RecordStore([path])
    assert str(error.value).startswith(f"{path} is not a whole JSON array: {message}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("\n", "begins with b''"),
        ("id,text\n", "begins with b'i'"),
        ('{\n "id": 1\n}\n', "one whole JSON object per line"),
        ("[]", "No record in"),
    ],
)
def test_a_file_of_another_kind_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RecordStore([write(tmp_path / "a.json", text)])


def test_missing_files_and_folders_and_unmatched_lists_are_named(tmp_path):
    path = write(tmp_path / "a.json", [{}])
    with pytest.raises(FileNotFoundError, match=r"The data file .*nothing\.json \(--data_path\) does not exist"):
        RecordStore([str(tmp_path / "nothing.json")])
    with pytest.raises(NotADirectoryError, match=r"The image folder .*images \(--image_folder\) does not exist"):
        RecordStore([path], [str(tmp_path / "images")])
    with pytest.raises(ValueError, match="lists 2 files and --image_folder 1 folder;"):
        RecordStore([path, path], [str(tmp_path)])
    with pytest.raises(ValueError, match="No training data"):
        RecordStore([])


def test_memory_does_not_grow_with_the_records(tmp_path):
    path = write(tmp_path / "a.json", [{"id": index, "text": "x" * 100} for index in range(2000)])
    assert len(pickle.dumps(RecordStore([path]))) < 2000 * 16 + 2000


def ids_in_another_process(store, queue):
    queue.put([store[index]["id"] for index in range(len(store))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_both_kinds_read_the_same_records(method, tmp_path):
    store = RecordStore([write(tmp_path / "a.json", [{"id": index} for index in range(20)])])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=ids_in_another_process, args=(store, queue))
    process.start()
    assert queue.get(timeout=120) == list(range(20))
    process.join()


def test_the_digest_follows_the_content_and_not_the_name(tmp_path):
    one = RecordStore([write(tmp_path / "a.json", [{"id": 1}])])
    same = RecordStore([write(tmp_path / "b.json", [{"id": 1}])])
    other = RecordStore([write(tmp_path / "c.json", [{"id": 2}])])
    assert one.digest() == same.digest() != other.digest()


# --- the index of a large file ---------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """An array of 340 records with an old date, just large enough to be cached; and a folder for the cache."""
    path = tmp_path / "large.json"
    write(path, [{"id": index, "text": "a" * 100_000} for index in range(340)])
    os.utime(path, (1, 1))
    assert path.stat().st_size > records.INDEX_CACHED_FROM
    return path, tmp_path / "output" / "cache"


def bytes_read() -> int:
    """By this process so far, from whatever files, page cache or not."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def ids(store) -> list:
    return [store[index]["id"] for index in range(len(store))]


def test_a_large_file_is_read_once_and_never_again_for_its_index_and_its_digest(large):
    path, cache = large
    first = RecordStore([str(path)], cache_folder=cache)
    expected = first.digest(), ids(first)
    before = bytes_read()
    second = RecordStore([str(path)], cache_folder=cache)
    digest = second.digest()
    assert bytes_read() - before < 1_000_000
    assert (digest, ids(second)) == expected == (RecordStore([str(path)]).digest(), list(range(340)))


def test_a_changed_file_is_indexed_again_even_if_size_and_date_are_the_same(large):
    path, cache = large
    before = RecordStore([str(path)], cache_folder=cache).digest()
    content = path.read_text()
    path.write_text(content.replace('{"id": 1,', '{"id": 7,'))
    os.utime(path, (1, 1))
    assert path.stat().st_size == len(content)
    after = RecordStore([str(path)], cache_folder=cache)
    assert after.digest() != before and after[1]["id"] == 7


def test_a_damaged_index_and_a_folder_that_cannot_be_written_cost_time_alone(large):
    path, cache = large
    expected = RecordStore([str(path)], cache_folder=cache).digest()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:200] + b"\0" * 50 + content[250:]):
        file.write_bytes(damage)
        store = RecordStore([str(path)], cache_folder=cache)
        assert store.digest() == expected and ids(store) == list(range(340))
    with pytest.warns(UserWarning, match="The index is not cached: .* cannot be written"):
        assert RecordStore([str(path)], cache_folder=file / "in a file").digest() == expected


def test_a_small_file_leaves_no_cache_behind(tmp_path):
    RecordStore([write(tmp_path / "a.json", [{"id": 1}])], cache_folder=tmp_path / "cache").digest()
    assert not (tmp_path / "cache").exists()


# --- files that change while they are read ---------------------------------------------------------------------------

CHANGES = {
    "cut short": lambda path: os.truncate(path, 30),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_text(path.read_text() + " "),
    "written to": lambda path: path.write_text(path.read_text().replace("a", "b")),
}


@pytest.fixture
def changing(tmp_path):
    """A store whose file has an old date, so that writing to it always gives it another."""
    path = tmp_path / "a.json"
    write(path, [{"id": index, "text": "a" * 5000} for index in range(20)])
    os.utime(path, (1, 1))
    return path, RecordStore([str(path)])


def test_a_file_that_is_touched_and_then_written_to_has_changed(changing):
    path, store = changing
    os.utime(path)
    assert store[0]
    CHANGES["written to"](path)
    with pytest.raises(DataFileError):
        store[0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_open_is_named_and_nothing_dies(change, changing):
    path, store = changing
    CHANGES[change](path)
    for use in (lambda: store[19], lambda: store.describe(0), store.digest, lambda: pickle.loads(pickle.dumps(store))):
        with pytest.raises(DataFileError, match=r"The data file .*a\.json has changed while it was read: it ha[ds]"):
            use()


def test_a_file_that_is_replaced_by_renaming_another_is_read_as_it_was(changing):
    path, store = changing
    write(path.with_name("new.json"), [{"id": "new"}])
    os.replace(path.with_name("new.json"), path)
    assert store[19]["id"] == 19
    with pytest.raises(DataFileError, match="has changed"):
        pickle.loads(pickle.dumps(store))  # a spawned worker would see the other file


def put_back(path):
    """Writes the same content into the same file, as `rsync --inplace` and some backups do."""
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("touch", [Path.touch, put_back])
def test_a_file_that_is_only_touched_is_read_on(touch, changing):
    path, store = changing
    digest = store.digest()
    uses = (
        lambda: store[19]["id"],
        lambda: store.describe(0),
        store.digest,
        lambda: ids(pickle.loads(pickle.dumps(store))),
    )
    for number, use in enumerate(uses):
        touch(path)
        os.utime(path, (2 + number, 2 + number))
        use()
    assert store.digest() == digest and ids(store) == list(range(20))
    CHANGES["written to"](path)
    with pytest.raises(DataFileError, match="it has been written to"):
        store[19]


def test_a_file_that_is_replaced_by_an_equal_one_is_the_same_for_new_workers_too(changing):
    path, store = changing
    path.with_name("copy.json").write_bytes(path.read_bytes())  # of now, not of 1970
    os.replace(path.with_name("copy.json"), path)
    assert ids(store) == ids(pickle.loads(pickle.dumps(store))) == list(range(20))


def test_a_touched_file_is_read_as_a_whole_once(large):
    path, cache = large
    RecordStore([str(path)], cache_folder=cache)
    store = RecordStore([str(path)], cache_folder=cache)  # the digest is the cache's: the file has not been read
    path.touch()
    before = bytes_read()
    assert store[3]["id"] == 3
    assert path.stat().st_size < bytes_read() - before < 1.1 * path.stat().st_size
    before = bytes_read()
    assert ids(store) == list(range(340)) and store.digest()
    assert bytes_read() - before < 1.1 * path.stat().st_size  # the records, and nothing twice


def test_forked_workers_read_a_touched_file_on(changing, tmp_path):
    path, store = changing
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for _ in range(2):  # of which each finds the time that the process it comes from does not know
        path.touch()
        process = context.Process(target=ids_in_another_process, args=(store, queue))
        process.start()
        assert queue.get(timeout=120) == list(range(20))
        process.join()
    assert measure(store, Words(tmp_path / "calls"), 2, None, "key").length.tolist() == [1] * 20


@pytest.mark.parametrize("num_workers", [1, 2])
def test_measuring_a_file_that_was_cut_short_ends_with_the_sentence(num_workers, changing, tmp_path):
    path, store = changing
    os.truncate(path, 30)
    with pytest.raises(DataFileError, match="it had 100,470 bytes and has 30"):
        measure(store, Words(tmp_path / "calls"), num_workers, None, "key")


# --- measuring -------------------------------------------------------------------------------------------------------


class Words:
    """Stands for a tokenizer: a token for each word, ten for an image; every call leaves a line in a file."""

    def __init__(self, log):
        self.log = log

    def __call__(self, record, folder):
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
    return RecordStore([path], [str(tmp_path / "images")]), Words(tmp_path / "calls"), tmp_path / "cache"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_lengths_are_those_of_the_samples(num_workers, data):
    store, words, cache = data
    lengths = measure(store, words, num_workers, cache, "key")
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
    store, words, cache = data
    first = measure(store, words, 2, cache, "key")
    second = measure(store, words, 2, cache, "key")
    assert words.calls() == 1200
    assert all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in ("length", "trained", "pictures")
    )
    assert first.bad == second.bad


def test_another_key_or_changed_data_is_measured_again(data):
    store, words, cache = data
    measure(store, words, 1, cache, "key")
    measure(store, words, 1, cache, "another key")
    assert words.calls() == 2400
    path = Path(store.data_path[0])
    stamp = path.stat()
    path.write_text(path.read_text().replace("a a a a", "b a a a", 1))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and date
    measure(RecordStore([str(path)]), words, 1, cache, "key")
    assert words.calls() == 3600


def test_an_image_put_in_place_later_is_found_without_measuring_again(data):
    store, words, cache = data
    assert 700 in measure(store, words, 1, cache, "key").bad
    Path(store.image_folder(0), "gone.png").touch()
    lengths = measure(store, words, 1, cache, "key")
    assert 700 not in lengths.bad and lengths.length[700] == 11
    assert words.calls() == 1200


def test_images_without_a_folder_are_bad_records(data):
    store, words, cache = data
    assert "no --image_folder is given" in measure(RecordStore(store.data_path), words, 1, cache, "key").bad[3]


def test_a_damaged_cache_is_measured_again(data):
    store, words, cache = data
    expected = measure(store, words, 1, cache, "key")
    (file,) = cache.glob("*.npz")
    content = file.read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:200] + b"\0" * 50 + content[250:]):
        file.write_bytes(damage)
        assert measure(store, words, 1, cache, "key").length.tolist() == expected.length.tolist()
    assert words.calls() == 4 * 1200


@pytest.mark.parametrize("cache_folder", [None, "in/a/file"])
def test_where_nothing_can_be_written_lengths_are_computed_all_the_same(cache_folder, data, tmp_path):
    store, words, cache = data
    expected = measure(store, words, 1, cache, "key").length.tolist()
    if cache_folder is None:
        assert measure(store, words, 1, None, "key").length.tolist() == expected
    else:
        (tmp_path / "in").touch()
        with pytest.warns(UserWarning, match="Lengths are not cached"):
            assert measure(store, words, 1, tmp_path / cache_folder, "key").length.tolist() == expected


def measure_slowly(store, words, cache):
    def slow(record, folder):
        time.sleep(0.0005)
        return words(record, folder)

    measure(store, slow, 1, cache, "key")


def test_ranks_of_one_machine_measure_once(data):
    store, words, cache = data
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=measure_slowly, args=(store, words, cache)) for _ in range(3)]
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
        measure(store, Words(tmp_path / "calls"), num_workers, tmp_path, "key")


def test_the_key_follows_everything_that_decides_a_length():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_llama")
    other = load_tokenizer(FIXTURES / "tokenizer_qwen")
    v1, plain = get_template("v1"), get_template("plain")
    keys = {
        measurement_key(v1, tokenizer, 16, 384),
        measurement_key(plain, tokenizer, 16, 384),
        measurement_key(v1, other, 16, 384),
        measurement_key(v1, tokenizer, 17, 384),
        measurement_key(v1, tokenizer, 16, 385),
        measurement_key(v1, tokenizer, 16, 384, {"video"}),
    }
    assert len(keys) == 6
    assert measurement_key(v1, load_tokenizer(FIXTURES / "tokenizer_llama"), 16, 384) in keys


def test_real_records_are_measured_as_they_are_tokenized(tmp_path):
    store = RecordStore([str(FIXTURES / "data" / "records.json")], [str(FIXTURES / "data" / "images")])
    tokenizer, template = load_tokenizer(FIXTURES / "tokenizer_llama"), get_template("v1")
    to_sample = partial(tokenize, template=template, tokenizer=tokenizer, tokens_per_image=16, max_length=384)
    lengths = measure(store, to_sample, 2, tmp_path, "key")
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
