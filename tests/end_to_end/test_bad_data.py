"""Bad samples in a run: named, counted, listed, and never replaced by another sample."""

import json
import re
import shutil

import pytest

from tests.end_to_end.runs import FIXTURES, MODEL_AND_DATA
from tests.forked_runs import start

pytestmark = pytest.mark.slow

TORN, GONE = "wide_rgb.png", "gone.png"  # found when it is opened; found before step 1
NO_MARK = 3  # the record that has an image and no mark for it
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four records: two images that are not there, three that are torn, and one record without its mark."""
    folder = tmp_path_factory.mktemp("bad_data")
    shutil.copytree(FIXTURES / "data" / "images", folder / "images")
    content = (folder / "images" / TORN).read_bytes()
    (folder / "images" / TORN).write_bytes(content[: len(content) // 2])
    records = json.loads((FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))
    records = [record for record in records if record.get("image") != TORN][:24]
    with_image = [index for index, record in enumerate(records) if isinstance(record.get("image"), str)]
    for index in with_image[1:10:3]:
        records[index]["image"] = TORN
    (folder / "torn.json").write_text(json.dumps(records))
    for index in with_image[2:6:3]:
        records[index]["image"] = GONE
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    records[NO_MARK] = {"id": "no mark", "image": "tall_rgb.png", "conversations": turns}
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return json.loads((folder / "records.json").read_text())


@pytest.fixture(scope="module")
def bad(records):
    found = {index for index, record in enumerate(records) if record.get("image") in (TORN, GONE)}
    assert len(found) == 5
    return found | {NO_MARK}


@pytest.fixture(scope="module")
def runs(folder, records, bad):
    """Name to (exit code, what was printed) of all runs; the last ones take what the first one wrote."""

    def run(name, processes=1, **values):
        values = {
            **MODEL_AND_DATA,
            **dict(data_path=folder / "records.json", image_folder=folder / "images", max_steps=STEPS, stage=2),
            **dict(global_batch_size=8, per_device_train_batch_size=4, output_dir=folder / name, seed=1),
            **dict(save_strategy="no", learning_rate=1e-2, dataloader_num_workers=1),
            **values,
        }
        words = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
        return start(words, folder / f"{name}.txt", "cpu", processes)

    batches = [list(range(first, first + 8)) for first in range(0, 24, 8)]
    (folder / "order.json").write_text(json.dumps(batches))
    good = [record for index, record in enumerate(records) if index not in bad]
    (folder / "good_records.json").write_text(json.dumps(good))
    (folder / "gone.json").write_text(json.dumps([good[0] | {"image": GONE}]))
    (folder / "good.json").write_text(json.dumps([[i for i in batch if i not in bad] for batch in batches]))
    skip = dict(on_bad_sample="skip", sample_order=folder / "order.json")
    started = {
        "one": run("one", **skip),
        "two": run("two", processes=2, dataloader_num_workers=2, **skip),
        "never there": run("never there", on_bad_sample="skip", sample_order=folder / "good.json"),
        "scan": run("scan", processes=2),
        "torn": run("torn", data_path=folder / "torn.json", dataloader_num_workers=2),
    }
    held_out = dict(eval_data_path=folder / "gone.json", eval_image_folder=folder / "images")
    started["held out"] = run("held out", data_path=folder / "good_records.json", **held_out)
    results = {name: (run.wait(), run.text) for name, run in started.items()}
    last = run("excluded", exclude=folder / "one" / "skipped.jsonl", sample_order=folder / "kept.json")
    return results | {"excluded": (last.wait(), last.text)}


@pytest.fixture(scope="module", autouse=True)
def kept_order(folder, bad):
    """The good records of the three batches, as they are numbered once the others are excluded."""
    kept = [index for index in range(24) if index not in bad]
    batches = [[kept.index(i) for i in range(first, first + 8) if i in kept] for first in range(0, 24, 8)]
    (folder / "kept.json").write_text(json.dumps(batches))


def log(folder, name):
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def skipped(folder, name):
    return [json.loads(line) for line in (folder / name / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["one", "two", "excluded"])
def test_the_global_batch_shrinks_by_the_bad_samples_and_nothing_else_changes(name, runs, folder):
    """Against a run whose recorded global batches never had the bad samples. The bound is fp32 rounding over steps."""
    for run in (name, "never there"):
        assert runs[run][0] == 0, runs[run][1]
    found, expected = log(folder, name), log(folder, "never there")
    assert len(found) == len(expected) == STEPS
    for step, other in zip(found, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        samples, others = (round(s["samples_per_second"] * s["seconds_per_step"]) for s in (step, other))
        assert samples == others < 8


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_skipped_sample_is_listed_once_and_counted_by_reason(name, runs, folder, bad):
    listed = skipped(folder, name)
    assert sorted(entry["index"] for entry in listed) == sorted(bad)
    for entry in listed:
        assert f"records.json, record {entry['index']} (id " in entry["record"] and entry["reason"].endswith(".")
    lines = [line.split("skipped: ")[1] for line in runs[name][1].splitlines() if "skipped: " in line]
    counts = [
        "3 records: the image … cannot be read: OSError: image file is truncated",
        "2 records: the image … is not in the image folder",
        "1 record: it has # <image> marks for # image",
    ]
    for line, count in zip(lines, counts[1:] + counts, strict=True):  # at the start, and at the end
        assert line.startswith(count)


def test_excluded_records_are_not_skipped_because_they_are_not_there(runs, folder):
    code, text = runs["excluded"]
    assert code == 0 and "skipped: " not in text and not (folder / "excluded" / "skipped.jsonl").exists()
    assert re.search(r"^18 records, ", text, re.MULTILINE), text


def test_all_faults_that_a_scan_can_find_are_reported_together_before_step_1(runs, folder, records):
    code, text = runs["scan"]
    assert code == 1 and "Traceback" not in text and not (folder / "scan" / "log.jsonl").exists()
    message = text.split("train.py: error: ")[1]
    assert message.startswith("3 of 24 records cannot be trained on; fix them, or leave them out with --on_bad_sample")
    for index, record in enumerate(records):
        assert (f"record {index} (id " in message) == (index == NO_MARK or record.get("image") == GONE)


def test_a_held_out_record_that_cannot_be_asked_ends_the_run_before_step_1(runs, folder):
    code, text = runs["held out"]
    assert code == 1 and "Traceback" not in text and not (folder / "held out" / "log.jsonl").exists()
    assert re.search(
        r"error: --eval_data_path: .*gone\.json, record 0 \(id .*\): the image 'gone\.png' is not in", text
    )


def test_an_image_that_turns_out_torn_ends_the_run_with_one_sentence(runs, folder):
    """Two loader workers; nothing of theirs but the sentence may be seen."""
    code, text = runs["torn"]
    assert code == 1
    [line] = [line for line in text.splitlines() if "error" in line.lower()]
    assert re.search(
        r"train\.py: error: .*torn\.json, record \d+ \(id [^)]+\): the image '.*wide_rgb\.png' cannot", line
    )
    assert "Fix it, or leave such records out" in line and "Traceback" not in text
