"""Convert data sets to records and an image folder: `python -m mini_llava.tools.convert SOURCE ... --output FOLDER`.

Reads what Hugging Face `datasets` and WebDataset write (Arrow, Parquet, tar). Images are copied byte for byte under new
names: no name in an archive is used as a path. Each input file is converted as a whole, so that a killed conversion can
continue. Exit code: 0 if every entry became a record, 1 if some did not and are listed, 2 if flags or files cannot be
read.
"""

import argparse
import io
import itertools
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

from ..command_line import boolean
from ..data.templates import IMAGE_MARK, BadRecord, get_template
from ..data.tokenization import read_conversation, shorten, template_for
from ..errors import UserError
from ..files import atomic_write
from ..guards.records import RecordCheck, kind_of_name
from ..image_files import FORMATS, BadImage, LinkedFolder, image_path
from ..watch.json_lines import read_lines
from ..watch.skipped import count_reasons
from ..words import counted

TEXT_COLUMNS = ("conversations", "messages", "texts", "caption", "text", "txt")
IMAGE_COLUMNS = ("images", "image")
NUMBERED_IMAGE = re.compile(r"image[_-]?\d+", re.IGNORECASE)  # image_1, image_2, ...
ID_COLUMNS = ("id", "__key__")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

TABLES, ARCHIVES = (".parquet", ".arrow"), (".tar", ".tar.gz", ".tgz")
SPLIT = re.compile(r"(?<![a-z])(train|training|validation|valid|val|dev|test|testing)(?![a-z])")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}  # of other formats: their name in lower case
IMAGE_KINDS = tuple(ending[1:] for ending, name in Image.registered_extensions().items() if name in FORMATS)
TEXT_KINDS = ("txt", "json")
LARGEST_MEMBER = 2**28  # bytes of a tar member


class BadEntry(UserError):
    """Why an entry becomes no record, in one sentence that does not name it."""


@dataclass(frozen=True)
class Columns:
    """The columns of an entry's text, images (one column for each, or one for all) and id; None, (): none is named."""

    text: str | None = None
    image: tuple[str, ...] = ()
    id: str | None = None

    @property
    def all(self) -> list[str]:
        return [name for name in (self.text, *self.image, self.id) if name]


def choose_columns(names: Sequence[str], asked: Columns) -> Columns:
    """Return the columns that flags name, and otherwise the first known one, in any case.

    Without a known image column, `image_1`, `image_2`, ... have the images. Raises UserError, with the columns of the
    file, if one is missing or ambiguous.
    """
    for flag, name in (("text", asked.text), *(("image", name) for name in asked.image), ("id", asked.id)):
        if name is not None and name not in names:
            raise UserError(f"it has no column {name!r} (--{flag}_column); its columns are {', '.join(names)}.")
    text = asked.text or _known(names, TEXT_COLUMNS, "text")
    if text is None:
        raise UserError(
            f"none of its columns, {', '.join(names)}, is known to hold text (known: {', '.join(TEXT_COLUMNS)}): name "
            f"one by --text_column."
        )
    image = asked.image
    if not image:
        known = _known(names, IMAGE_COLUMNS, "image")
        numbered = sorted((name for name in names if NUMBERED_IMAGE.fullmatch(name)), key=by_number)
        if (known and numbered) or len(numbered) != len({re.search(r"\d+", name)[0].lstrip("0") for name in numbered}):
            raise UserError(
                f"it is not clear which images come first, those of {' or '.join(filter(None, (known, *numbered)))}: "
                f"name the columns in their order by --image_column."
            )
        image = (known,) if known else tuple(numbered)
    return Columns(text, image, asked.id or _known(names, ID_COLUMNS, "id"))


def _known(names: Sequence[str], known: Sequence[str], flag: str) -> str | None:
    """Return the column that is first among the known ones. Raises UserError if two differ in case alone."""
    for wanted in known:
        found = [name for name in names if name.lower() == wanted]
        if len(found) > 1:
            raise UserError(
                f"its columns {' and '.join(found)} differ in case alone: name the one that is meant by "
                f"--{flag}_column."
            )
        if found:
            return found[0]
    return None


