"""What `datasets` and WebDataset write becomes records that the trainer takes, with every image as it was."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mini_llava.data.images import load_image
from mini_llava.data.records import RecordStore
from mini_llava.data.tokenization import check_record
from mini_llava.tools import convert
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
        check_record(record)
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
    file = write_parquet(tmp_path / "a.parquet", [{"messages": messages}, {"messages": messages[1:]}])
    [record] = converted(tmp_path / "kept", file, code=1)
    assert bad_entries(tmp_path / "kept")[0][1].startswith("turn 1 is a system prompt;")
    assert [r["conversations"] for r in converted(tmp_path / "out", file, "--drop_system")] == [chat("Hello", "Hi")] * 2
    assert record["conversations"] == chat("Hello", "Hi")


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
    monkeypatch.setattr(convert, "LARGEST_MEMBER", 10_000)
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
