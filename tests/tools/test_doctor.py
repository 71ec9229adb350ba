"""The doctor and the trainer never disagree; what the doctor lists is what `--exclude` leaves out."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mini_llava.data.collator import collate
from mini_llava.data.images import ImageReader
from mini_llava.data.lengths import measure
from mini_llava.data.loader import RankSteps
from mini_llava.data.records import RecordStore
from mini_llava.data.sampler import GlobalBatchSampler, deal
from mini_llava.data.samples import Samples
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import Sample
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor
from mini_llava.guards.records import RecordCheck
from mini_llava.tools import doctor

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "parity" / "fixtures"
MAX_LENGTH, TOKENS_PER_IMAGE = 200, 16  # as many as the tower of the fixtures gives


def record(number, answer="A cat.", image=None, question="What is it?"):
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{answer} {number}"}]
    if image is None:
        return {"id": f"r{number}", "conversations": conversations}
    conversations[0]["value"] = f"<image>\n{question}"
    return {"id": f"r{number}", "image": image, "conversations": conversations}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two data files, one of each fault and warning, among good records."""
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(FIXTURES / "data" / "images", folder / "images")
    images = folder / "images"
    content = (images / "wide_rgb.png").read_bytes()
    (images / "torn.png").write_bytes(content[: len(content) // 2])
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("404 Not Found")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    Image.new("1", (14_000, 75)).save(images / "longer.png")  # a square of it would have 196 million pixels
    shutil.copy(images / "tall_rgb.png", images / "named.jpg")
    (images / "out.png").symlink_to(FIXTURES / "images.json")

    faults = [7, {"id": "none"}, {"id": "turns", "conversations": [3]}, record(1, image="gone.png")]
    faults += [record(number, image=name) for number, name in enumerate(("torn.png", "empty.jpg", "text.png"), start=2)]
    faults += [record(5, image="../images.json"), record(6, image="/etc/passwd"), record(7, image="out.png")]
    faults += [record(8, image="bomb.png"), record(9, image="longer.png"), record(10, image="torn.png")]
    faults += [record(11, image="tall_rgb.png") | {"image": ["tall_rgb.png", "wide_rgb.png"]}, record(12, "<image>")]
    role, twice = record(13), record(14)
    role["conversations"][0]["from"] = "function_call"
    twice["conversations"] += twice["conversations"][1:]
    faults += [role, twice, record(15, question="why " * 300), record(16, "half a pair \ud83d")]
    Image.new("F", (40, 40)).save(images / "floats.tif")
    Image.fromarray(np.full((40, 40), 1023, np.uint16)).save(images / "dark.png")  # 10 bits of a camera
    faults += [
        record(18, image="floats.tif"),
        record(19) | {"videos": ["v.mp4"]},
        record(19, question="<video>\nWhat?"),
    ]

    first, open_end = record(20), record(21)
    first["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    open_end["conversations"].append({"from": "human", "value": "And?"})
    empty = record(22, question=" ")
    remarked = [
        first,
        open_end,
        empty,
        record(23, "long " * 300),
        record(24, image="named.jpg"),
        record(25),
        record(25),
        record(26, image="dark.png"),
    ]
    good = [
        record(30 + number, "word " * (number % 40), "square_rgb.png" if number % 3 else None) for number in range(60)
    ]
    (folder / "a.json").write_text(json.dumps([*good[:30], *faults, *good[30:]]))
    (folder / "b.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in remarked) + "{broken\n" + json.dumps(record(17))
    )
    return folder


FAULTS, REMARKS, RECORDS = 23, 7, 60 + 22 + 8 + 2


def flags(data, *more):
    paths = ["--data_path", data / "a.json", data / "b.jsonl", "--image_folder", data / "images", data / "images"]
    model = ["--model_name_or_path", FIXTURES / "llm", "--vision_tower", FIXTURES / "clip"]
    rest = ["--model_max_length", MAX_LENGTH, "--num_workers", 2, "--global_batch_size", 8]
    return [str(word) for word in (*paths, *model, *rest, "--per_device_train_batch_size", 2, *more)]


@pytest.fixture(scope="module")
def samples(data):
    store = RecordStore([str(data / "a.json"), str(data / "b.jsonl")], [str(data / "images")] * 2)
    processor = load_image_processor(FIXTURES / "clip")
    image_reader = ImageReader(TOKENS_PER_IMAGE, processor, "pad", processor.crop_size["height"])
    return Samples(store, get_template("v1"), load_tokenizer(FIXTURES / "llm"), MAX_LENGTH, image_reader, RecordCheck())


@pytest.fixture(scope="module")
def checked(data):
    """(exit code, printed) of the doctor on this data."""
    words = flags(data, "--output", data / "bad.jsonl", "--plot", data / "plot.png")
    command = [sys.executable, "-m", "mini_llava.tools.doctor", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, run.stdout


def listed(file):
    return {entry["index"]: entry["reason"] for entry in map(json.loads, file.read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_the_doctor_finds_the_faults_that_training_would_find_and_no_others(
    aspect_ratio, data, samples, checked, tmp_path
):
    """Every record through the very objects that train.py uses; the reasons agree word for word."""
    lengths = measure(samples, 1, None)
    reader = replace(samples.image_reader, aspect_ratio=aspect_ratio)
    steps = RankSteps(replace(samples, image_reader=reader), packed=True, on_bad_sample="skip")
    trained = steps[[[index] for index in range(len(samples)) if index not in lengths.bad]]
    bad = lengths.bad | dict(trained.skipped)
    assert len(bad) == FAULTS - (aspect_ratio == "square") and len(samples) == RECORDS
    doctor.main(flags(data, "--output", tmp_path / "bad.jsonl", "--image_aspect_ratio", aspect_ratio))
    assert listed(tmp_path / "bad.jsonl") == bad
    if aspect_ratio == "pad":
        assert listed(data / "bad.jsonl") == bad  # the default of stage 2


def test_images_that_are_only_looked_for_are_those_that_the_trainer_looks_for(data, samples, tmp_path):
    assert doctor.main(flags(data, "--output", tmp_path / "bad.jsonl", "--check_images", "exist")) == 1
    assert listed(tmp_path / "bad.jsonl") == measure(samples, 1, None).bad


@pytest.mark.slow
def test_faults_and_warnings_are_counted_with_examples(checked):
    code, text = checked
    assert code == 1
    assert f"Cannot be trained on: {FAULTS} of {RECORDS} records" in text
    for line in [
        "2  the image … cannot be read: OSError: image file is truncated",
        "1  the image … cannot be read: the file is empty.",
        "1  the image … is too large to be read safely",
        "1  an image of # is too large to be padded to a square.",
        "2  the image … leads out of the image folder",
        "1  the image … leads out of the image folder",
        "1  the image … cannot be used: it has floating-point pixels, and its format does not say which",
        "1  its key … looks like media and is not read: images are read only from the record's …",
        "1  a question has the mark …, which is not read",
        "1  the image … has # bits, of which it uses the lowest: the model sees it nearly black.",
        "1  turn # is from …; known roles are … and ….",
        "1  turn # is empty.",
        "1  it begins with an answer, which is left out",
        "1  its last question has no answer",
        "1  it has # tokens, more than --model_max_length #: # of # trained ones are cut off.",
        "1  the image … holds PNG, not JPEG",
        "1  it trains the same text and images as record # of all.",
    ]:
        assert f" {line}" in text, line
    assert f"To look at: {REMARKS} of {RECORDS} records" in text
    assert "a.json, record 31 (id none): it has no list 'conversations' of turns." in text
    assert "b.jsonl, record 4 (id r24): the image 'named.jpg' holds PNG, not JPEG; it is read all the same." in text


@pytest.mark.slow
def test_the_histogram_counts_every_good_record_once(checked, data):
    lines = [line.split() for line in checked[1].split("good records: ")[1].split("\n\n")[0].splitlines()[1:]]
    assert sum(int(line[2] if line[0] == ">" else line[1]) for line in lines) == RECORDS - FAULTS
    assert lines[-1][:3] == [">", str(MAX_LENGTH), "1"]
    with Image.open(data / "plot.png") as plot:
        assert plot.format == "PNG" and len(plot.convert("RGB").getcolors(100_000)) > 3


@pytest.mark.parametrize("row, layout", [(1, "in_order"), (2, "padded"), (3, "packed")])
def test_the_padding_figures_are_those_of_the_tensors_that_are_made(row, layout):
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 60, 70)
    has_image = generator.random(70) < 0.5
    sampler = GlobalBatchSampler(lengths, has_image, 16, slots=4)
    line = doctor.batch_figures(sampler)[row].split()
    positions, padding = line[-4], line[-3]

    computed = 0
    for batch in sampler.global_batches(0):
        for samples in deal(batch, lengths, 4, 1, layout)[0]:
            made = [Sample(ids := np.zeros(lengths[i], np.int32), ids, []) for i in samples]
            if made:
                computed += collate(made, 8, layout == "packed")["input_ids"].numel()
    assert int(positions.replace(",", "")) == computed
    assert padding == f"{1 - lengths.sum() / computed:.1%}"
    assert (padding == "0.0%") == (layout == "packed")


def test_the_padding_figures_are_those_of_the_mixture():
    """A file of short texts counts three times, of one of long texts a half is taken."""
    lengths, has_image = np.array([10] * 8 + [30] * 8), np.zeros(16, bool)
    for weights, in_order in ((None, 8 * 10 + 8 * 30), ([3.0, 0.5], 3 * 8 * 10 + 4 * 30)):
        sampler = GlobalBatchSampler(lengths, has_image, 4, source_sizes=[8, 8], weights=weights)
        packed = doctor.batch_figures(sampler)[3].split()
        assert int(packed[-4]) == in_order and packed[-3] == "0.0%"


# --- --exclude -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_excluded_is_not_there_at_all(data, samples, checked, tmp_path, capsys):
    bad, store = listed(data / "bad.jsonl"), samples.store
    left = RecordStore(store.data_path, [str(data / "images")] * 2, [str(data / "bad.jsonl")])
    kept = [index for index in range(len(store)) if index not in bad]
    assert [left[index] for index in range(len(left))] == [store[index] for index in kept]
    assert [left.describe(index) for index in range(len(left))] == [store.describe(index) for index in kept]
    assert [left.source(index) for index in range(len(left))] == [store.source(index) for index in kept]
    assert left.digest() != store.digest()
    again = flags(data, "--output", tmp_path / "bad.jsonl", "--exclude", data / "bad.jsonl")
    printed = []
    for weights in ([], ["--data_weights", "1", "2"]):
        assert doctor.main([*again, *weights]) == 0
        printed.append(capsys.readouterr().out)
        assert f"All {RECORDS - FAULTS} records can be trained on." in printed[-1]
    once, weighted = (int(re.search(r"--packing True +([\d,]+)", text)[1].replace(",", "")) for text in printed)
    assert once < weighted < 2 * once
    for wrong in (["1"], ["1", "0"]):
        with pytest.raises(SystemExit, match="2"):
            doctor.main([*again, "--data_weights", *wrong])


def test_lists_add_up_and_count_in_the_whole_data(tmp_path):
    """A list made while others were excluded names the same records."""
    (tmp_path / "a.json").write_text(json.dumps([record(number) for number in range(6)]))
    path = [str(tmp_path / "a.json")]
    doctor.log_skipped(RecordStore(path), [(1, "bad."), (3, "bad.")], tmp_path / "first.jsonl")
    fewer = RecordStore(path, exclude=[str(tmp_path / "first.jsonl")])
    doctor.log_skipped(fewer, [(2, "bad."), (3, "bad.")], tmp_path / "second.jsonl")
    store = RecordStore(path, exclude=[str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")])
    assert [store[index]["id"] for index in range(len(store))] == ["r0", "r2"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{}", "line 1: expected an object with 'index' and 'digest', as the doctor writes them, found '{}'."),
        ("what", "line 1: expected an object"),
        ("[1, 2]", "line 1: expected an object"),
        ('{"index": 0, "digest": "00"}', "line 1: record 0 of this data is not the one that was listed."),
        ('{"index": 99, "digest": "00"}', "line 1: record 99 of this data is not the one that was listed."),
        ('{"index": -1, "digest": "00"}', "line 1: record -1 of this data"),
        ('{"index": 1e999, "digest": "00"}', "line 1: expected an object"),
        ("[" * 100_000, "line 1: expected an object"),
        ("\0\xff", "line 1: expected an object"),
    ],
)
def test_a_list_of_other_data_is_refused_with_its_line(content, sentence, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record(0)]))
    (tmp_path / "list.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        RecordStore([str(tmp_path / "a.json")], exclude=[str(tmp_path / "list.jsonl")])
    assert f"--exclude {tmp_path}/list.jsonl, {sentence}" in str(error.value)


def test_a_list_of_everything_leaves_nothing_to_train_on(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record(0)]))
    path = [str(tmp_path / "a.json")]
    doctor.log_skipped(RecordStore(path), [(0, "bad.")], tmp_path / "list.jsonl")
    with pytest.raises(ValueError, match="No record is left of"):
        RecordStore(path, exclude=[str(tmp_path / "list.jsonl")])


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_data_is_never_overwritten(data, capsys):
    before = (data / "a.json").read_bytes()
    assert doctor.main(flags(data, "--output", data / "images" / ".." / "a.json")) == 2
    assert "would overwrite the data" in capsys.readouterr().err and (data / "a.json").read_bytes() == before


def test_what_cannot_be_read_at_all_is_one_sentence(data, tmp_path, capsys):
    (tmp_path / "a.json").write_text("[1, 2")
    words = flags(data, "--output", tmp_path / "bad.jsonl")
    for place, sentence in [
        (tmp_path / "a.json", "a.json is not a whole JSON array: "),
        (tmp_path / "none.json", "none.json (--data_path) does not exist."),
    ]:
        assert doctor.main([words[0], str(place), *words[2:]]) == 2
        assert sentence in capsys.readouterr().err


def test_the_flags_of_a_run_come_from_its_file_and_the_template_is_said(tmp_path, capsys):
    config, listed = tmp_path / "mine.yaml", str(tmp_path / "bad.jsonl")
    config.write_text(
        f"stage: 1\nmodel_name_or_path: {FIXTURES / 'llm'}\nvision_tower: {FIXTURES / 'clip'}\nlearning_rate: 1e-3\n"
        f"data_path: [{FIXTURES / 'data' / 'train_stage1.json'}]\nimage_folder: [{FIXTURES / 'data' / 'images'}]\n"
    )
    doctor.main(["--config", str(config), "--output", listed, "--num_workers", "1"])
    printed = capsys.readouterr().out
    assert "records, measured with the template plain (--version)." in printed
    assert "An epoch of global batches of 256, 32 samples a device:" in printed  # stage 1's
    config.write_text(config.read_text() + "version: v0\nglobal_batch_size: 6\n")
    words = ["--config", str(config), "--output", listed, "--num_workers", "1"]
    doctor.main([*words, "--per_device_train_batch_size", "1", "--version", "v1"])  # the command line wins
    printed = capsys.readouterr().out
    assert "measured with the template v1 " in printed and "batches of 6, 1 sample a device:" in printed


def test_only_bad_records_make_a_file_and_an_earlier_list_is_emptied(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record(number) for number in range(2)]))
    words = ["--data_path", str(tmp_path / "a.json"), "--model_name_or_path", str(FIXTURES / "llm"), "--num_workers"]
    words += ["1", "--tokens_per_image", "16", "--output", str(tmp_path / "lists" / "bad.jsonl")]
    assert doctor.main(words) == 0 and not (tmp_path / "lists").exists()
    (tmp_path / "a.json").write_text(json.dumps([record(0), {"id": "none"}]))
    assert doctor.main(words) == 1 and listed(tmp_path / "lists" / "bad.jsonl").keys() == {1}
    (tmp_path / "a.json").write_text(json.dumps([record(0)]))
    assert doctor.main(words) == 0 and not listed(tmp_path / "lists" / "bad.jsonl")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config", "none.yaml"], "--config none.yaml: No such file or directory."),
        (
            ["--model_name_or_path", "a/b", "--tokens_per_image", "4"],
            "--data_path is missing: give it here or in --config.",
        ),
        (
            ["--data_path", "a.json", "--tokens_per_image", "4"],
            "--model_name_or_path is missing: give it here or in --config.",
        ),
        (["--data_path", "a.json", "--model_name_or_path", "a/b"], "--vision_tower is missing, or --tokens_per_image"),
    ],
)
def test_what_neither_flags_nor_file_say_is_missed(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(words)
    assert sentence in capsys.readouterr().err