def by_number(name: str) -> tuple:
    """Return a key that sorts names by their numbers and in any case: `shard-2` before `shard-10`."""
    parts = re.split(r"(\d+)", name.casefold())
    parts[1::2] = [(len(number), number) for number in (part.lstrip("0") for part in parts[1::2])]
    return parts, name


# --- input files -----------------------------------------------------------------------------------------------------


def input_files(source: Path, split: str | None) -> list[Path]:
    """Return a source's files: itself, or those of a directory. Raises UserError if the split is ambiguous."""
    if split and (source.is_file() or (source / "state.json").is_file()):
        raise UserError(f"{source} has no splits, so --split {split} says nothing about it.")
    if _is_data(source):
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} is neither a directory nor a file ending with {', '.join(TABLES + ARCHIVES)}.")
    if (source / "dataset_dict.json").is_file():  # of DatasetDict.save_to_disk: a folder for each split
        splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return input_files(source / _only(source, splits, split), None)
    if (source / "state.json").is_file():  # of Dataset.save_to_disk
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise UserError(f"{source} was saved with a selection of rows beside it: save it with newer datasets.")
        return [source / file["filename"] for file in state["_data_files"]]
    files = [path.relative_to(source) for path in source.rglob("*") if _is_data(path)]
    files.sort(key=lambda path: [by_number(part) for part in path.parts])
    splits = {path: _split_of(path) for path in files}
    names = sorted({name for name in splits.values() if name})
    if split or len(set(splits.values())) > 1:
        # Files without a split may belong to one, or be another data set.
        unnamed = [] if split else [str(path) for path in files if splits[path] is None]
        if unnamed and len(names) == 1:
            raise UserError(
                f"{source} has files of the split {names[0]} and {len(unnamed)} whose names tell of none, the first is "
                f"{unnamed[0]}: say which split to convert by --split, or name the files."
            )
        wanted = _only(source, names, split)
        files = [path for path in files if splits[path] == wanted]
    if not files:
        raise UserError(f"{source} holds no file ending with {', '.join(TABLES + ARCHIVES)}.")
    return [source / path for path in files]


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(TABLES + ARCHIVES) and path.is_file()


def _split_of(path: Path) -> str | None:
    """Return the split that a path names, in the file's name or else in the nearest folder's."""
    for part in reversed(path.parts):
        found = sorted(set(SPLIT.findall(part.lower())))
        if len(found) > 1:
            raise UserError(f"{path} tells of the splits {' and '.join(found)}: convert the files that you name.")
        if found:
            return found[0]
    return None


def _only(source: Path, splits: list[str], split: str | None) -> str:
    """Return the requested split, or the only one. Raises UserError."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split in splits:
        return split
    found = f"it has {', '.join(splits)}" if splits else "no name there tells of a split"
    raise UserError(f"{source}: say which split to convert by --split; {found}.")


def read_entries(path: Path, asked: Columns) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield name and columns, or the fault, of each entry of a file. Raises UserError if the file is damaged."""
    reader = read_archive if path.name.lower().endswith(ARCHIVES) else read_table
    try:
        yield from reader(path, asked)
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be converted: {error}") from error


def read_table(path: Path, asked: Columns) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a Parquet file, of an Arrow stream (as `save_to_disk` writes it) or of an Arrow file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow.") from error
    with pyarrow.memory_map(str(path)) as file:
        is_parquet, is_file = path.suffix.lower() == ".parquet", file.read(6) == b"ARROW1"
        file.seek(0)
        if is_parquet:
            table = pyarrow.parquet.ParquetFile(file)
        else:
            table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
        names = (table.schema_arrow if is_parquet else table.schema).names
        # The columns of a record, and those that it may not have: see `make_record`.
        chosen = choose_columns(names, asked).all
        chosen += [name for name in names if name not in chosen and kind_of_name(name)]
        rows = 64  # at once: one may have megabytes
        if is_parquet:
            batches = table.iter_batches(batch_size=rows, columns=chosen)
        else:
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        parts = (batch.slice(start, rows) for batch in batches for start in range(0, batch.num_rows, rows))
        entries = itertools.chain.from_iterable(part.select(chosen).to_pylist() for part in parts)
        yield from ((f"row {row}", entry) for row, entry in enumerate(entries))


