"""The forms in which others keep their data, read as entries: a name and its columns.

Hugging Face `datasets` (Arrow, Parquet), WebDataset (tar), JSON and JSON Lines, MosaicML streaming (MDS) and litdata. A
reader yields the entries of one file in its order, with images as they are encoded there. Nothing is unpacked, and no
name in the data is used as a path.
"""

import itertools
import json
import re
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from ..data.records import RecordStore
from ..data.templates import BadRecord
from ..data.tokenization import shorten
from ..errors import UserError
from ..guards.records import kind_of_name
from ..image_files import FORMATS

TEXT_COLUMNS = ("conversations", "messages", "texts", "caption", "text", "txt", "questions")
# Two columns that are one text: questions with their answers, and PixMo's points with what they show.
PAIRED_COLUMNS = {"question": "answer", "points": "label"}
IMAGE_COLUMNS = ("images", "image")
NUMBERED_IMAGE = re.compile(r"image[_-]?\d+", re.IGNORECASE)  # image_1, image_2, ...
ID_COLUMNS = ("id", "__key__")
ADDRESS = re.compile(r"(image|img|picture|photo)s?_?(url|uri|link)s?", re.IGNORECASE)
RATINGS = "_ratings"  # FineVision's columns end so: a number from 1 to 5 for each round

