"""What other people's packages wrote, of every form that convert reads: see data_forms/README.md."""

import base64
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from mini_llava.tools import convert
from tests.end_to_end import runs
from tests.tools.data_forms.make import chat, picture
from tests.tools.test_convert import (
    HELLO,
    JPEG,
    PNG,
    bad_entries,
    contents,
    converted,
    embedded,
    error,
    save_to_disk,
    write_parquet,
    write_tar,
)
from tests.tools.test_convert import chat as turns

FORMS = Path(__file__).parent / "data_forms"
SHARDS = ("streaming", "litdata")
INSTALLED = [name for name in SHARDS if importlib.util.find_spec(name)]
read_by = {name: pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed") for name in SHARDS}


def passed_over(output: Path) -> dict[str, int]:
    lines = map(json.loads, (output / "passed_over.jsonl").read_text().splitlines())
    return {line["what"]: line["count"] for line in lines}


# --- rows of this year's data sets -----------------------------------------------------------------------------------


def test_finevisions_rows_with_rounds_by_their_ratings(tmp_path, capsys):
    source = FORMS / "datasets" / "finevision"
    records = converted(tmp_path / "all", source)
    assert [record["conversations"] for record in records] == [
        turns("<image>\nWhat?", f"Ball {number}.", "Sure?", "Yes.") for number in range(3)
    ]
    assert [contents(tmp_path / "all", record) for record in records] == [[picture(number)] for number in range(3)]
    assert passed_over(tmp_path / "all")["column source"] == 3
    assert "Not in the records: column " in capsys.readouterr().out

    # Ratings of relevance: 5 and 2, 4 and 5, 1 and 1.
    records = converted(tmp_path / "rated", source, "--min_rating", "4", code=1)
    assert [record["conversations"] for record in records] == [
        turns("<image>\nWhat?", "Ball 0."),
        turns("<image>\nWhat?", "Ball 1.", "Sure?", "Yes."),
    ]
    assert passed_over(tmp_path / "rated")["round with a rating below 4"] == 1
    assert bad_entries(tmp_path / "rated") == [("row 2", "each of its rounds has a rating below 4 (--min_rating).")]


def test_a_rating_that_is_asked_for_and_not_there_is_named(tmp_path):
    rows = [{**HELLO[0], "relevance_ratings": values} for values in ([5], [5, 5], None, [None])]
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert len(converted(tmp_path / "out", file, "--min_rating", "5", code=1)) == 2
    assert [reason for _, reason in bad_entries(tmp_path / "out")] == [
        "it has 1 rounds and [2] ratings for --min_rating to compare.",
        "it has 1 rounds and no ratings for --min_rating to compare.",
    ]


def test_the_cauldrons_and_llava_onevisions_rows(tmp_path):
    one, two = converted(tmp_path / "cauldron", FORMS / "datasets" / "cauldron.parquet")
    assert one["conversations"] == turns("<image>\nWhat?", "A ball.")
    assert two["conversations"] == turns("<image>\n<image>\nWhat?", "A ball.")
    assert contents(tmp_path / "cauldron", two) == [picture(1), picture(1)]
    one, two = converted(tmp_path / "onevision", FORMS / "datasets" / "onevision.parquet")
    assert one["id"] == "a.png" and one["conversations"] == chat(0)
    assert contents(tmp_path / "onevision", one) == [picture(0)]
    assert "image" not in two and passed_over(tmp_path / "onevision") == {"column data_source": 2}


POINTED = ['<point x="10.5" y="20.2" alt="ball">ball</point>']
POINTED += ['<points x1="3.0" y1="7.1" x2="90.0" y2="5.0" alt="ball">ball</points>', "There are none."]


def test_rows_that_only_have_an_address_on_the_web_say_how_to_get_their_images(tmp_path, capsys):
    assert convert.main([str(FORMS / "datasets" / "pixmo_points.parquet"), "--output", str(tmp_path / "out")]) == 1
    [(_, reason)] = bad_entries(tmp_path / "out")
    assert reason.startswith(
        "its image is an address on the web, 'https://images.invalid/a.png', from which nothing is"
    )
    assert "img2dataset writes shards that are read here" in reason
    # As images of a column, and beside a question that would be trained without what it is about.
    rows = [{"image": "http://images.invalid/a.png", "caption": "a ball"}]
    web = write_parquet(tmp_path / "a.parquet", rows)
    asked = [{"image_url": "https://images.invalid/a.png", "question": "What?", "answer": "A ball."}]
    for number, file in enumerate((web, write_parquet(tmp_path / "b.parquet", asked))):
        assert convert.main([str(file), "--output", str(tmp_path / f"{number}")]) == 1
        assert "an address on the web" in bad_entries(tmp_path / f"{number}")[0][1]
    unread = ["--leave_unread", "image_url"]
    assert len(converted(tmp_path / "text", tmp_path / "b.parquet", *unread)) == 1
    named = write_parquet(tmp_path / "c.parquet", [asked[0] | {"image_url": "a.png"}])
    assert convert.main([str(named), "--output", str(tmp_path / "named")]) == 1
    assert "'image_url' says where its image is: name it by --image_column" in bad_entries(tmp_path / "named")[0][1]


def test_what_img2dataset_fetched_of_pixmo_points_is_trained_as_molmo_writes_points(tmp_path):
    records = converted(tmp_path / "out", FORMS / "img2dataset")
    assert [record["conversations"] for record in records] == [
        turns("<image>\nPoint to ball.", answer) for answer in POINTED[:2]
    ], "the table beside the shard has the rows without images"
    assert [contents(tmp_path / "out", record) for record in records] == [[picture(n, "JPEG")] for n in range(2)]


def test_pixmos_rows_as_molmos_own_scripts_save_them(tmp_path):
    """Grouped by image, which is a file; questions and answers are lists too, or an object of lists."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a").write_bytes(PNG)
    points = [[{"x": 10.5, "y": 20.25}], [{"x": 90.0, "y": 5.0}, {"x": 3.0, "y": 7.06}], []]
    rows = [{"image": "a", "image_url": "https://x", "points": points, "label": ["ball"] * 3, "count": [1, 2, 0]}]
    root = ["--image_root", tmp_path / "images"]
    [record] = converted(tmp_path / "points", save_to_disk(tmp_path / "saved", rows), *root)
    assert [turn["value"] for turn in record["conversations"][1::2]] == POINTED
    asked = {"question": ["What?", "Sure?"], "answer": ["A ball.", "Yes."]}
    for name, row in (("lists", {"image": "a", **asked}), ("docs", {"image": embedded(PNG), "questions": asked})):
        [record] = converted(tmp_path / name, write_parquet(tmp_path / f"{name}.parquet", [row]), *root)
        assert record["conversations"] == turns("<image>\nWhat?", "A ball.", "Sure?", "Yes.")


def test_points_that_are_none_are_listed(tmp_path):
    row = {"image": embedded(PNG), "points": [{"x": 1.0, "y": 2.0}], "label": "ball"}
    faults = {
        "outside the image: PixMo's are in percent, from 0 to 100": {"points": [{"x": 640.0, "y": 2.0}]},
        "expected a list of objects with x and y": {"points": [{"x": None, "y": 2.0}]},
        "expected the name of what its points show": {"label": ""},
        "it has points and no image": {"image": None},
    }
    file = write_parquet(tmp_path / "a.parquet", [row, *(row | changes for changes in faults.values())])
    assert len(converted(tmp_path / "out", file, code=1)) == 1
    for sentence, (_, reason) in zip(faults, bad_entries(tmp_path / "out"), strict=True):
        assert sentence in reason


# --- shards ----------------------------------------------------------------------------------------------------------


def test_energons_shards_by_its_own_splits(tmp_path, capsys):
    source = FORMS / "energon"
    said = error(capsys, source, "--output", tmp_path / "none")
    assert "say which split to convert by --split; it has train, val" in said
    for split, numbers in (("train", (0, 1)), ("val", (2, 3))):
        records = converted(tmp_path / split, source, "--split", split)
        assert [record["conversations"] for record in records] == [chat(number) for number in numbers]
        assert [contents(tmp_path / split, record) for record in records] == [[picture(n, "JPEG")] for n in numbers]
    shutil.copytree(source, tmp_path / "copy")
    file = tmp_path / "copy" / ".nv-meta" / "split.yaml"
    file.write_text("split_parts:\n  train: ['shard_{0000..0001}.tar']\nexclude: [shard_0000.tar]\n")
    assert len(converted(tmp_path / "excluded", tmp_path / "copy")) == 2
    file.write_text("split_parts:\n  train: ['shard_{0000..0001}.tar']\nexclude: [shard_0000.tar/sample_0000]\n")
    said = error(capsys, tmp_path / "copy", "--output", tmp_path / "none")
    assert "excludes shard_0000.tar/sample_0000, which is no file of" in said
    file.write_text("split_parts:\n  train: [shard_0000.tar, shard_0009.tar]\n")
    assert "lists shard_0009.tar, which is not in" in error(capsys, tmp_path / "copy", "--output", tmp_path / "none")
    file.write_text("split_parts: [")
    assert f"{file} cannot be read" in error(capsys, tmp_path / "copy", "--output", tmp_path / "none")


def test_a_samples_other_members_are_counted_and_its_videos_refused(tmp_path):
    members = [("a.jpg", JPEG), ("a.txt", b"a cat"), ("a.cls", b"5"), ("b.mp4", b"x"), ("b.json", HELLO[0])]
    shard = write_tar(tmp_path / "a.tar", members)
    assert len(converted(tmp_path / "out", shard, code=1)) == 1
    assert passed_over(tmp_path / "out") == {"member .cls": 1}
    assert "its key 'video' looks like media and is not read" in bad_entries(tmp_path / "out")[0][1]
    assert len(converted(tmp_path / "told", shard, "--leave_unread", "video")) == 2


@read_by["streaming"]
def test_shards_of_mosaicml_streaming(tmp_path, capsys):
    for name in ("train", "packed"):
        records = converted(tmp_path / name, FORMS / "mds" / name)
        assert [record["conversations"] for record in records] == [chat(number) for number in range(3)]
        images = [contents(tmp_path / name, record) for record in records]
        # The writer itself saves a JPEG again that was not opened from a file.
        shards = b"".join(path.read_bytes() for path in (FORMS / "mds" / "train").glob("*.mds"))
        assert all(len(found) == 1 and found[0] in shards for found in images)
    [record] = converted(tmp_path / "several", FORMS / "mds" / "several")
    assert record["conversations"] == turns("<image>\n<image>", "two balls")
    assert contents(tmp_path / "several", record) == [picture(0), picture(1)]
    assert passed_over(tmp_path / "several") == {"column n": 1}

    shutil.copytree(FORMS / "mds" / "train", tmp_path / "copy")
    index = tmp_path / "copy" / "index.json"
    text = index.read_text()
    index.write_text(text.replace('"jpeg"', '"pkl"'))
    assert "contains an unsafe type: pkl" in error(capsys, tmp_path / "copy", "--output", tmp_path / "none")
    index.write_text(text)
    shard = tmp_path / "copy" / "shard.00001.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:300])
    assert f"{shard} cannot be converted: " in error(capsys, tmp_path / "copy", "--output", tmp_path / "torn")
    index.write_text(text.replace("shard.00001", "shard.00007"))
    said = error(capsys, tmp_path / "copy" / "shard.00001.mds", "--output", tmp_path / "none2")
    assert "index.json does not list it" in said
    index.unlink()
    said = error(capsys, tmp_path / "copy" / "shard.00001.mds", "--output", tmp_path / "none3")
    assert "its index.json is not beside it" in said


@read_by["litdata"]
def test_chunks_of_litdata(tmp_path, capsys):
    before = sorted((FORMS / "litdata").rglob("*"))
    for name in ("jpeg", "bytes"):
        records = converted(tmp_path / name, FORMS / "litdata" / name)
        assert [record["conversations"] for record in records] == [chat(number) for number in range(3)]
        assert [record["id"] for record in records] == ["0", "1", "2"]
        images = [contents(tmp_path / name, record) for record in records]
        # litdata itself saves a JPEG again that was not opened from a file.
        chunks = b"".join(path.read_bytes() for path in (FORMS / "litdata" / name).glob("*.bin"))
        assert all(len(found) == 1 and found[0] in chunks for found in images)
        assert images == [[picture(n)] for n in range(3)] or name == "jpeg"
    records = converted(tmp_path / "pixels", FORMS / "litdata" / "pixels")
    assert [record["conversations"][1]["value"] for record in records] == [f"ball {number}" for number in range(3)]
    assert sorted((FORMS / "litdata").rglob("*")) == before
    shutil.copytree(FORMS / "litdata" / "jpeg", tmp_path / "copy")
    index = tmp_path / "copy" / "index.json"
    text = index.read_text()
    index.write_text(text.replace('"config"', '"settings"'))
    assert "chunk-0-0.bin cannot be converted: " in error(capsys, tmp_path / "copy", "--output", tmp_path / "torn")
    index.write_text(text.replace('"jpeg"', '"pickle"'))
    assert "it has pickled fields" in error(capsys, tmp_path / "copy", "--output", tmp_path / "none")


@pytest.mark.parametrize("name, source", [("streaming", "mds/train"), ("litdata", "litdata/jpeg")])
def test_without_the_package_that_reads_a_form_it_is_named(name, source, tmp_path, capsys, monkeypatch):
    for module in {name, *(module for module in sys.modules if module.startswith(f"{name}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    package = {"streaming": "mosaicml-streaming"}.get(name, name)
    said = error(capsys, FORMS / source, "--output", tmp_path / "out")
    assert f"needs the package {package}: pip install {package}." in said


def test_a_packed_shard_that_was_unpacked_is_read_once(tmp_path):
    for name in ("shard.00000.mds", "shard.00000.mds.zstd", "shard.00001.mds.zstd"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in convert.input_files(tmp_path, None)] == ["shard.00000.mds", "shard.00001.mds.zstd"]


# --- chats in JSON ---------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*parts: dict | str) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A ball."}]}


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, content in (("a.png", PNG), ("b.jpg", JPEG)):
        (tmp_path / "pictures" / name).write_bytes(content)
    return tmp_path / "pictures"


WHAT = {"type": "text", "text": "What?"}


def test_an_image_in_a_message_is_a_name_a_file_url_or_base64(tmp_path, pictures):
    encoded = base64.b64encode(PNG).decode()
    forms = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": str(pictures / "a.png")},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": f"file://{pictures}/%61.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{encoded}"},
        {"type": "image", "image": f"data:image;base64,{encoded}"},
        {"type": "image", "image": encoded},
        {"image": "a.png"},
    ]
    file = write_lines(tmp_path / "a.jsonl", [asked(form, WHAT) for form in forms])
    records = converted(tmp_path / "out", file, "--image_root", pictures)
    assert len(records) == len(forms)
    for record in records:
        assert record["conversations"] == turns("<image>\nWhat?", "A ball.")
        assert contents(tmp_path / "out", record) == [PNG] and isinstance(record["image"], list)


def test_images_of_parts_and_of_the_column_come_in_the_order_of_their_marks(tmp_path, pictures):
    mark, own = {"type": "image"}, {"type": "image", "image": "b.jpg"}
    rows = [
        asked(mark, own, WHAT) | {"images": ["a.png"]},
        asked(own, mark, {"type": "text", "text": "Or <image>?"}) | {"images": ["a.png", "b.jpg"]},
        asked(own, WHAT) | {"images": ["b.jpg"]},  # some write them twice
        asked({"type": "image", "index": 0}, WHAT) | {"images": ["a.png"]},
        {"messages": asked("<image>What?")["messages"], "images": [{"url": "a.png"}]},
        asked({"type": "image", "index": 1}, {"type": "image", "index": 0}) | {"images": ["a.png", "b.jpg"]},
        asked(own, WHAT) | {"images": ["a.png"]},
        asked(mark, own) | {"images": []},
    ]
    records = converted(tmp_path / "out", write_lines(tmp_path / "a.jsonl", rows), "--image_root", pictures, code=1)
    assert [contents(tmp_path / "out", record) for record in records] == [
        [PNG, JPEG],
        [JPEG, PNG, JPEG],
        [JPEG],
        [PNG],
        [PNG],
    ]
    assert records[1]["conversations"][0]["value"] == "<image>\n<image>\nOr <image>?"
    assert [reason for _, reason in bad_entries(tmp_path / "out")] == [
        "turn 1 has the image 1 where 0 comes next.",
        "it has 1 <image> mark for 2 images; each image needs exactly one mark in a question.",
        "it has 2 <image> marks for 1 image; each image needs exactly one mark in a question.",
    ]


def test_roles_numbers_and_faults_of_chats(tmp_path):
    rows = [
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]},
        {"messages": [{"role": "developer", "content": "Be short."}, *asked("Hi")["messages"]]},
        {"conversations": turns("How many?", 3)},
        {"conversations": turns("How long?", 2.5)},
        {"conversations": json.dumps(turns("Hi", "Yes"))},
        {"question": "How many?", "answer": 3},
        {"conversations": turns("Is it?", True)},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "observation", "value": "1"}]},
        asked({"type": "video", "video": "v.mp4"}),
        asked({"type": "image_url", "image_url": {"url": "https://images.invalid/a.png"}}),
        asked({"type": "image", "image": "data:image/png;base64,?"}),
        asked({"type": "image", "image": "data:image/png;base64,AAAA"}),
    ]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(rows, indent=1))
    records = converted(tmp_path / "out", file, code=1)
    assert [record["conversations"] for record in records] == [
        turns("Hi", "Yes"),
        [{"from": "system", "value": "Be short."}, *turns("Hi", "A ball.")],
        turns("How many?", "3"),
        turns("How long?", "2.5"),
        turns("Hi", "Yes"),
        turns("How many?", "3"),
    ]
    assert [record["id"] for record in records] == [f"chats.json record {number}" for number in range(6)]
    sentences = ["not a text from a known role", "'1' from 'observation'", "neither a text nor an image"]
    sentences += ["an address on the web", "is not base64", "of 3 bytes cannot be read"]
    for sentence, (_, reason) in zip(sentences, bad_entries(tmp_path / "out"), strict=True):
        assert sentence in reason


def test_what_a_message_has_beside_its_text_is_read_or_refused(tmp_path):
    thinking = [{"role": "user", "content": "Hi"}]
    thinking += [{"role": "assistant", "content": "Yes", "reasoning_content": "Let me see.\n", "tool_calls": []}]
    rows = [{"messages": thinking}]
    names = ["images", "image", "tool_calls", "audio"]
    for name in names:
        rows.append({"messages": [asked("Hi")["messages"][0] | {name: ["a.png"]}, *asked("Hi")["messages"][1:]]})
    file = write_lines(tmp_path / "a.jsonl", rows)
    [record] = converted(tmp_path / "out", file, code=1)
    assert record["conversations"] == turns("Hi", "<think>\nLet me see.\n</think>\n\nYes")
    for name, (_, reason) in zip(
        ("images", "image", "tool_calls", "audio"), bad_entries(tmp_path / "out"), strict=True
    ):
        assert reason.startswith(f"turn 1 has '{name}' beside its text, where it is not read")
    assert len(converted(tmp_path / "told", file, "--leave_unread", *names)) == 5


def test_json_of_a_directory_is_read_where_no_other_data_is(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for number in (10, 2):
        write_lines(tmp_path / "data" / f"{number}.jsonl", [{"id": number, **HELLO[0]}])
    assert [record["id"] for record in converted(tmp_path / "out", tmp_path / "data")] == ["2", "10"]
    write_parquet(tmp_path / "data" / "a.parquet", [{"id": "a", **HELLO[0]}])
    assert [record["id"] for record in converted(tmp_path / "both", tmp_path / "data")] == ["a"]
    torn = tmp_path / "torn.json"
    torn.write_text('[{"conversations": [')
    assert f"{torn} cannot be converted: {torn} is not a whole JSON array" in error(
        capsys, torn, "--output", tmp_path / "none"
    )
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(HELLO[0]) + '\n{"conversations": \n')
    assert len(converted(tmp_path / "lines", lines, code=1)) == 1
    assert bad_entries(tmp_path / "lines")[0][1].startswith("it is not JSON: ")


def test_a_chat_in_json_is_refused_by_the_trainer_with_the_command_that_makes_it_records(tmp_path, pictures):
    rows = [asked({"type": "image", "image": "a.png"}, WHAT)] * 4
    file = write_lines(tmp_path / "chat.jsonl", rows)
    values = {"max_steps": 1, "warmup_ratio": 0, "global_batch_size": 4, "save_strategy": "no"}
    for data, form in ((file, "no list 'conversations' of turns"), (None, "known roles are 'human' and 'gpt'")):
        users = [{"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]}]
        data = data or write_lines(tmp_path / "users.jsonl", users)
        with pytest.raises(ValueError, match=rf"{form}[\s\S]* python -m mini_llava\.tools\.convert converts"):
            runs.train_here(
                runs.flags_of(2, tmp_path / "refused", {**values, "data_path": data, "image_folder": pictures})
            )
    converted(tmp_path / "out", file, "--image_root", pictures)
    values |= {"data_path": tmp_path / "out" / "records.jsonl", "image_folder": tmp_path / "out" / "images"}
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    assert len(runs.log(tmp_path / "run")) == 1