def read_archive(path: Path, asked: Columns) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield the samples of a WebDataset shard.

    A sample's images become the column `images`, the fields of its `.json` columns, and its `.txt` the column `txt`.
    Other members are passed over. Nothing is unpacked.
    """
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        # tarfile takes damage for the end of an archive; the real end is an empty block.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            behind = f"behind {members[-1].name} " if members else ""
            raise UserError(f"{behind}it is damaged or cut off.")
        while archive.fileobj.read(2**20):  # to the end, where a compressed archive has its checksum
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
    """A text or image in an archive: `chats/v1.5-01.0.PNG` has the stem `v1.5-01.0` and the kind `png`."""

    info: tarfile.TarInfo
    folder: str
    stem: str
    kind: str


def samples_of(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, list[Member] | BadEntry]]:
    """Yield the samples of a shard: (key, its members, or why they are ambiguous).

    Members belong together if their names without the ending are equal, or if one continues the other after a dot:
    `a.txt`, `a.0.png`, `a.seg.png`. WebDataset's rule, the name up to its first dot, would make one sample of
    `v1.5-01.jpg` and `v1.5-02.jpg`. As there, a sample's members are adjacent, and hidden files are passed over.
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
    """Return the samples among adjacent members whose names are equal up to the first dot."""
    by_stem = defaultdict(list)
    for member in run:
        by_stem[member.stem].append(member)
    samples = defaultdict(list)  # the shortest stem: all stems that continue it
    for stem in by_stem:
        parts = stem.split(".")
        beginnings = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        samples[next(beginning for beginning in beginnings if beginning in by_stem)].append(stem)
    found = []
    for shortest, stems in samples.items():
        kinds = [{"image" if member.kind in IMAGE_KINDS else member.kind for member in by_stem[stem]} for stem in stems]
        # Stems that each have images and a text are samples of their own: 0.jpg 0.txt 0.5.jpg 0.5.txt
        alone = "image" in kinds[0] and len(kinds[0]) > 1 and all(kind == kinds[0] for kind in kinds)
        found += [(stem, [stem]) for stem in stems] if alone else [(shortest, stems)]
    folder = f"{run[0].folder}/" if run[0].folder else ""
    return [(folder + key, [member for stem in stems for member in by_stem[stem]]) for key, stems in found]


def _check_sample(sample: list[Member] | BadEntry) -> None:
    """Raise BadEntry if a sample is ambiguous."""
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
    """Return a sample's texts, then its images: in the archive's order, but by number if only numbers differ.

    `a.2.png` comes before `a.10.png`, and `a.png` before both.
    """
    shortest = min((member.stem for member in sample), key=len)
    images = [member for member in sample if member.kind in IMAGE_KINDS]
    patterns = [re.sub(r"\d+", "0", member.stem[len(shortest) :]) for member in images]
    if len(numbered := set(patterns) - {""}) == 1:
        patterns = [*numbered] * len(images)
    of_pattern = defaultdict(list)
    for pattern, member in zip(patterns, images, strict=True):
        of_pattern[pattern].append(member)
    for found in of_pattern.values():
        found.sort(key=lambda member: by_number(member.stem))
    texts = [member for member in sample if member.kind in TEXT_KINDS]
    return texts + [of_pattern[pattern].pop(0) for pattern in patterns]


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
    elif isinstance(value, dict):  # images in the archive take precedence over their names
        entry |= {name: column for name, column in value.items() if column is not None and name not in entry}
    else:
        raise BadEntry(f"its 'json' is not an object but {shorten(value)}.")


