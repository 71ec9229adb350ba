"""What one rank gets for one step, and what becomes of a sample that turns out bad."""

import json
import os

import numpy as np
import pytest
import torch

from mini_llava.arguments import DataArguments
from mini_llava.data.images import ImageReader, Picture
from mini_llava.data.loader import RankSteps, rank_step_loader
from mini_llava.data.records import RecordStore
from mini_llava.data.samples import Samples
from mini_llava.data.templates import BadRecord
from mini_llava.data.tokenization import Sample
from mini_llava.data_file import DataFileError
from mini_llava.image_files import BadImage
from mini_llava.watch.skipped import log_skipped, refuse_or_report

SIZE = 8


@pytest.fixture
def store(tmp_path) -> RecordStore:
    """Ten records; the fourth cannot be tokenized and the seventh's image cannot be opened."""
    records = [{"id": f"r{number}"} for number in range(10)]
    records[3]["bad"] = True
    for number in (1, 6):
        records[number]["image"] = f"{number}.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    return RecordStore([str(tmp_path / "data.json")], [str(tmp_path)])


class Ones(ImageReader):
    def open(self, folder: str, name: str, several: bool = False) -> Picture:
        if name == "6.png":
            raise BadImage(f"the image {name!r} cannot be read.")
        return Picture(torch.ones(1, 3, SIZE, SIZE, dtype=torch.uint8), features=0)


class Numbers(Samples):
    """As many tokens as the number in the id, plus two; all trained."""

    def __init__(self, store: RecordStore):
        super().__init__(store, None, None, 100, Ones(features=0, size=SIZE))

    def tokenize(self, index: int, max_length: int | None = None) -> Sample:
        record = self.store[index]
        if "bad" in record:
            raise BadRecord("it has no answer.")
        ids = np.arange(2 + int(record["id"][1:]), dtype=np.int32)
        return Sample(ids, ids, [record["image"]] if "image" in record else [])


def steps(store, dealt, num_workers=0, on_bad_sample="error", packed=True):
    dataset = RankSteps(Numbers(store), packed, on_bad_sample)
    return rank_step_loader(dataset, dealt, DataArguments(dataloader_num_workers=num_workers), pin_memory=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_come_in_order_with_their_micro_batches_and_counts(store, num_workers):
    dealt = [[[0, 1], [2]], [[5, 4], []], [[9], [8]], [[7], [0]]]
    found = list(steps(store, dealt, num_workers))
    assert [step.records for step in found] == [[0, 1, 2], [5, 4], [9, 8], [7, 0]]
    assert [step.samples for step in found] == [3, 2, 2, 2]
    assert [step.tokens for step in found] == [2 + 3 + 4, 7 + 6, 11 + 10, 9 + 2]
    assert [step.trained_tokens for step in found] == [[3, 3], [11, 0], [10, 9], [8, 1]]  # a first token is no target
    assert all(len(step.micro_batches) == 2 for step in found)
    assert found[0].micro_batches[0]["pixel_values"].any() and not found[0].micro_batches[1]["pixel_values"].any()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("index, kind, reason", [(3, BadRecord, "it has no answer."), (6, BadImage, "'6.png' cannot")])
def test_a_bad_sample_ends_the_run_when_its_step_is_reached(store, num_workers, index, kind, reason):
    loader = steps(store, [[[0]], [[1, index]], [[2]]], num_workers)
    assert next(loader).records == [0]
    with pytest.raises(kind) as error:
        next(loader)
    assert f"data.json, record {index} (id r{index}): " in str(error.value) and reason in str(error.value)
    assert "Traceback" not in str(error.value)  # workers would put theirs into the text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_skipped_sample_is_reported_and_nothing_takes_its_place(store, num_workers, tmp_path):
    [step] = steps(store, [[[0, 3], [6, 1], [3]]], num_workers, on_bad_sample="skip")
    assert step.records == [0, 1] and step.samples == 2
    assert step.trained_tokens == [1, 2, 0]  # the third micro-batch is empty, and there all the same
    assert step.skipped == [
        (3, "it has no answer."),
        (6, "the image '6.png' cannot be read."),
        (3, "it has no answer."),
    ]

    log_skipped(store, step.skipped[:2], tmp_path / "new" / "skipped.jsonl")
    log_skipped(store, [], tmp_path / "new" / "skipped.jsonl")
    log_skipped(store, step.skipped[2:], tmp_path / "new" / "skipped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [3, 6, 3]
    assert lines[0]["record"].endswith("data.json, record 3 (id r3)") and lines[0]["reason"] == "it has no answer."


def test_what_measuring_finds_is_reported_all_at_once(store):
    bad = {6: "its image is gone.", 3: "it has no answer."}
    with pytest.raises(BadRecord) as error:
        refuse_or_report(store, bad, "error")
    message = str(error.value)
    assert message.startswith("2 of 10 records cannot be trained on") and "--on_bad_sample skip" in message
    assert message.index("record 3 (id r3): it has no answer.") < message.index("record 6 (id r6): its image is gone.")
    assert len(refuse_or_report(store, bad, "skip")) == 2
    assert refuse_or_report(store, {}, "error") == []


def test_faults_are_grouped_by_cause_the_most_frequent_first_and_skipping_all_is_not_advised(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{}] * 23))
    store = RecordStore([str(tmp_path / "long.json")])
    bad = {index: f"the image '{index}.png' is not there." for index in range(20)} | {
        20: "it is bad.",
        21: "it is bad.",
    }
    with pytest.raises(BadRecord) as refused:
        refuse_or_report(store, bad, "error")
    title, *table = str(refused.value).splitlines()
    assert title.startswith("22 of 23 records cannot be trained on; ") and "--on_bad_sample skip" in title
    assert [line.split() for line in table if line[:9].strip()] == [
        ["20", *["the", "image", "…", "is", "not", "there."]],
        ["2", *["it", "is", "bad."]],
    ]
    assert len(table) == 6 and table[1].endswith("long.json, record 0: the image '0.png' is not there.")
    with pytest.raises(BadRecord, match=r"^23 of 23 records cannot be trained on; ") as refused:
        refuse_or_report(store, bad | {22: "it is bad."}, "error")
    assert "skip" not in str(refused.value) and "--image_folder" in str(refused.value)


def test_a_long_list_of_kinds_of_fault_is_split_off_and_counted(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([{}] * 23))
    store = RecordStore([str(tmp_path / "long.json")])
    bad = {index: f"it is {'very ' * index}bad." for index in range(22)}
    with pytest.raises(BadRecord, match=r"record 19: it is (very ){19}bad\.\n\.\.\. and 2 other kinds of fault$"):
        refuse_or_report(store, bad, "error")


def test_loading_draws_nothing_from_the_global_generator(store):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    list(steps(store, [[[0]], [[1]]], num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_data_file_cut_short_ends_the_run_and_is_not_skipped_record_by_record(store, num_workers, on_bad_sample):
    os.truncate(store.data_path[0], 40)
    with pytest.raises(DataFileError, match=r"^The data file .*data\.json has changed while it was read"):
        list(steps(store, [[[0]]], num_workers, on_bad_sample))
