"""What a resumed run is compared by is cheap, and blind to what is harmless. Whole runs: test_checkpoint_faults.py."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mini_llava.data.records import RecordStore
from mini_llava.evaluation.questions import Question
from mini_llava.guards.identity import (
    PICTURES,
    PIECE,
    differences,
    picture_fingerprints,
    question_digest,
    resume_notes,
)


@pytest.fixture
def data(tmp_path) -> Path:
    """600 records with a picture of their own, the first of them large; bytes that nobody decodes."""
    (tmp_path / "images").mkdir()
    records = [{"image": f"{number:03}.bmp"} for number in range(600)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number, record in enumerate(records):
        (tmp_path / "images" / record["image"]).write_bytes(
            bytes([number % 251]) * (10 * 2**20 if number == 0 else 1000)
        )
    return tmp_path


def store_of(folder: Path, exclude: list[int] | None = None) -> RecordStore:
    files = [str(folder / "data.json")], [str(folder / "images")]
    if exclude is None:
        return RecordStore(*files)
    whole, listed = RecordStore(*files), folder / "bad.jsonl"
    lines = [json.dumps({"index": index, "digest": whole.record_digest(index)}) for index in exclude]
    listed.write_text("\n".join(lines))
    return RecordStore(*files, exclude=[str(listed)])


def seen(store: RecordStore) -> list[dict]:
    chosen = store.sample(np.ones(len(store), bool), PICTURES)
    return picture_fingerprints(store, [(index, name) for index in chosen for name in store.image_names(index)])


def image_lines(was: list[dict], now: list[dict]) -> list[str]:
    rest = {"flags": {}, "data": {"files": [], "all": "", "lengths": ""}}
    rest |= {"model": {"frozen": {}, "tokenizer": "", "image processor": {}, "language model": {}, "vision tower": {}}}
    return differences(rest | {"images": was}, rest | {"images": now}, [])[0]


def test_a_copy_with_other_times_under_another_path_is_the_same(data, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(data / "images", copy / "images", copy_function=shutil.copyfile)
    shutil.copyfile(data / "data.json", copy / "data.json")
    assert seen(store_of(copy)) == seen(store_of(data))
    assert len(seen(store_of(data))[0]) == PICTURES


def test_another_exclusion_looks_at_nearly_the_same_pictures(data):
    [whole], [fewer] = seen(store_of(data)), seen(store_of(data, exclude=[0, 1, 2, 300, 599]))
    assert len(fewer) == PICTURES and len(whole.keys() & fewer.keys()) >= PICTURES - 5
    assert image_lines([whole], [fewer]) == []


def test_one_picture_in_fifty_that_was_replaced_is_noticed(data):
    before = seen(store_of(data))
    for number in range(1, 600, 50):
        (data / "images" / f"{number:03}.bmp").write_bytes(b"x" * 1000)
    [line] = image_lines(before, seen(store_of(data)))
    assert f"of {PICTURES} compared have changed, first '" in line and line.endswith("(of the same size)")


@pytest.mark.parametrize("place", [0, 5 * 2**20, 10 * 2**20 - 1])
def test_a_large_picture_is_compared_without_reading_it_whole(place, data):
    store = store_of(data)
    before = picture_fingerprints(store, [(0, "000.bmp")])
    read = bytes_read()
    with open(data / "images" / "000.bmp", "r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert picture_fingerprints(store, [(0, "000.bmp")]) != before
    assert bytes_read() - read < 3 * PIECE + 20_000


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_pictures_that_cannot_be_read_are_named_and_those_that_came_back_are_not(data):
    store = store_of(data)
    before = seen(store)
    name = next(iter(before[0]))
    os.remove(data / "images" / name)
    (data / "images" / name).mkdir()
    gone = seen(store)
    assert image_lines(before, gone) == [f"images: 1 of {PICTURES} compared cannot be read now, first '{name}'"]
    assert image_lines(gone, before) == []  # the record was left out, and the lengths of the samples tell


def test_a_checkpoint_of_before_these_were_compared_is_not_refused_and_nothing_is_said_of_it(data):
    identity = {"flags": {}, "data": {"files": [], "all": "", "lengths": ""}, "computation": {}, "held out": None}
    identity |= {
        "model": {"frozen": {}, "tokenizer": "", "image processor": {}, "language model": {}, "vision tower": {}}
    }
    old = {name: identity[name] for name in ("flags", "data", "model")}
    assert differences(old, identity | {"images": seen(store_of(data))}, []) == ([], [])
    assert resume_notes({"identity": old, "versions": {}, "world_size": 1, "step": 5}, identity) == []


def test_another_number_of_processes_and_another_torch_are_said(monkeypatch):
    monkeypatch.setattr("mini_llava.guards.identity.versions", lambda: {"torch": "2.9", "transformers": "5.0"})
    mine = {"computation": {"processes": 2}, "held out": None}
    manifest = {"identity": {}, "versions": {"torch": "2.8", "transformers": "5.0", "peft": "1"}, "world_size": 1}
    [note] = resume_notes(manifest, mine)
    assert "(torch: 2.8 then, 2.9 now; processes: 1 then, 2 now)" in note and "Dropout" in note


@pytest.mark.parametrize("change", ["nothing", "an answer", "a picture"])
def test_held_out_questions_that_are_others_are_said_because_the_curves_do_not_tell(change, data):
    def held_out(answer: str) -> dict:
        of_record = np.arange(6), np.arange(6) > 3
        question = Question(3, np.arange(4), [(3, "003.bmp")], [4], "What?", answer, "exact_match", 9, *of_record)
        pictures = picture_fingerprints(store_of(data), question.images)
        return {"held out": {"questions": question_digest([question]), "images": pictures}, "computation": {}}

    was = held_out("this")
    if change == "a picture":
        (data / "images" / "003.bmp").write_bytes(b"another")
    manifest = {"identity": was, "versions": {}, "world_size": 1, "step": 1500}
    notes = resume_notes(manifest, held_out("that" if change == "an answer" else "this"))
    reasons = {"an answer": "the questions are different", "a picture": "1 of 1 compared has changed, first '003.bmp'"}
    assert len(notes) == (change != "nothing")
    for note in notes:
        assert "up to step 1,500" in note and reasons[change] in note