def _check_texts(entry: dict, asked: Columns) -> None:
    """Raise BadEntry if `.txt` and `.json` of a sample have different texts and no flag chooses one."""
    if asked.text or "txt" not in entry:
        return
    first = _known(list(entry), TEXT_COLUMNS, "text")
    texts = [text.strip() if isinstance(text, str) else text for text in (entry[first], entry["txt"])]
    if texts[0] != texts[1]:
        raise BadEntry(f"its 'txt' and {first!r} of its 'json' are two texts: name the one to take by --text_column.")


# --- an entry --------------------------------------------------------------------------------------------------------


def encoded_images(value: object, image_root: str | None) -> list[bytes]:
    """Return the encoded images of a column: bytes, `datasets`' structs, file names, or lists of these."""
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
    """Return a file's suffix, `.jpg` for a JPEG. Raises BadEntry for an image that the trainer cannot read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the doctor and the trainer warn
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return SUFFIXES.get(image.format, f".{image.format.lower()}")
    except Exception:  # Pillow's decoders raise nearly everything on damaged files
        raise BadEntry(f"its image of {len(content)} bytes cannot be read.") from None


def conversation(value: object, images: int, drop_system: bool) -> tuple[list[dict], bool]:
    """Return the turns of a record, and whether its images have places in the text.

    The keys decide: LLaVA's `from` and `value`, chat messages' `role` and `content`, or pairs of `user` and
    `assistant`. A plain text is a caption. Images without a mark in the text come before it.
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
        if role == "system" and number > 1:
            raise BadEntry(f"turn {number} is a system prompt, which comes first: --drop_system leaves it out.")
        if role not in ROLES or not isinstance(text, str):
            raise BadEntry(f"turn {number} is {shorten(text)} from {shorten(role)}, not a text from a known role.")
    turns = [(ROLES[role], text) for role, text in turns]
    if images and turns and not any(IMAGE_MARK in text for role, text in turns if role == "human"):
        first = next((number for number, (role, _) in enumerate(turns) if role == "human"), 0)
        turns[first] = (turns[first][0], "\n".join([*[IMAGE_MARK] * images, turns[first][1]]).rstrip("\n"))
    return [{"from": role, "value": text} for role, text in turns], in_place


