"""Records are bytes and offsets."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_llava import data_file
from mini_llava.data import records
from mini_llava.data.records import RecordStore
from mini_llava.data.templates import BadRecord
from mini_llava.data_file import DataFileError

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
    monkeypatch.setattr(data_file, "CHUNK_BYTES", chunk)
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
    monkeypatch.setattr(data_file, "CHUNK_BYTES", chunk)
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
