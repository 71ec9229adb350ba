"""Makes records and an image folder of other layouts: `python -m mini_llava.tools.convert SOURCE ... --output FOLDER`.

Reads what Hugging Face `datasets` and WebDataset write (Arrow, Parquet, tar), so that the trainer knows one format.
Images are written byte for byte under names of our own: no name in an archive leads anywhere. Each input file is
converted whole or again, so that a killed conversion goes on. Exit code: 0 if every entry became a record, 1 if some
did not and are listed, 2 if flags or files cannot be read.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
import tarfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..data.templates import IMAGE_MARK, BadRecord, get_template
from ..data.tokenization import read_conversation, shorten
from ..files import atomic_write
from ..guards.records import RecordCheck, kind_of_name
from ..image_files import FORMATS, BadImage, image_path
from ..watch.json_lines import read_lines
from ..watch.skipped import count_reasons
from ..words import counted

TEXT_COLUMNS = ("conversations", "messages", "texts", "caption", "text", "txt")
IMAGE_COLUMNS = ("images", "image")
NUMBERED_IMAGE = re.compile(r"image[_-]?\d+", re.IGNORECASE)  # image_1, image_2, ...: an entry's first, second, ...
ID_COLUMNS = ("id", "__key__")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

TABLES, ARCHIVES = (".parquet", ".arrow"), (".tar", ".tar.gz", ".tgz")
SPLIT = re.compile(r"(?<![a-z])(train|training|validation|valid|val|dev|test|testing)(?![a-z])")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}  # of other formats their name in small letters
IMAGE_KINDS = tuple(ending[1:] for ending, name in Image.registered_extensions().items() if name in FORMATS)
TEXT_KINDS = ("txt", "json")
LARGEST_MEMBER = 2**28  # bytes of a tar member; an archive may claim any size for one


class BadEntry(ValueError):
    """One sentence about why an entry becomes no record; whoever knows it adds the file and the entry."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the text, the images and the id of an entry; None, (): chosen, or there is none.

    image: several where each holds one image of an entry, in their order.
    """

    text: str | None = None
    image: tuple[str, ...] = ()
    id: str | None = None

    @property
    def all(self) -> list[str]:
        return [name for name in (self.text, *self.image, self.id) if name]


def choose_columns(names: Sequence[str], asked: Columns) -> Columns:
    """Return the columns asked for, and for the others the first known one, whatever its case.

    Without a known image column, `image_1`, `image_2`, ... hold the images, by their numbers. Raises ValueError, naming
    the columns that are there, if one is not there or if it is not clear which one is meant.
    """
    for flag, name in (("text", asked.text), *(("image", name) for name in asked.image), ("id", asked.id)):
        if name is not None and name not in names:
            raise ValueError(f"it has no column {name!r} (--{flag}_column); its columns are {', '.join(names)}.")
    text = asked.text or _known(names, TEXT_COLUMNS, "text")
    if text is None:
        raise ValueError(
            f"none of its columns, {', '.join(names)}, is known to hold text (known: {', '.join(TEXT_COLUMNS)}): name "
            f"one by --text_column."
        )
    image = asked.image
    if not image:
        known = _known(names, IMAGE_COLUMNS, "image")
        numbered = sorted((name for name in names if NUMBERED_IMAGE.fullmatch(name)), key=by_number)
        if (known and numbered) or len(numbered) != len({re.search(r"\d+", name)[0].lstrip("0") for name in numbered}):
            raise ValueError(
                f"it is not clear which images come first, those of {' or '.join(filter(None, (known, *numbered)))}: "
                f"name the columns in their order by --image_column."
            )
        image = (known,) if known else tuple(numbered)
    return Columns(text, image, asked.id or _known(names, ID_COLUMNS, "id"))


def _known(names: Sequence[str], known: Sequence[str], flag: str) -> str | None:
    """The column that comes first among the known ones. Raises ValueError if two differ in case alone."""
    for wanted in known:
        found = [name for name in names if name.lower() == wanted]
        if len(found) > 1:
            raise ValueError(
                f"its columns {' and '.join(found)} differ in case alone: name the one that is meant by "
                f"--{flag}_column."
            )
        if found:
            return found[0]
    return None


def by_number(name: str) -> tuple:
    """A key that sorts names as people count: `shard-2` before `shard-10`, in capitals or not."""
    parts = re.split(r"(\d+)", name.casefold())
    parts[1::2] = [(len(number), number) for number in (part.lstrip("0") for part in parts[1::2])]
    return parts, name


# --- input files -----------------------------------------------------------------------------------------------------


def input_files(source: Path, split: str | None) -> list[Path]:
    """The files of a source: itself, or those of a directory. Raises ValueError where it is not clear which."""
    if split and (source.is_file() or (source / "state.json").is_file()):
        raise ValueError(f"{source} has no splits, so --split {split} says nothing about it.")
    if _is_data(source):
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source} is neither a directory nor a file ending with {', '.join(TABLES + ARCHIVES)}.")
    if (source / "dataset_dict.json").is_file():  # of datasets.DatasetDict.save_to_disk: a folder for each split
        splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return input_files(source / _only(source, splits, split), None)
    if (source / "state.json").is_file():  # of datasets.Dataset.save_to_disk
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise ValueError(f"{source} was saved with a selection of rows beside it: save it with newer datasets.")
        return [source / file["filename"] for file in state["_data_files"]]
    files = [path.relative_to(source) for path in source.rglob("*") if _is_data(path)]
    files.sort(key=lambda path: [by_number(part) for part in path.parts])
    splits = {path: _split_of(path) for path in files}
    names = sorted({name for name in splits.values() if name})
    if split or len(set(splits.values())) > 1:
        # Files of no split may be anything beside the train split: their own name for it, or another data set.
        unnamed = [] if split else [str(path) for path in files if splits[path] is None]
        if unnamed and len(names) == 1:
            raise ValueError(
                f"{source} has files of the split {names[0]} and {len(unnamed)} whose names tell of none, the first is "
                f"{unnamed[0]}: say which split to convert by --split, or name the files."
            )
        wanted = _only(source, names, split)
        files = [path for path in files if splits[path] == wanted]
    if not files:
        raise ValueError(f"{source} holds no file ending with {', '.join(TABLES + ARCHIVES)}.")
    return [source / path for path in files]


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(TABLES + ARCHIVES) and path.is_file()


def _split_of(path: Path) -> str | None:
    """The split that a path tells of: its file's name if that does, else the nearest folder's."""
    for part in reversed(path.parts):
        found = sorted(set(SPLIT.findall(part.lower())))
        if len(found) > 1:
            raise ValueError(f"{path} tells of the splits {' and '.join(found)}: convert the files that you name.")
        if found:
            return found[0]
    return None


def _only(source: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits:
        return split
    found = f"it has {', '.join(splits)}" if splits else "no name there tells of a split"
    raise ValueError(f"{source}: say which split to convert by --split; {found}.")


def read_entries(path: Path, asked: Columns) -> Iterator[tuple[str, dict | BadEntry]]:
    """Name and columns of each entry of a file, or what is wrong with it. Raises ValueError if the file is torn."""
    reader = read_archive if path.name.lower().endswith(ARCHIVES) else read_table
    try:
        yield from reader(path, asked)
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error


def read_table(path: Path, asked: Columns) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet file, of an Arrow stream, which is what `save_to_disk` writes, or of an Arrow file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow: pip install pyarrow.") from error
    with pyarrow.memory_map(str(path)) as file:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            names = _columns_to_read(table.schema_arrow.names, asked)
            batches = table.iter_batches(batch_size=64, columns=names)  # a row may hold megabytes
        else:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
            names = _columns_to_read(table.schema.names, asked)
            batches = (table.get_batch(n) for n in range(table.num_record_batches)) if is_file else table
            batches = (part for batch in batches for part in _parts(batch.select(names)))
        row = 0
        for batch in batches:
            for entry in batch.to_pylist():
                yield f"row {row}", entry
                row += 1


def _columns_to_read(names: list[str], asked: Columns) -> list[str]:
    """Those that become a record, and those that would have to: see `make_record`."""
    chosen = choose_columns(names, asked).all
    return chosen + [name for name in names if name not in chosen and kind_of_name(name)]


def _parts(batch, rows: int = 64) -> Iterator:
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def read_archive(path: Path, asked: Columns) -> Iterator[tuple[str, dict | BadEntry]]:
    """The samples of a WebDataset shard, see `samples_of`.

    The images of a sample become the column `images`, in the order that `in_order` gives them, the fields of its
    `.json` columns, and its `.txt` the column `txt`. Other members are passed over. Nothing is unpacked by its name.
    """
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        # What is damaged reads as the end of an archive, the real one is an empty block.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            behind = f"behind {members[-1].name} " if members else ""
            raise ValueError(f"{behind}it is damaged or cut off.")
        while archive.fileobj.read(2**20):  # a compressed one has its checksum at its end
            pass
        for key, sample in samples_of(members):
            entry = {"__key__": key.rpartition("/")[2]}
            try:
                _check_sample(sample)
                for member in in_order(sample):
                    _add_member(entry, member, archive)
                _check_texts(entry, asked)
            except BadEntry as error:
                entry = error
            yield key.lstrip("/"), entry


@dataclass(frozen=True)
class Member:
    """A member of an archive whose ending is known: `chats/v1.5-01.0.PNG` has stem `v1.5-01.0` and kind `png`."""

    info: tarfile.TarInfo
    folder: str
    stem: str
    kind: str


def samples_of(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, list[Member] | BadEntry]]:
    """Group the members of a shard into samples: (key, its members), or what makes it unclear whose they are.

    Members are of one sample if their names without the ending are equal, or if one goes on behind a dot where another
    ends: `a.txt`, `a.0.png`, `a.seg.png`. WebDataset's own rule, the name up to its first dot, would make one sample of
    `v1.5-01.jpg` and `v1.5-02.jpg`. As there, members of a sample stand together, and names that begin with a dot are
    passed over.
    """
    runs, last = [], None
    for info in members:
        folder, _, base = info.name.rpartition("/")
        stem, _, ending = base.rpartition(".")
        if info.isdir() or not stem or stem.startswith(".") or ending.lower() not in (*IMAGE_KINDS, *TEXT_KINDS):
            continue
        if (folder, stem.partition(".")[0]) != last:
            last = folder, stem.partition(".")[0]
            runs.append([])
        runs[-1].append(Member(info, folder, stem, ending.lower()))
    samples = [sample for run in runs for sample in _split_run(run)]
    count = Counter(key for key, _ in samples)
    for key, sample in samples:
        yield key, sample if count[key] == 1 else BadEntry("its members do not stand together in the archive.")


def _split_run(run: list[Member]) -> list[tuple[str, list[Member]]]:
    """The samples among neighbours whose names are equal up to the first dot."""
    by_stem = defaultdict(list)
    for member in run:
        by_stem[member.stem].append(member)
    samples = defaultdict(list)  # from the shortest stem to all members whose names begin with it
    for stem in by_stem:
        parts = stem.split(".")
        beginnings = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        samples[next(beginning for beginning in beginnings if beginning in by_stem)].append(stem)
    found = []
    for shortest, stems in samples.items():
        kinds = [{"image" if member.kind in IMAGE_KINDS else member.kind for member in by_stem[stem]} for stem in stems]
        # Several stems that each have images and a text are samples of their own: 0.jpg 0.txt 0.5.jpg 0.5.txt
        alone = "image" in kinds[0] and len(kinds[0]) > 1 and all(kind == kinds[0] for kind in kinds)
        found += [(stem, [stem]) for stem in stems] if alone else [(shortest, stems)]
    folder = f"{run[0].folder}/" if run[0].folder else ""
    return [(folder + key, [member for stem in stems for member in by_stem[stem]]) for key, stems in found]


def _check_sample(sample: list[Member] | BadEntry) -> None:
    if isinstance(sample, BadEntry):
        raise sample
    names = Counter((member.stem, member.kind) for member in sample)
    if twice := [".".join(name) for name, count in names.items() if count > 1]:
        raise BadEntry(f"it has the member {shorten(twice[0])} twice.")
    for kind in TEXT_KINDS:
        texts = [f"{member.stem}.{kind}" for member in sample if member.kind == kind]
        if len(texts) > 1:
            raise BadEntry(f"it has several texts ending with {kind!r}: {shorten(texts)}; which one is its own?")


def in_order(sample: list[Member]) -> list[Member]:
    """A sample's texts, then its images as they stand in the archive, but what differs in numbers alone by number.

    So `a.2.png` comes before `a.10.png`, and `a.png` before both.
    """
    shortest = min((member.stem for member in sample), key=len)
    images = [member for member in sample if member.kind in IMAGE_KINDS]
    patterns = [re.sub(r"\d+", "0", member.stem[len(shortest) :]) for member in images]
    if len(numbered := set(patterns) - {""}) == 1:
        patterns = [*numbered] * len(images)
    of_pattern = defaultdict(list)
    for pattern, member in zip(patterns, images, strict=True):
        of_pattern[pattern].append(member)
    by_numbers = {
        pattern: iter(sorted(found, key=lambda member: by_number(member.stem))) for pattern, found in of_pattern.items()
    }
    return [member for member in sample if member.kind in TEXT_KINDS] + [next(by_numbers[each]) for each in patterns]


def _add_member(entry: dict, member: Member, archive: tarfile.TarFile) -> None:
    kind, info = member.kind, member.info
    if not info.isfile():
        raise BadEntry(f"its {kind!r} is a link or a device and not a file.")
    if info.size > LARGEST_MEMBER:
        raise BadEntry(f"its {kind!r} has {info.size} bytes; more than {LARGEST_MEMBER} are refused.")
    content = archive.extractfile(info).read()
    if kind in IMAGE_KINDS:
        images = entry.get("images")
        entry["images"] = [*images, content] if images and isinstance(images[0], bytes) else [content]
        return
    try:
        value = content.decode("utf-8") if kind == "txt" else json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadEntry(f"its {kind!r} cannot be read: {error}.") from None
    if kind == "txt":
        entry["txt"] = value
    elif isinstance(value, dict):  # the images of the archive win over names of images
        entry |= {name: column for name, column in value.items() if column is not None and name not in entry}
    else:
        raise BadEntry(f"its 'json' is not an object but {shorten(value)}.")


def _check_texts(entry: dict, asked: Columns) -> None:
    """Raises BadEntry if a sample's `.txt` and its `.json` hold two texts, of which nobody said which to take."""
    if asked.text or "txt" not in entry:
        return
    first = _known(list(entry), TEXT_COLUMNS, "text")
    texts = [text.strip() if isinstance(text, str) else text for text in (entry[first], entry["txt"])]
    if texts[0] != texts[1]:
        raise BadEntry(f"its 'txt' and {first!r} of its 'json' are two texts: name the one to take by --text_column.")