def _objects(value: object) -> list[dict]:
    """Return the turns of a conversation as they are stored. Raises BadEntry."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # `datasets` stores a sequence of objects as an object of sequences.
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise BadEntry(f"its text is {shorten(value)}; expected a text or a list of turns.")
    return value


def _text(content: object, number: int) -> object:
    """Return the content of a chat message as text, each part on a line. Raises BadEntry."""
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


def make_record(entry: dict, name: str, place: str, given: argparse.Namespace) -> tuple[dict, dict[str, bytes]]:
    """Return the record of an entry, and its images by their names. Raises BadEntry or BadRecord.

    Args:
        name: the record's id, unless the entry has one.
        place: the names of its images, without number and suffix.
    """
    try:
        columns = choose_columns(list(entry), given.columns)
    except ValueError as error:
        raise BadEntry(str(error)) from None
    images = [image for column in columns.image for image in encoded_images(entry[column], given.image_root)]
    turns, in_place = conversation(entry[columns.text], len(images), not given.keep_system)
    identifier = entry.get(columns.id)
    record = {"id": name if identifier is None else str(identifier)}
    numbers = [""] if len(images) == 1 else [f"-{number}" for number in range(1, len(images) + 1)]
    names = [f"{place}{number}{suffix_of(image)}" for number, image in zip(numbers, images, strict=True)]
    if names:
        record["image"] = names[0] if len(names) == 1 and not in_place else names
    if given.keep_system and entry.get("system"):
        record["system"] = entry["system"]
    record["conversations"] = turns
    not_taken = {name: value for name, value in entry.items() if name not in columns.all and kind_of_name(name)}
    not_taken.pop("system", None)
    check_record(not_taken | record, given.check)
    return record, dict(zip(names, images, strict=True))


def check_record(record: dict, check: RecordCheck) -> None:
    """Raise BadRecord if the record cannot be trained on with any template, whatever its images and its length."""
    record = check(record)
    _, answers, _ = read_conversation(record, get_template("v1"))
    template_for(record, get_template("v1"))
    if not answers:
        raise BadRecord("no question has an answer, so there is nothing to train on.")


def convert_file(number: int, path: Path, given: argparse.Namespace) -> None:
    """Write the records of an input file to a part of its own, which appears after them and their images."""
    output = Path(given.output)
    part, bad = (_part(output, number, kind) for kind in ("records", "bad"))
    if part.exists():
        return
    entries = tqdm(
        read_entries(path, given.columns), desc=path.name, unit=" entries", delay=2, mininterval=1, leave=False
    )
    with atomic_write(part) as good_lines, atomic_write(bad) as bad_lines:  # bad_lines appears first
        for row, (name, entry) in enumerate(entries):
            place = f"{number:05d}/{row // 1000:04d}/{row:07d}"  # no folder with a hundred thousand files
            try:
                if isinstance(entry, BadEntry):
                    raise entry
                record, images = make_record(entry, f"{path.name} {name}", place, given)
            except (BadEntry, BadRecord) as error:
                entry = {"file": str(path), "entry": name, "reason": str(error)}
                bad_lines.write(json.dumps(entry).encode() + b"\n")
                continue
            for image, content in images.items():
                (output / "images" / image).parent.mkdir(parents=True, exist_ok=True)
                (output / "images" / image).write_bytes(content)
            good_lines.write(json.dumps(record).encode() + b"\n")
        os.sync()  # the images, too, before the part appears


def _part(output: Path, number: int, kind: str) -> Path:
    return output / "parts" / f"{number:05d}.{kind}.jsonl"


def convert(given: argparse.Namespace) -> int:
    """Convert all sources; return how many entries became no record."""
    output = Path(given.output)
    files = [path for source in given.sources for path in input_files(Path(source), given.split)]
    plan = {
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "flags": {name: value for name, value in vars(given).items() if name not in ("sources", "output")},
    }
    given.columns = Columns(given.text_column, tuple(given.image_column), given.id_column)
    given.keep_system = not given.drop_system and "system" not in given.leave_unread
    given.check = RecordCheck(given.leave_unread)  # it names what looks like media or a prompt
    records, faults, plan_file = (output / name for name in ("records.jsonl", "bad_entries.jsonl", "conversion.json"))
    if not plan_file.exists() and output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty and no conversion of ours: take another --output.")
    if not plan_file.exists() or json.loads(plan_file.read_text(encoding="utf-8")) != plan:
        if records.exists() or any((output / "parts").glob("*.records.jsonl")):
            raise UserError(f"{output} holds a conversion of other files or with other flags: take another --output.")
        shutil.rmtree(output / "images", ignore_errors=True)  # of a run that finished no file
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(plan_file) as file:
            file.write(json.dumps(plan, indent=1).encode())
    if not records.exists():
        for folder in ("parts", "images"):
            (output / folder).mkdir(exist_ok=True)
        for number, path in enumerate(files):
            convert_file(number, path, given)
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
    add("--follow_links", nargs="?", type=boolean, const=True, metavar="True|False", help="as for train.py")
    add("--drop_system", action="store_true", help="leave system prompts out: templates have their own")
    unread_help = "columns and marks that look like media or a prompt and are meant to be left unread, as for train.py"
    add("--leave_unread", nargs="+", default=[], metavar="NAME", help=unread_help)
    given = parser.parse_args(command_line)
    if given.follow_links and given.image_root:
        given.image_root = LinkedFolder(given.image_root)
    return given


def main(command_line: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    given = parse_arguments(command_line)
    try:
        return 1 if convert(given) else 0
    except (UserError, BadRecord, OSError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