TABLES, ARCHIVES, LINES = (".parquet", ".arrow"), (".tar", ".tar.gz", ".tgz"), (".jsonl", ".ndjson", ".json")
MDS = re.compile(r".*\.mds(\.(zstd|br|bz2|gz|snappy))?")  # a shard of MosaicML streaming
LITDATA = re.compile(r"chunk-[\d-]+(\.\w+)?\.bin")
SPLIT = re.compile(r"(?<![a-z])(train|training|validation|valid|val|dev|test|testing)(?![a-z])")
IMAGE_KINDS = tuple(ending[1:] for ending, name in Image.registered_extensions().items() if name in FORMATS)
TEXT_KINDS = ("txt", "json")
MEDIA_KINDS = {
    **dict.fromkeys(("mp4", "m4v", "avi", "mov", "mkv", "webm", "mpeg", "mpg"), "video"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a", "opus"), "audio"),
}
LARGEST_MEMBER = 2**28  # bytes of a tar member


class BadEntry(UserError):
    """Why an entry becomes no record, in one sentence that does not name it."""


@dataclass(frozen=True)
class Columns:
    """The columns of an entry's text, images (one column for each, or one for all) and id; None, (): none is named.

    answer: the column of the answers to the questions in `text`, or of the labels of its points.
    """

    text: str | None = None
    image: tuple[str, ...] = ()
    id: str | None = None
    answer: str | None = None

    @property
    def all(self) -> list[str]:
        return [name for name in (self.text, self.answer, *self.image, self.id) if name]


def choose_columns(names: Sequence[str], asked: Columns) -> Columns:
    """Return the columns that flags name, and otherwise the first known one, in any case.

    Without a known image column, `image_1`, `image_2`, ... have the images. Raises UserError, with the columns of the
    file, if one is missing or ambiguous.
    """
    for flag, name in (("text", asked.text), *(("image", name) for name in asked.image), ("id", asked.id)):
        if name is not None and name not in names:
            raise UserError(f"it has no column {name!r} (--{flag}_column); its columns are {', '.join(names)}.")
    text = asked.text or _known(names, TEXT_COLUMNS, "text")
    pairs = {first: second for first, second in PAIRED_COLUMNS.items() if _known(names, (second,), "text")}
    if text is None:
        text = _known(names, tuple(pairs), "text")
    if text is None:
        raise UserError(
            f"none of its columns, {', '.join(names)}, is known to hold text (known: {', '.join(TEXT_COLUMNS)}, and "
            f"{', '.join(map(' with '.join, PAIRED_COLUMNS.items()))}): name one by --text_column."
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
    answer = _known(names, (pairs[text.lower()],), "text") if text.lower() in pairs else None
    return Columns(text, image, asked.id or _known(names, ID_COLUMNS, "id"), answer)


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


KNOWN = (
    f"ending with {', '.join(TABLES + ARCHIVES + LINES)}, nor a shard of MosaicML streaming (.mds) or litdata (.bin)"
)


def input_files(source: Path, split: str | None) -> list[Path]:
    """Return a source's files: itself, or those of a directory. Raises UserError if the split is ambiguous."""
    if split and (source.is_file() or (source / "state.json").is_file()):
        raise UserError(f"{source} has no splits, so --split {split} has no effect.")
    if _is_data(source) or _is_lines(source):
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} is neither a directory nor a file {KNOWN}.")
    if (source / "dataset_dict.json").is_file():  # of DatasetDict.save_to_disk: a folder for each split
        splits = json.loads((source / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return input_files(source / _only(source, splits, split), None)
    if (source / "state.json").is_file():  # of Dataset.save_to_disk
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise UserError(f"{source} was saved with a selection of rows beside it: save it with newer datasets.")
        return [source / file["filename"] for file in state["_data_files"]]
    shown = [path for path in source.rglob("*") if not any(p.startswith(".") for p in path.relative_to(source).parts)]
    # Beside other data JSON files are notes about it.
    found = {path for path in shown if _is_data(path)} or {path for path in shown if _is_lines(path)}
    files = [path.relative_to(source) for path in found if not _says_again(path, found)]
    files.sort(key=lambda path: [by_number(part) for part in path.parts])
    splits = _energon_splits(source, files) or {path: _split_of(path) for path in files}
    files = [path for path in files if path in splits]
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
        raise UserError(f"{source} holds no file {KNOWN}.")
    return [source / path for path in files]


def _is_data(path: Path) -> bool:
    known = path.name.lower().endswith(TABLES + ARCHIVES) or MDS.fullmatch(path.name) or LITDATA.fullmatch(path.name)
    return bool(known) and path.is_file()


def _is_lines(path: Path) -> bool:
    return path.name.lower().endswith(LINES) and path.is_file()


def _says_again(path: Path, files: set[Path]) -> bool:
    """Return whether a file repeats another one: a packed shard that was unpacked beside it, or img2dataset's notes.

    Those have the rows of a shard without their images, and rows whose images could not be fetched.
    """
    if path.suffix.lower() == ".parquet":
        return path.with_suffix(".tar") in files
    return path.suffix != ".mds" and path.with_suffix("").suffix == ".mds" and path.with_suffix("") in files


def _energon_splits(source: Path, files: list[Path]) -> dict[Path, str] | None:
    """Return the splits of the shards as megatron-energon has them, None for a directory that it did not prepare."""
    file = source / ".nv-meta" / "split.yaml"
    if not file.is_file():
        return None
    try:
        parts = yaml.safe_load(file.read_text(encoding="utf-8"))
        excluded = {Path(name) for name in parts.get("exclude") or ()}
        named = {
            split: [name for pattern in patterns for name in _ranged(pattern)]
            for split, patterns in parts["split_parts"].items()
        }
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error!r}.") from error
    names = {Path(name) for listed in named.values() for name in listed}
    if absent := sorted(map(str, names - excluded - set(files))):
        raise UserError(f"{file} lists {absent[0]}, which is not in {source}.")
    if others := sorted(map(str, excluded - set(files))):
        raise UserError(f"{file} excludes {others[0]}, which is no file of {source}: samples are not left out singly.")
    return {Path(name): split for split, names in named.items() for name in names if Path(name) not in excluded}


def _ranged(pattern: str) -> list[str]:
    """Return the names of a pattern such as `shard_{0000..0011}.tar`."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    middle, _, after = rest.partition("}")
    first, dots, last = middle.partition("..")
    names = middle.split(",") if not dots else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [f"{before}{name}{end}" for name in names for end in _ranged(after)]


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
    found = f"it has {', '.join(splits)}" if splits else "no name there indicates a split"
    raise UserError(f"{source}: say which split to convert by --split; {found}.")


def read_entries(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield name and columns, or the fault, of each entry of a file.

    passed_over: counts what the file holds and the entries do not, by what it is.

    Raises UserError if the file is damaged, or if a package that reads it is not installed.
    """
    name = path.name.lower()
    reader = (
        read_archive
        if name.endswith(ARCHIVES)
        else read_lines
        if name.endswith(LINES)
        else read_mds
        if MDS.fullmatch(path.name)
        else read_litdata
        if LITDATA.fullmatch(path.name)
        else read_table
    )
    damage = (tarfile.TarError, EOFError, zlib.error, ValueError, OSError)
    if reader in (read_mds, read_litdata):  # packages of others raise what they like
        damage = Exception
    try:
        yield from reader(path, asked, passed_over)
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        package = {"streaming": "mosaicml-streaming"}.get(name, name)
        raise UserError(f"{path} needs the package {package}: pip install {package}.") from error
    except damage as error:
        what = error if isinstance(error, ValueError | OSError) else repr(error)
        raise UserError(f"{path} cannot be converted: {what}") from error


def read_lines(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield the objects of a JSON array, or of JSON Lines."""
    store = RecordStore([str(path)])
    for number in range(len(store)):
        try:
            entry = store[number]
        except BadRecord as error:
            entry = BadEntry(str(error))
        yield f"record {number}", entry


def read_mds(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict]]:
    """Yield the samples of a shard of MosaicML streaming, by its own package. A pickled column is refused."""
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    index = next((f / "index.json" for f in list(path.parents)[:2] if (f / "index.json").is_file()), None)
    if index is None:
        raise UserError("its index.json is not beside it.")
    name = path.relative_to(index.parent).as_posix()
    for shard in json.loads(index.read_text(encoding="utf-8"))["shards"]:
        if name in [(shard[data] or {}).get("basename") for data in ("raw_data", "zip_data")]:
            break
    else:
        raise UserError(f"{index} does not list it.")
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix != ".mds":
            unpacked = Path(folder, shard["raw_data"]["basename"])
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            unpacked.write_bytes(decompress(shard["compression"], path.read_bytes()))
        reader = reader_from_json(str(index.parent) if path.suffix == ".mds" else folder, "", shard)
        reader.validate(allow_unsafe_types=False)
        for row in range(reader.samples):
            yield f"sample {row}", reader[row]


def read_litdata(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield the samples of a chunk of litdata, by its own package. A pickled field is refused."""
    import litdata
    from litdata.streaming.serializers import BytesSerializer

    index = json.loads((path.parent / "index.json").read_text(encoding="utf-8"))
    if "pickle" in index["config"]["data_format"]:
        raise UserError("it has pickled fields, which can run any program: write texts, numbers, images and bytes.")
    # Images stay encoded as they are.
    encoded = {name: BytesSerializer() for name in index["config"]["data_format"] if name.startswith(("jpeg", "image"))}
    encoded = {name.partition(":")[0]: serializer for name, serializer in encoded.items() if name != "jpeg_array"}
    samples = litdata.StreamingDataset(str(path.parent), serializers=encoded)
    first = 0
    for chunk in index["chunks"]:
        if chunk["filename"] == path.name:
            break
        first += chunk["chunk_size"]
    else:
        raise UserError("its index.json does not list it.")
    for row in range(chunk["chunk_size"]):
        sample = samples[first + row]
        yield f"sample {row}", sample if isinstance(sample, dict) else BadEntry(f"it is {shorten(sample)}, not fields.")


def read_table(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a Parquet file, of an Arrow stream (as `save_to_disk` writes it) or of an Arrow file."""
    import pyarrow
    import pyarrow.parquet

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
        chosen += [name for name in names if name not in chosen and _matters(name)]
        rows = 64  # at once: one may have megabytes
        if is_parquet:
            batches = table.iter_batches(batch_size=rows, columns=chosen)
        else:
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        parts = (batch.slice(start, rows) for batch in batches for start in range(0, batch.num_rows, rows))
        entries = itertools.chain.from_iterable(part.select(chosen).to_pylist() for part in parts)
        for row, entry in enumerate(entries):
            yield f"row {row}", entry
            passed_over.update(f"column {name}" for name in names if name not in chosen)


def _matters(name: str) -> bool:
    """Return whether a column says something about a record without being part of it: see `make_record`."""
    return bool(kind_of_name(name) or ADDRESS.fullmatch(name) or name.endswith(RATINGS))


def read_archive(path: Path, asked: Columns, passed_over: Counter) -> Iterator[tuple[str, dict | BadEntry]]:
    """Yield the samples of a WebDataset shard.

    A sample's images become the column `images`, the fields of its `.json` columns, and its `.txt` the column `txt`.
    A list in its `.json` is its conversation, as Megatron's and NeMo's scripts write it for energon. Other members are
    passed over.
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
        for key, sample in samples_of(members, passed_over):
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


def samples_of(
    members: Iterable[tarfile.TarInfo], passed_over: Counter
) -> Iterator[tuple[str, list[Member] | BadEntry]]:
    """Yield the samples of a shard: (key, its members, or why they are ambiguous).

    Members belong together if their names without the ending are equal, or if one continues the other after a dot:
    `a.txt`, `a.0.png`, `a.seg.png`. WebDataset's rule, the name up to its first dot, would make one sample of
    `v1.5-01.jpg` and `v1.5-02.jpg`. As there, a sample's members are adjacent, and hidden files are passed over.
    """
    runs, last = [], None
    for info in members:
        folder, _, base = info.name.rpartition("/")
        stem, _, ending = base.rpartition(".")
        if info.isdir() or not stem or stem.startswith("."):
            continue
        if ending.lower() not in (*IMAGE_KINDS, *TEXT_KINDS, *MEDIA_KINDS):
            passed_over[f"member .{ending.lower()}"] += 1
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
    others = [member for member in sample if member.kind not in IMAGE_KINDS]
    return others + [of_pattern[pattern].pop(0) for pattern in patterns]


def _add_member(entry: dict, member: Member, archive: tarfile.TarFile) -> None:
    kind, info = member.kind, member.info
    if not info.isfile():
        raise BadEntry(f"its {kind!r} is a link or a device and not a file.")
    if info.size > LARGEST_MEMBER:
        raise BadEntry(f"its {kind!r} has {info.size} bytes; more than {LARGEST_MEMBER} are refused.")
    if kind in MEDIA_KINDS:  # a column that the check of records refuses, or is told to leave unread
        entry.setdefault(MEDIA_KINDS[kind], info.name)
        return
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
    elif isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        entry["conversations"] = value
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
