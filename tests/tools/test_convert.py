"""What `datasets` and WebDataset write becomes records that the trainer takes, with every image as it was."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mini_llava.data.records import RecordStore
from mini_llava.guards.records import RecordCheck
from mini_llava.image_files import load_image
from mini_llava.tools import convert, data_forms
from tests.end_to_end import runs


def picture(kind: str, colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 80, 160)).save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG, WEBP = picture("JPEG", 10), picture("PNG", 20), picture("WEBP", 30)


def embedded(content: bytes) -> dict:
    """An image as `datasets` stores it."""
    return {"bytes": content, "path": "somewhere/else.jpg"}


def chat(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def save_to_disk(folder: Path, rows: list[dict]) -> Path:
    """The files of datasets.Dataset.save_to_disk: an Arrow stream and what points to it."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes | dict | tarfile.TarInfo]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def converted(output: Path, *arguments: str | Path, code: int = 0) -> list[dict]:
    """The records of a conversion, each of which the trainer accepts, with images that can be opened."""
    assert convert.main([*map(str, arguments), "--output", str(output)]) == code
    store = RecordStore([str(output / "records.jsonl")], [str(output / "images")])
    records = [store[index] for index in range(len(store))]
    for record in records:
        convert.check_record(record, RecordCheck())
        for name in images_of(record):
            load_image(output / "images", name)
    return records


def images_of(record: dict) -> list[str]:
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def contents(output: Path, record: dict) -> list[bytes]:
    return [(output / "images" / name).read_bytes() for name in images_of(record)]


def bad_entries(output: Path) -> list[tuple[str, str]]:
    lines = (output / "bad_entries.jsonl").read_text().splitlines()
    return [(entry["entry"], entry["reason"]) for entry in map(json.loads, lines)]


def error(capsys, *arguments: str | Path) -> str:
    assert convert.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_pairs_of_user_and_assistant_with_lists_of_images(tmp_path):
    rows = [
        {"images": [embedded(JPEG)], "texts": [{"user": "What?", "assistant": "A cat.", "source": "s"}] * 2},
        {"images": [embedded(PNG), embedded(WEBP)], "texts": [{"user": "Same?", "assistant": "No.", "source": "s"}]},
    ]
    one, two = converted(tmp_path / "out", write_parquet(tmp_path / "train.parquet", rows))
    assert one["conversations"] == chat("<image>\nWhat?", "A cat.", "What?", "A cat.")
    assert isinstance(one["image"], str) and contents(tmp_path / "out", one) == [JPEG]
    assert two["conversations"] == chat("<image>\n<image>\nSame?", "No.")
    assert contents(tmp_path / "out", two) == [PNG, WEBP]
    assert [name.rpartition(".")[2] for name in images_of(two)] == ["png", "webp"]


def test_llavas_own_turns_with_an_image_a_row_or_none(tmp_path):
    rows = [
        {"id": "a", "image": embedded(JPEG), "conversations": chat("<image>\nWhat?", "A cat.")},
        {"id": "b", "image": None, "conversations": chat("Hello", "Hi")},
    ]
    records = converted(tmp_path / "out", save_to_disk(tmp_path / "saved", rows))
    assert [record["id"] for record in records] == ["a", "b"]
    assert [record["conversations"] for record in records] == [row["conversations"] for row in rows]
    assert contents(tmp_path / "out", records[0]) == [JPEG] and "image" not in records[1]