# --- an entry --------------------------------------------------------------------------------------------------------


def encoded_images(value: object, image_root: str | None) -> list[bytes]:
    """The bytes of the image files in a column: bytes, what `datasets` makes of images, names, or lists of these."""
    if value is None:
        return []
    if isinstance(value, list):
        return [content for item in value for content in encoded_images(item, image_root)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        encoded = value.get("bytes")
        return encoded_images(value.get("path") if encoded is None else encoded, image_root)
    if not isinstance(value, str):
        raise BadEntry(f"its image is {shorten(value)}, which is neither an encoded image nor a file name.")
    if image_root is None:
        raise BadEntry(f"its image is not in the data but a file, {shorten(value)}: say where by --image_root.")
    try:
        return [Path(image_path(image_root, value)).read_bytes()]
    except BadImage as error:
        raise BadEntry(str(error)) from None


def suffix_of(content: bytes) -> str:
    """`.jpg` for the bytes of a JPEG. Raises BadEntry if it is no image that the trainer reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the doctor and the trainer say what they think of it
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return SUFFIXES.get(image.format, f".{image.format.lower()}")
    except Exception:  # Pillow's decoders raise nearly everything on damaged files
        raise BadEntry(f"its image of {len(content)} bytes cannot be read.") from None


def conversation(value: object, images: int, drop_system: bool) -> tuple[list[dict], bool]:
    """The turns of a record, and whether its images have to stay where they are in the text.

    Told by their keys: LLaVA's `from` and `value`, chat messages' `role` and `content`, and pairs of `user` and
    `assistant`. A plain text is a caption. Without a mark for an image in the text all come before it.
    """
    in_place = False
    if isinstance(value, str):
        if not images:
            raise BadEntry("it is a caption without an image.")
        turns = [("human", ""), ("gpt", value)]
    else:
        turns = []
        for number, item in enumerate(_objects(value), start=1):
            if {"from", "value"} <= item.keys():
                turns.append((item["from"], item["value"]))
            elif {"role", "content"} <= item.keys():
                in_place = in_place or isinstance(item["content"], list)
                turns.append((item["role"], _text(item["content"], number)))
            elif {"user", "assistant"} <= item.keys():
                turns += [("human", item["user"]), ("gpt", item["assistant"])]
            else:
                raise BadEntry(f"turn {number} has the keys {', '.join(map(str, item))}, which are not known.")
    if drop_system:
        turns = [turn for turn in turns if turn[0] != "system"]
    for number, (role, text) in enumerate(turns, start=1):
        if role == "system":
            raise BadEntry(f"turn {number} is a system prompt; templates have their own: --drop_system leaves it out.")
        if role not in ROLES or not isinstance(text, str):
            raise BadEntry(f"turn {number} is {shorten(text)} from {shorten(role)}, not a text from a known role.")
    turns = [(ROLES[role], text) for role, text in turns]
    if images and turns and not any(IMAGE_MARK in text for role, text in turns if role == "human"):
        first = next((number for number, (role, _) in enumerate(turns) if role == "human"), 0)
        turns[first] = (turns[first][0], "\n".join([*[IMAGE_MARK] * images, turns[first][1]]).rstrip("\n"))
    return [{"from": role, "value": text} for role, text in turns], in_place


def _objects(value: object) -> list[dict]:
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # A sequence of objects is stored by `datasets` as an object of sequences.
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise BadEntry(f"its text is {shorten(value)}; expected a text or a list of turns.")
    return value


def _text(content: object, number: int) -> object:
    """The content of a chat message as a text; parts of it are lines."""
    if not isinstance(content, list):
        return content
    lines = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise BadEntry(f"turn {number} has the part {shorten(part)}, which is neither a text nor an image.")
        lines.append(IMAGE_MARK if kind == "image" else part["text"])
    return "\n".join(lines)


# --- records ---------------------------------------------------------------------------------------------------------


def make_record(
    entry: dict,
    name: str,
    place: str,
    asked: Columns,
    image_root: str | None,
    drop_system: bool,
    check: RecordCheck,
) -> tuple[dict, dict[str, bytes]]:
    """The record of an entry, and its images by their names in the image folder. Raises BadEntry or BadRecord.

    Args:
        name: what the record is called unless it has an id.
        place: what its images are called, without their number and suffix.
    """
    try:
        columns = choose_columns(list(entry), asked)
    except ValueError as error:
        raise BadEntry(str(error)) from None
    images = [image for column in columns.image for image in encoded_images(entry[column], image_root)]
    turns, in_place = conversation(entry[columns.text], len(images), drop_system)
    identifier = entry.get(columns.id)
    record = {"id": name if identifier is None else str(identifier)}
    numbers = [""] if len(images) == 1 else [f"-{number}" for number in range(1, len(images) + 1)]
    names = [f"{place}{number}{suffix_of(image)}" for number, image in zip(numbers, images, strict=True)]
    if names:
        record["image"] = names[0] if len(names) == 1 and not in_place else names
    record["conversations"] = turns
    not_taken = {name: value for name, value in entry.items() if name not in columns.all and kind_of_name(name)}
    check_record(not_taken | record, check)  # it names what looks like media or a prompt
    return record, dict(zip(names, images, strict=True))


def check_record(record: dict, check: RecordCheck) -> None:
    """Raise BadRecord if the record cannot be trained on with any template, whatever its images and its length."""
    check(record)
    _, answers, _ = read_conversation(record, get_template("v1"))
    if not answers:
        raise BadRecord("no question has an answer, so there is nothing to train on.")


def convert_file(number: int, path: Path, given: argparse.Namespace, asked: Columns) -> None:
    """Writes the records of an input file to a part of its own, which is there once they and their images are."""
    output = Path(given.output)
    part, bad = (_part(output, number, kind) for kind in ("records", "bad"))
    if part.exists():
        return
    entries = tqdm(read_entries(path, asked), desc=path.name, unit=" entries", delay=2, mininterval=1, leave=False)
    with atomic_write(part) as good_lines, atomic_write(bad) as bad_lines:  # the latter gets its name first
        for row, (name, entry) in enumerate(entries):
            place = f"{number:05d}/{row // 1000:04d}/{row:07d}"  # no folder of a hundred thousand files
            try:
                if isinstance(entry, BadEntry):
                    raise entry
                called = f"{path.name} {name}"
                how = (asked, given.image_root, given.drop_system, RecordCheck(given.leave_unread))
                record, images = make_record(entry, called, place, *how)
            except (BadEntry, BadRecord) as error:
                entry = {"file": str(path), "entry": name, "reason": str(error)}
                bad_lines.write(json.dumps(entry).encode() + b"\n")
                continue
            for image, content in images.items():
                (output / "images" / image).parent.mkdir(parents=True, exist_ok=True)
                (output / "images" / image).write_bytes(content)
            good_lines.write(json.dumps(record).encode() + b"\n")
        os.sync()  # the images too, before the part says that they are there


def _part(output: Path, number: int, kind: str) -> Path:
    return output / "parts" / f"{number:05d}.{kind}.jsonl"


def convert(given: argparse.Namespace) -> int:
    """Converts, prints, and returns how many entries became no record."""
    output = Path(given.output)
    asked = Columns(given.text_column, tuple(given.image_column), given.id_column)
    files = [path for source in given.sources for path in input_files(Path(source), given.split)]
    plan = {
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "flags": {name: value for name, value in vars(given).items() if name not in ("sources", "output")},
    }
    records, faults, plan_file = (output / name for name in ("records.jsonl", "bad_entries.jsonl", "conversion.json"))
    if not plan_file.exists() and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and no conversion of ours: take another --output.")
    if not plan_file.exists() or json.loads(plan_file.read_text(encoding="utf-8")) != plan:
        if records.exists() or any((output / "parts").glob("*.records.jsonl")):
            raise ValueError(f"{output} holds a conversion of other files or with other flags: take another --output.")
        shutil.rmtree(output / "images", ignore_errors=True)  # of an attempt that finished no file
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(plan_file) as file:
            file.write(json.dumps(plan, indent=1).encode())
    if not records.exists():
        for folder in ("parts", "images"):
            (output / folder).mkdir(exist_ok=True)
        for number, path in enumerate(files):
            convert_file(number, path, given, asked)
        for kind, whole in (("bad", faults), ("records", records)):
            with atomic_write(whole) as file:
                file.writelines(_part(output, number, kind).read_bytes() for number in range(len(files)))
    shutil.rmtree(output / "parts", ignore_errors=True)

    with open(records, "rb") as lines:
        count = sum(1 for _ in lines)
    reasons = [entry["reason"] for entry in read_lines(faults)]
    print(f"{counted(count, 'record')}: train.py --data_path {records} --image_folder {output / 'images'}")
    if reasons:
        which = "1 entry" if len(reasons) == 1 else f"{len(reasons):,} entries"
        print(f"{which} became no record, listed in {faults}:")
        print("\n".join(f"  {line}" for line in count_reasons(reasons)))
    return len(reasons)


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mini_llava.tools.convert", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="directory of datasets' save_to_disk, directory of files, or file")
    add("--output", required=True, metavar="FOLDER", help="where records.jsonl and images/ go")
    add("--split", metavar="NAME", help="which split of a directory that has several")
    add("--text_column", metavar="NAME", help=f"conversations or caption [the first of {', '.join(TEXT_COLUMNS)}]")
    image_help = f"images, once for each column [the first of {', '.join(IMAGE_COLUMNS)}, or image_1, image_2, ...]"
    add("--image_column", metavar="NAME", action="append", default=[], help=image_help)
    add("--id_column", metavar="NAME", help=f"[the first of {', '.join(ID_COLUMNS)}; none: file and row]")
    add("--image_root", metavar="FOLDER", help="folder of the images that the data only name")
    add("--drop_system", action="store_true", help="leave system prompts out; templates have their own")
    unread_help = "columns and marks that look like media or a prompt and are meant to be left unread, as for train.py"
    add("--leave_unread", nargs="+", default=[], metavar="NAME", help=unread_help)
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    given = parse_arguments(command_line)
    try:
        return 1 if convert(given) else 0
    except (ValueError, OSError, ImportError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