def test_chat_messages_keep_their_images_in_place(tmp_path):
    question = [{"type": "text", "text": "Look:"}, {"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    [record] = converted(
        tmp_path / "out", write_parquet(tmp_path / "a.parquet", [{"messages": messages, "images": [embedded(PNG)]}])
    )
    assert record["conversations"] == chat("Look:\n<image>\nWhat?", "A cat.")
    assert isinstance(record["image"], list), "the mark of an image given by itself would move to the front"


def test_system_prompts_are_left_out_only_if_asked(tmp_path):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    late = [*messages[1:], *messages]
    rows = [{"messages": turns, "system": None} for turns in (messages, messages[1:], late)]
    file = write_parquet(tmp_path / "a.parquet", [*rows, {"messages": messages[1:], "system": "Be short."}])
    kept = converted(tmp_path / "kept", file, code=1)
    assert [record["conversations"][0] for record in kept[:2]] == [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hello"},
    ]
    assert [record.get("system") for record in kept] == [None, None, "Be short."]
    assert bad_entries(tmp_path / "kept")[0][1].startswith("turn 3 is a system prompt, which comes first:")
    dropped = converted(tmp_path / "out", file, "--drop_system")
    assert [record["conversations"] for record in dropped[:2]] == [chat("Hello", "Hi")] * 2
    assert dropped[3]["conversations"] == chat("Hello", "Hi") and "system" not in dropped[3]


def test_turns_that_datasets_stored_as_an_object_of_lists(tmp_path):
    rows = [{"conversations": {"from": ["human", "gpt"], "value": ["Hello", "Hi"]}}]
    [record] = converted(tmp_path / "out", write_parquet(tmp_path / "a.parquet", rows))
    assert record["conversations"] == chat("Hello", "Hi")


def test_images_that_the_data_only_name_come_from_a_folder_and_never_from_outside(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    rows = [{"image": name, "caption": "a cat"} for name in ("a.png", "../secret.png", str(tmp_path / "secret.png"))]
    file = write_parquet(tmp_path / "a.parquet", rows)
    [record] = converted(tmp_path / "out", file, "--image_root", tmp_path / "pictures", code=1)
    assert record["conversations"] == chat("<image>", "a cat") and contents(tmp_path / "out", record) == [PNG]
    assert [entry for entry, _ in bad_entries(tmp_path / "out")] == ["row 1", "row 2"]
    assert convert.main([str(file), "--output", str(tmp_path / "without")]) == 1
    assert all("say where by --image_root" in reason for _, reason in bad_entries(tmp_path / "without"))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_shards(mode, tmp_path):
    suffix = {"w": "tar", "w:gz": "tar.gz"}[mode]
    members = [
        ("0001.jpg", JPEG),
        ("0001.txt", b"a cat"),
        ("0002.json", {"caption": "two dogs", "url": "x", "image": None}),
        ("0002.a.png", PNG),
        ("0002.b.webp", WEBP),
        ("chats/0003.v2.json", {"id": 7, "conversations": chat("Hello", "Hi")}),
        ("chats/0003.cls", b"5"),
    ]
    records = converted(tmp_path / "out", write_tar(tmp_path / f"shard-000.{suffix}", members, mode))
    assert [record["id"] for record in records] == ["0001", "0002", "7"]
    assert [contents(tmp_path / "out", record) for record in records] == [[JPEG], [PNG, WEBP], []]
    assert records[1]["conversations"] == chat("<image>\n<image>", "two dogs")


def test_real_training_takes_what_was_converted(tmp_path):
    rows = [
        {"image": embedded(picture("PNG", colour)), "conversations": chat("<image>\nWhat?", "A colour.")}
        for colour in range(0, 200, 25)
    ]
    converted(tmp_path / "out", save_to_disk(tmp_path / "saved", rows))
    values = {"max_steps": 1, "warmup_ratio": 0, "global_batch_size": 8, "save_strategy": "no"}
    values |= {"data_path": tmp_path / "out" / "records.jsonl", "image_folder": tmp_path / "out" / "images"}
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    assert len(runs.log(tmp_path / "run")) == 1


# --- which files and columns -----------------------------------------------------------------------------------------

HELLO = [{"conversations": chat("Hello", "Hi")}]


def test_a_directory_of_several_splits_wants_one_named(tmp_path, capsys):
    for split, count in (("train", 2), ("test", 1)):
        save_to_disk(tmp_path / "saved" / split, HELLO * count)
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", HELLO * count)
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for source in ("saved", "hub"):
        said = error(capsys, tmp_path / source, "--output", tmp_path / "none")
        assert "say which split to convert by --split; it has" in said and "test" in said and "train" in said
        assert len(converted(tmp_path / f"{source} out", tmp_path / source, "--split", "train")) == 2
        assert "--split" in error(capsys, tmp_path / source, "--split", "dev", "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_column_of_another_name_is_named_and_an_unknown_one_lists_those_there(tmp_path, capsys):
    rows = [{"picture": embedded(PNG), "description": "a cat", "key": 3}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    said = error(capsys, file, "--output", tmp_path / "out")
    assert f"{file} cannot be converted: none of its columns, picture, description, key, is known to hold text" in said
    said = error(capsys, file, "--text_column", "descriptoin", "--output", tmp_path / "out")
    assert "it has no column 'descriptoin' (--text_column); its columns are picture, description, key." in said
    names = ["--text_column", "description", "--image_column", "picture", "--id_column", "key"]
    [record] = converted(tmp_path / "out", file, *names)
    assert record["id"] == "3" and record["conversations"] == chat("<image>", "a cat")


@pytest.mark.parametrize("source", ["nothing", "a.csv", "empty"])
def test_what_is_no_data_is_refused(source, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / source) in error(capsys, tmp_path / source, "--output", tmp_path / "out")


# --- what a name says -------------------------------------------------------------------------------------------------


def coloured(number: int) -> bytes:
    """A picture that is told from others by its bytes."""
    return picture("PNG", 20 * number)


def shard(tmp_path: Path, members: list[tuple[str, bytes | dict]]) -> Path:
    return write_tar(tmp_path / "a.tar", members)


@pytest.mark.parametrize(
    "key, ending", [("a", ".{}.png"), ("v1.5-01", ".{}.png"), ("a", ".left_{}.png"), ("7", ".0{}.png")]
)
def test_the_images_of_a_sample_come_by_number(key, ending, tmp_path):
    """An archive has them as its writer sorts names: 0, 1, 10, 2."""
    members = [(key + ending.format(number), coloured(number)) for number in sorted(range(11), key=str)]
    [record] = converted(tmp_path / "out", shard(tmp_path, [*members, (f"{key}.txt", b"colours")]))
    assert record["id"] == key
    assert contents(tmp_path / "out", record) == [coloured(number) for number in range(11)]


def test_images_without_numbers_keep_their_order_and_the_one_without_comes_before_the_numbered(tmp_path):
    members = [("a.before.png", 0), ("a.after.png", 1), ("b.1.png", 2), ("b.10.png", 3), ("b.2.png", 4), ("b.png", 5)]
    members = [(name, coloured(number)) for name, number in members]
    texts = [("a.txt", b"two"), ("b.txt", b"four")]
    one, two = converted(tmp_path / "out", shard(tmp_path, [*members[:2], texts[0], *members[2:], texts[1]]))
    assert contents(tmp_path / "out", one) == [coloured(0), coloured(1)]
    assert contents(tmp_path / "out", two) == [coloured(number) for number in (5, 2, 4, 3)]


@pytest.mark.parametrize(
    "keys",
    [("llava-v1.5-0001", "llava-v1.5-0002"), ("0", "0.5", "1"), ("a.v2", "a.v10"), ("x/v1.0", "y/v1.0"), ("A", "a")],
    ids=" ".join,
)
def test_keys_with_dots_stay_apart(keys, tmp_path):
    members = [
        member
        for number, key in enumerate(keys)
        for member in ((f"{key}.PNG", coloured(number)), (f"{key}.Txt", f"caption {number}".encode()))
    ]
    records = converted(tmp_path / "out", shard(tmp_path, members))
    assert [record["id"] for record in records] == [key.rpartition("/")[2] for key in keys]
    for number, record in enumerate(records):
        assert contents(tmp_path / "out", record) == [coloured(number)]
        assert record["conversations"] == chat("<image>", f"caption {number}")


def test_a_sample_without_its_text_or_image_takes_none_of_another(tmp_path):
    members = [("v1.5-01.png", PNG), ("v1.5-02.png", PNG), ("v1.5-02.txt", b"two"), ("v1.5-03.txt", b"three")]
    [record] = converted(tmp_path / "out", shard(tmp_path, members), code=1)
    assert record["id"] == "v1.5-02" and record["conversations"] == chat("<image>", "two")
    assert [name for name, _ in bad_entries(tmp_path / "out")] == ["v1.5-01", "v1.5-03"]


AMBIGUOUS = {
    "two texts": ([("a.png", PNG), ("a.txt", b"x"), ("a.long.txt", b"y")], "several texts ending with 'txt'"),
    "two jsons": (
        [("a.png", PNG), ("a.json", {"caption": "x"}), ("a.v2.json", {})],
        "several texts ending with 'json'",
    ),
    "a name twice": ([("a.png", PNG), ("a.txt", b"x"), ("a.txt", b"y")], "it has the member 'a.txt' twice"),
    "an image twice": ([("a.png", PNG), ("a.PNG", PNG), ("a.txt", b"x")], "it has the member 'a.png' twice"),
    "a text and another": (
        [("a.png", PNG), ("a.txt", b"x"), ("a.json", {"caption": "y"})],
        "its 'txt' and 'caption' of its 'json' are two texts: name the one to take by --text_column",
    ),
    "a text and a conversation": (
        [("a.json", {"conversations": chat("<image>", "x")}), ("a.png", PNG), ("a.txt", b"x")],
        "its 'txt' and 'conversations' of its 'json' are two texts",
    ),
    "apart": ([("a.png", PNG), ("b.png", PNG), ("a.txt", b"x"), ("b.txt", b"y")], "do not stand together"),
    "again": (
        [("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG), ("a.png", PNG), ("a.txt", b"y")],
        "not stand tog",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_sample_of_which_names_do_not_tell_what_is_its_own_is_listed(name, tmp_path):
    members, sentence = AMBIGUOUS[name]
    good = [("c.png", PNG), ("c.txt", b"c")]
    [record] = converted(tmp_path / "out", shard(tmp_path, [*members, *good]), code=1)
    assert record["id"] == "c"
    assert all(sentence in reason for key, reason in bad_entries(tmp_path / "out") if key == "a")
    assert "a" in dict(bad_entries(tmp_path / "out"))


def test_a_text_beside_a_json_of_the_same_or_of_no_text_is_taken(tmp_path):
    """The first is what img2dataset writes. Names that begin with a dot are passed over, as in WebDataset."""
    members = [
        *[("0.jpg", JPEG), ("0.json", {"caption": "a cat", "width": 40}), ("0.txt", b"a cat\n")],
        *[("._1.jpg", b"x"), ("1.jpg", JPEG), ("._1.txt", b"x"), ("1.json", {"width": 40}), ("1.txt", b"a dog")],
    ]
    records = converted(tmp_path / "out", shard(tmp_path, members))
    assert [record["conversations"][1]["value"] for record in records] == ["a cat", "a dog"]
    members[1] = ("0.json", {"caption": "another"})
    records = converted(tmp_path / "asked", shard(tmp_path, members), "--text_column", "txt")
    assert [record["conversations"][1]["value"].strip() for record in records] == ["a cat", "a dog"]


@pytest.mark.parametrize("ending", ["tar", "parquet", "arrow", "TAR", "Parquet"])
@pytest.mark.parametrize("pattern", ["shard-{}", "part {}/data-00000", "train-0000{}-of-00011"])
def test_the_files_of_a_directory_come_by_number(pattern, ending, tmp_path):
    for number in (10, 2, 0, 9):
        file = tmp_path / "data" / f"{pattern.format(number)}.{ending}"
        row = {"id": str(number), **HELLO[0]}
        if ending.lower() == "tar":
            write_tar(file, [(f"{number}.json", row)])
        else:
            write_parquet(file, [row])
            if ending == "arrow":
                save_to_disk(tmp_path / "saved", [row])
                (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
                (tmp_path / "saved" / "state.json").unlink()
                (tmp_path / "saved").rmdir()
    records = converted(tmp_path / "out", tmp_path / "data")
    assert [record["id"] for record in records] == ["0", "2", "9", "10"]


def test_numbered_image_columns_come_by_number_and_empty_ones_are_left_out(tmp_path, capsys):
    names = [f"image_{number}" for number in (10, 1, 2)]
    row = {name: embedded(coloured(number)) for number, name in enumerate(names)}
    row |= {"image_3": None, "image_size": 40, "conversations": chat("Which?", "The first.")}
    file = write_parquet(tmp_path / "a.parquet", [row])
    [record] = converted(tmp_path / "out", file)
    assert contents(tmp_path / "out", record) == [coloured(1), coloured(2), coloured(0)]
    assert record["conversations"][0]["value"] == "<image>\n<image>\n<image>\nWhich?"
    chosen = ["--image_column", "image_2", "--image_column", "image_10", "--leave_unread", "image_1"]
    [record] = converted(tmp_path / "chosen", file, *chosen)
    assert contents(tmp_path / "chosen", record) == [coloured(2), coloured(0)]
    both = write_parquet(tmp_path / "b.parquet", [row | {"image": embedded(PNG)}])
    said = error(capsys, both, "--output", tmp_path / "none")
    assert "it is not clear which images come first, those of image or image_1 or image_2" in said
    twice = write_parquet(tmp_path / "c.parquet", [row | {"image_01": embedded(PNG)}])
    assert "it is not clear which images come first" in error(capsys, twice, "--output", tmp_path / "none")


def test_columns_are_known_in_capitals_too_and_two_that_differ_in_case_alone_are_refused(tmp_path, capsys):
    row = {"ID": 7, "Image": embedded(PNG), "Caption": "a cat"}
    [record] = converted(tmp_path / "out", write_parquet(tmp_path / "a.parquet", [row]))
    assert record["id"] == "7" and contents(tmp_path / "out", record) == [PNG]
    for name, flag in (("image", "image"), ("caption", "text"), ("id", "id")):
        file = write_parquet(tmp_path / "b.parquet", [row | {name: None}])
        said = error(capsys, file, "--output", tmp_path / "none")
        assert f"differ in case alone: name the one that is meant by --{flag}_column." in said


def test_the_nearest_name_tells_the_split(tmp_path):
    for name in ("test-kit/train-0.parquet", "test-kit/val-0.parquet", "test-kit/more.parquet"):
        write_parquet(tmp_path / "data" / name, [{"id": name, **HELLO[0]}])
    for split, name in (("train", "train-0"), ("val", "val-0"), ("test", "more")):
        [record] = converted(tmp_path / split, tmp_path / "data", "--split", split)
        assert record["id"] == f"test-kit/{name}.parquet"


def test_files_whose_names_tell_of_no_split_or_of_two_are_not_added_to_one(tmp_path, capsys):
    for name in ("trainval-0", "test-0"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", HELLO)
    said = error(capsys, tmp_path / "data", "--output", tmp_path / "none")
    assert "has files of the split test and 1 whose names tell of none, the first is trainval-0.parquet" in said
    assert len(converted(tmp_path / "out", tmp_path / "data", "--split", "test")) == 1
    write_parquet(tmp_path / "data" / "train_test.parquet", HELLO)
    said = error(capsys, tmp_path / "data", "--output", tmp_path / "none")
    assert "train_test.parquet tells of the splits test and train: convert the files that you name." in said


def test_columns_that_look_like_media_or_a_prompt_are_not_dropped_silently(tmp_path):
    row = {"image": embedded(PNG), "conversations": chat("What?", "A cat."), "width": 40, "url": "x.org/a.png"}
    rows = [row, row | {"tools": "Be short."}, row | {"depth": {"bytes": PNG, "path": None}}]
    rows += [row | {"conversations": chat("<video>\nWhat?", "A cat.")}]
    file = write_parquet(tmp_path / "a.parquet", [{"tools": None, "depth": None} | row for row in rows])
    members = [("0.json", {"conversations": chat("Hi", "Yes"), "videos": ["v.mp4"]}), ("1.json", HELLO[0])]
    assert len(converted(tmp_path / "out", file, code=1)) == 1
    reasons = [reason for _, reason in bad_entries(tmp_path / "out")]
    for name, reason in zip(("its key 'tools'", "its key 'depth'", "the mark '<video>'"), reasons, strict=True):
        assert name in reason and "--leave_unread" in reason
    assert len(converted(tmp_path / "tar", shard(tmp_path, members), code=1)) == 1
    assert "its key 'videos' looks like media" in bad_entries(tmp_path / "tar")[0][1]
    assert (
        convert.main([str(file), "--leave_unread", "tools", "depth", "<video>", "--output", str(tmp_path / "b")]) == 0
    )
    assert (tmp_path / "b" / "records.jsonl").read_text().count("\n") == 4


# --- bad entries -----------------------------------------------------------------------------------------------------


def test_bad_entries_are_listed_and_counted_and_nothing_takes_their_place(tmp_path, capsys):
    good = {"images": [embedded(PNG)], "conversations": chat("<image>\nWhat?", "A cat.")}
    faults = {
        "row 1": ({"images": [embedded(PNG[:20])]}, "its image of 20 bytes cannot be read"),
        "row 2": ({"images": [embedded(b"")]}, "its image of 0 bytes cannot be read"),
        "row 3": ({"images": []}, "it has 1 <image> mark for 0 images"),
        "row 4": ({"conversations": chat("<image>", "A cat.", "And?", "<image>")}, "an answer contains <image>"),
        "row 5": ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is 'x' from 'narrator'"),
        "row 6": ({"conversations": chat("<image>\nWhat?")}, "no question has an answer"),
        "row 7": ({"conversations": []}, "its text is []; expected a text or a list of turns."),
        "row 8": ({"conversations": None}, "its text is None; expected"),
    }
    rows = [good, *(good | changes for changes, _ in faults.values()), good]
    records = converted(tmp_path / "out", write_parquet(tmp_path / "a.parquet", rows), code=1)
    assert [record["id"] for record in records] == ["a.parquet row 0", "a.parquet row 9"]
    found = dict(bad_entries(tmp_path / "out"))
    assert found.keys() == faults.keys()
    for entry, (_, sentence) in faults.items():
        assert found[entry].startswith(sentence), entry
    said = capsys.readouterr().out
    assert "8 entries became no record" in said and "2 records: its image of # bytes cannot be read" in said
    assert len(list((tmp_path / "out" / "images").rglob("*.*"))) == 2, "no image of a bad entry is left"


def test_an_archive_cannot_write_anywhere_nor_bring_links_or_claim_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_forms, "LARGEST_MEMBER", 10_000)
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("../../escaped.png", PNG),
        ("../../escaped.txt", b"a cat"),
        ("/absolute.png", PNG),
        ("/absolute.txt", b"a cat"),
        ("link.png", link),
        ("link.txt", b"a cat"),
        ("large.png", bytes(20_000)),
        ("large.txt", b"a cat"),
        ("list.json", b"[1]"),
        ("torn.json", b'{"caption"'),
        ("lonely.txt", b"a cat"),
    ]
    output = tmp_path / "deep" / "er" / "out"
    records = converted(output, write_tar(tmp_path / "a.tar", members), code=1)
    assert [record["id"] for record in records] == ["escaped", "absolute"]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["0000000.png", "0000001.png"]
    assert dict(bad_entries(output)).keys() == {"link", "large", "list", "torn", "lonely"}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet", "arrow"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_torn_file_is_refused_and_named(kind, share, tmp_path, capsys):
    whole = {
        "tar": lambda: write_tar(tmp_path / "a.tar", [(f"{n}.json", HELLO[0]) for n in range(20)]),
        "tar.gz": lambda: write_tar(tmp_path / "a.tar.gz", [(f"{n}.json", HELLO[0]) for n in range(20)], "w:gz"),
        "parquet": lambda: write_parquet(tmp_path / "a.parquet", HELLO * 20),
        "arrow": lambda: save_to_disk(tmp_path / "saved", HELLO * 20) / "data-00000-of-00001.arrow",
    }[kind]()
    content = whole.read_bytes()
    if kind == "tar":  # what is behind the last member is padding
        content = content[: 20 * 1024]
    torn = tmp_path / f"torn.{kind}"
    torn.write_bytes(content[: int(len(content) * share)])
    assert f"{torn} cannot be converted: " in error(capsys, torn, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "records.jsonl").exists()


# --- stopping and going on -------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_killed_conversion_goes_on_with_the_file_it_was_in(killed_in, tmp_path, monkeypatch):
    for number in range(3):
        rows = [{"image": embedded(picture("PNG", 10 * number + row)), "caption": "x"} for row in range(4)]
        write_parquet(tmp_path / "data" / f"{number}.parquet", [*rows, {"image": None, "caption": "lost"}])
    whole = converted(tmp_path / "whole", tmp_path / "data", code=1)
    assert len(whole) == 12 and len(bad_entries(tmp_path / "whole")) == 3

    files = []

    def killed(number, *_):
        files.append(number)
        if len(files) == killed_in:  # between the images and the word that they are there
            monkeypatch.setattr("os.sync", killed_now)
        return convert_file(number, *_)

    def killed_now():
        raise KeyboardInterrupt

    convert_file = convert.convert_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "convert_file", killed)
        convert.main([str(tmp_path / "data"), "--output", str(tmp_path / "out")])
    monkeypatch.undo()
    assert not (tmp_path / "out" / "records.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert converted(tmp_path / "out", tmp_path / "data", code=1) == whole
    ours = {name: content for name, content in tree(tmp_path / "out").items() if name != "conversion.json"}
    assert ours == {name: content for name, content in tree(tmp_path / "whole").items() if name != "conversion.json"}
    again = [path for path, changed in before.items() if path.stat().st_mtime_ns != changed]
    assert len(again) == 4, "only the images of the file that was not finished"


def test_a_finished_conversion_is_not_done_again_and_another_one_not_mixed_in(tmp_path, capsys):
    file = write_parquet(tmp_path / "a.parquet", HELLO)
    first = converted(tmp_path / "out", file)
    before = (tmp_path / "out" / "records.jsonl").stat().st_mtime_ns
    assert converted(tmp_path / "out", file) == first
    assert (tmp_path / "out" / "records.jsonl").stat().st_mtime_ns == before
    other = write_parquet(tmp_path / "b.parquet", HELLO)
    for words in ([other], [file, "--drop_system"]):
        said = error(capsys, *words, "--output", tmp_path / "out")
        assert "holds a conversion of other files or with other flags" in said
    assert "no conversion of ours" in error(capsys, file, "--output", tmp_path)
