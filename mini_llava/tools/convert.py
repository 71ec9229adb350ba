"""Convert data sets to records and an image folder: `python -m mini_llava.tools.convert SOURCE ... --output FOLDER`.

Reads the forms of `data_forms.py`. Images are copied byte for byte under new names: no name in the data is used as a
path. Each input file is converted as a whole, so that a killed conversion can continue. What became no record and what
was passed over is counted by cause. Exit code: 0 if every entry became a record, 1 if some did not and are listed, 2 if
flags or files cannot be read.
"""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import numbers
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from PIL import Image
from tqdm import tqdm

from ..command_line import Parser, boolean
from ..data.templates import IMAGE_MARK, BadRecord, get_template
from ..data.tokenization import read_conversation, shorten, template_for
from ..errors import UserError
from ..files import atomic_write
from ..guards.records import MEDIA_BYTES, RecordCheck, kind_of_name
from ..image_files import FORMATS, BadImage, LinkedFolder, image_path
from ..watch.json_lines import read_lines
from ..watch.skipped import count_reasons
from ..words import counted
from .data_forms import (
    ADDRESS,
    ID_COLUMNS,
    IMAGE_COLUMNS,
    RATINGS,
    TEXT_COLUMNS,
    BadEntry,
    Columns,
    choose_columns,
    input_files,
    read_entries,
)

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
PAIRS = (("user", "assistant"), ("question", "answer"))
BESIDE = ("image", "tool_calls", "function_call")  # of a message, beside what looks like media or a prompt
WEB = ("http://", "https://", "ftp://", "s3://", "gs://")
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}  # of other formats: their name in lower case

# --- an entry --------------------------------------------------------------------------------------------------------


def encoded_images(value: object, image_root: str | None) -> list[bytes]:
    """Return the encoded images of a column or a part: bytes, `datasets`' structs, names, data URLs, or lists of these.

    Raises BadEntry, for an address on the web too, from which nothing is loaded.
    """
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [content for item in value for content in encoded_images(item, image_root)]
    if isinstance(value, bytes | bytearray | memoryview):
        return [bytes(value)]
    if isinstance(value, Image.Image):  # what readers of others' packages have decoded
        return [_encoded(value)]
    if isinstance(value, dict) and value.keys() & {"bytes", "path", "url"}:
        encoded = value.get("bytes")
        return encoded_images(value.get("path") or value.get("url") if encoded is None else encoded, image_root)
    if not isinstance(value, str):
        raise BadEntry(f"its image is {shorten(value)}, which is neither an encoded image nor a file name.")
    if value.startswith(("data:", *MEDIA_BYTES)):  # base64, with its kind in front or not
        try:
            return [base64.b64decode(value.partition("base64,")[2] or value, validate=True)]
        except ValueError:
            raise BadEntry(f"its image {shorten(value)} is not base64.") from None
    if value.startswith(WEB):
        raise BadEntry(
            f"its image is an address on the web, {shorten(value)}, from which nothing is loaded: fetch the images "
            f"first (img2dataset writes shards that are read here)."
        )
    if image_root is None:
        raise BadEntry(f"its image is not in the data but a file, {shorten(value)}: say where by --image_root.")
    try:
        name = unquote(value.removeprefix("file://")) if value.startswith("file://") else value
        return [Path(image_path(image_root, name)).read_bytes()]
    except BadImage as error:
        raise BadEntry(str(error)) from None


def _encoded(image: Image.Image) -> bytes:
    """Return the bytes an image was opened from, or a PNG of its pixels."""
    if isinstance(getattr(image, "fp", None), io.BytesIO):
        return image.fp.getvalue()
    content = io.BytesIO()
    try:
        image.save(content, "PNG")
    except OSError as error:
        raise BadEntry(f"its image of Pillow's mode {image.mode} cannot be saved: {error}.") from None
    return content.getvalue()


def is_nothing(value: object) -> bool:
    """Return whether a column says nothing. Arrays, which have no truth, say something."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def suffix_of(content: bytes) -> str:
    """Return a file's suffix, `.jpg` for a JPEG. Raises BadEntry for an image that the trainer cannot read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the doctor and the trainer warn
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return SUFFIXES.get(image.format, f".{image.format.lower()}")
    except Exception:  # Pillow's decoders raise nearly everything on damaged files
        raise BadEntry(f"its image of {len(content)} bytes cannot be read.") from None


def turns_of(
    value: object, drop_system: bool, left_unread: Sequence[str] = ()
) -> tuple[list[tuple[str, str]], list[object] | None]:
    """Return the turns of a text, (human, gpt or system, text), and the images that its parts hold.

    The keys decide: LLaVA's `from` and `value`, chat messages' `role` and `content`, or pairs of `user` and
    `assistant` or `question` and `answer`. A plain text is a caption. Images are None where no message is in parts;
    otherwise one for each mark in the text, None where it is in a column. A thought beside an answer comes before it.

    Raises BadEntry, also for what a message has beside its text and would be missed.
    """
    if isinstance(value, str) and value.startswith("[{"):  # where a column has to be of texts
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str):
        return [("human", ""), ("gpt", value)], None
    turns, images, in_parts = [], [], False
    for number, item in enumerate(_objects(value), start=1):
        if {"from", "value"} <= item.keys():
            said = [(item["from"], item["value"])]
        elif {"role", "content"} <= item.keys():
            said = [(item["role"], _with_thought(item))]
        elif pair := next((pair for pair in PAIRS if set(pair) <= item.keys()), None):
            said = [("human", item[pair[0]]), ("gpt", item[pair[1]])]
        else:
            raise BadEntry(f"turn {number} has the keys {', '.join(map(str, item))}, which are not known.")
        for name, beside in item.items():
            if name not in left_unread and not is_nothing(beside) and (name in BESIDE or kind_of_name(name)):
                raise BadEntry(
                    f"turn {number} has {shorten(name)} beside its text, where it is not read: images are read from a "
                    f"column or from parts of the message. Or train without it by --leave_unread {name}."
                )
        for role, content in said:
            if drop_system and ROLES.get(role) == "system":
                continue
            in_parts = in_parts or isinstance(content, list)
            turns.append((role, _text(content, number, images)))
    for number, (role, text) in enumerate(turns, start=1):
        if ROLES.get(role) == "system" and number > 1:
            raise BadEntry(f"turn {number} is a system prompt, which comes first: --drop_system leaves it out.")
        if role not in ROLES or not isinstance(text, str):
            raise BadEntry(f"turn {number} is {shorten(text)} from {shorten(role)}, not a text from a known role.")
    return [(ROLES[role], text) for role, text in turns], images if in_parts else None


def _with_thought(message: dict) -> object:
    """Return a message's content behind its `reasoning_content`, if it has one, as models that think write it."""
    thought, said = message.get("reasoning_content"), message["content"]
    if isinstance(thought, str) and thought.strip() and isinstance(said, str):
        return f"<think>\n{thought.strip()}\n</think>\n\n{said}"
    return said


def images_by_marks(in_column: list[bytes], in_parts: list[object] | None, image_root: str | None) -> list[bytes]:
    """Return the images in the order of their marks: those that parts hold, and for marks alone those of the column."""
    if not in_parts or all(image is None for image in in_parts):
        return in_column
    rest, images = iter(in_column), []
    for image in in_parts:
        images += itertools.islice(rest, 1) if image is None else encoded_images(image, image_root)
    rest = list(rest)
    return images if rest == images else images + rest  # some data sets have them in both places


def mark_images(turns: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """Return the turns with marks in front of the first question for images that have none in the text."""
    if images and turns and not any(IMAGE_MARK in text for role, text in turns if role == "human"):
        first = next((number for number, (role, _) in enumerate(turns) if role == "human"), 0)
        text = "\n".join([*[IMAGE_MARK] * images, turns[first][1]]).rstrip("\n")
        turns = [*turns[:first], (turns[first][0], text), *turns[first + 1 :]]
    return turns


def well_rated(turns: list[tuple[str, str]], entry: dict, least: int) -> list[tuple[str, str]]:
    """Return the turns without the rounds of which a rating is less than `least`. Raises BadEntry if none is left."""
    ratings = [value for name, value in entry.items() if name.endswith(RATINGS) and isinstance(value, list)]
    first = sum(role == "system" for role, _ in turns)
    rounds = [turns[start : start + 2] for start in range(first, len(turns), 2)]
    if not ratings or any(len(values) != len(rounds) for values in ratings):
        found = [len(values) for values in ratings] or "no"
        raise BadEntry(f"it has {len(rounds)} rounds and {found} ratings for --min_rating to compare.")
    rated = zip(rounds, zip(*ratings, strict=True), strict=True)
    kept = [turn for turn, values in rated if all(value is None or value >= least for value in values)]
    if not kept:
        raise BadEntry(f"each of its rounds has a rating below {least} (--min_rating).")
    return turns[:first] + [said for turn in kept for said in turn]


def pairs_of(text: object, answer: object, are_points: bool) -> list[dict]:
    """Return the questions and answers of two columns, each with one or with a list; of points those of Molmo.

    Raises BadEntry.
    """
    if not isinstance(answer, list):
        text, answer = [text], [answer]
    if not isinstance(text, list) or len(text) != len(answer):
        raise BadEntry(f"its text is {shorten(text)}; expected as many as the {len(answer)} answers or labels to it.")
    if are_points:
        return [dict(zip(PAIRS[1], _pointing(*pair), strict=True)) for pair in zip(answer, text, strict=True)]
    return [dict(zip(PAIRS[1], pair, strict=True)) for pair in zip(text, answer, strict=True)]


def _pointing(label: object, points: object) -> tuple[str, str]:
    """Return question and answer about points, in Molmo's words: percent of width and height, from left to right."""
    try:
        places = sorted((round(float(point["x"]), 1), round(float(point["y"]), 1)) for point in _rows(points))
    except (TypeError, KeyError, ValueError):
        raise BadEntry(f"its points are {shorten(points)}; expected a list of objects with x and y.") from None
    if outside := [place for place in places if not (0 <= place[0] <= 100 and 0 <= place[1] <= 100)]:
        raise BadEntry(f"its point {shorten(outside[0])} is outside the image: PixMo's are in percent, from 0 to 100.")
    if not isinstance(label, str) or not label.strip():
        raise BadEntry(f"its label is {shorten(label)}; expected the name of what its points show.")
    question = f"Point to {label}."
    if not places:
        return question, "There are none."
    which = [""] if len(places) == 1 else range(1, len(places) + 1)
    where = " ".join(f'x{number}="{x}" y{number}="{y}"' for number, (x, y) in zip(which, places, strict=True))
    tag = "point" if len(places) == 1 else "points"
    return question, f'<{tag} {where} alt="{html.escape(label)}">{label}</{tag}>'


def _rows(value: object) -> object:
    """Return a list of objects that `datasets` may have stored as an object of lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return value


def _objects(value: object) -> list[dict]:
    """Return the turns of a conversation as they are stored. Raises BadEntry."""
    value = _rows(value)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise BadEntry(f"its text is {shorten(value)}; expected a text or a list of turns.")
    return value


def _text(content: object, number: int, images: list[object]) -> object:
    """Return the content of a turn as text, each part of a message on a line, and append the images of its marks.

    Raises BadEntry.
    """
    if isinstance(content, numbers.Real) and not isinstance(content, bool):
        content = str(content)
    if not isinstance(content, list):
        images += [None] * (content.count(IMAGE_MARK) if isinstance(content, str) else 0)
        return content
    lines = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind is None:  # Qwen's need not say
            kind = next((name for name in ("image", "text") if part.get(name) is not None), None)
        if kind in IMAGE_PARTS:
            lines.append(IMAGE_MARK)
            image = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name)), None)
            if image is None and part.get("index") not in (None, images.count(None)):
                raise BadEntry(f"turn {number} has the image {part['index']} where {images.count(None)} comes next.")
            images.append(image)
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            lines.append(part["text"])
            images += [None] * part["text"].count(IMAGE_MARK)
        else:
            raise BadEntry(f"turn {number} has the part {shorten(part)}, which is neither a text nor an image.")
    return "\n".join(lines)


# --- records ---------------------------------------------------------------------------------------------------------


def make_record(
    entry: dict, name: str, place: str, given: argparse.Namespace, passed_over: Counter
) -> tuple[dict, dict[str, bytes]]:
    """Return the record of an entry, and its images by their names. Raises BadEntry or BadRecord.

    Args:
        name: the record's id, unless the entry has one.
        place: the names of its images, without number and suffix.
        passed_over: counts what of the entry is not in the record, by what it is.
    """
    try:
        columns = choose_columns(list(entry), given.columns)
    except ValueError as error:
        raise BadEntry(str(error)) from None
    images = [image for column in columns.image for image in encoded_images(entry[column], given.image_root)]
    text = entry[columns.text]
    are_points = bool(columns.answer) and columns.text.lower() == "points"
    if columns.answer:
        text = pairs_of(text, entry[columns.answer], are_points)
    turns, in_parts = turns_of(text, not given.keep_system, given.leave_unread)
    images = images_by_marks(images, in_parts, given.image_root)
    if not images:
        _check_addresses(entry, columns, given)
        if isinstance(text, str) and len(turns) == 2 and not turns[0][1]:
            raise BadEntry("it is a caption without an image.")
        if are_points:
            raise BadEntry("it has points and no image.")
    if given.min_rating is not None:
        rounds = len(turns)
        turns = well_rated(turns, entry, given.min_rating)
        passed_over[f"round with a rating below {given.min_rating}"] += (rounds - len(turns)) // 2
    identifier = entry.get(columns.id)
    record = {"id": name if identifier is None else str(identifier)}
    places = [place] if len(images) == 1 else [f"{place}-{number}" for number in range(1, len(images) + 1)]
    names = [f"{place}{suffix_of(image)}" for place, image in zip(places, images, strict=True)]
    if names:
        record["image"] = names[0] if len(names) == 1 and in_parts is None else names
    if given.keep_system and entry.get("system"):
        record["system"] = entry["system"]
    record["conversations"] = [{"from": role, "value": said} for role, said in mark_images(turns, len(images))]
    not_taken = {name: value for name, value in entry.items() if name not in columns.all and kind_of_name(name)}
    not_taken.pop("system", None)
    check_record(not_taken | record, given.check)
    read = {*columns.all, *ID_COLUMNS, *(["system"] if given.keep_system else [])}
    left = (name for name, value in entry.items() if name not in read and not is_nothing(value))
    passed_over.update(f"column {name}" for name in left)
    return record, dict(zip(names, images, strict=True))


def _check_addresses(entry: dict, columns: Columns, given: argparse.Namespace) -> None:
    """Raise BadEntry if an entry without images says where one is."""
    for name, value in entry.items():
        if ADDRESS.fullmatch(name) and value and name not in columns.image and name not in given.leave_unread:
            first = value[0] if isinstance(value, list) else value
            if isinstance(first, str) and first.startswith(WEB):
                encoded_images(first, None)  # raises
            raise BadEntry(
                f"its column {name!r} says where its image is: name it by --image_column, or --leave_unread."
            )


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
    part, bad, passed = (_part(output, number, kind) for kind in ("records", "bad", "passed"))
    if part.exists():
        return
    passed_over = Counter()
    entries = read_entries(path, given.columns, passed_over)
    entries = tqdm(entries, desc=path.name, unit=" entries", delay=2, mininterval=1, leave=False)
    with atomic_write(part) as good_lines, atomic_write(bad) as bad_lines, atomic_write(passed) as passed_lines:
        # The part appears last.
        for row, (name, entry) in enumerate(entries):
            place = f"{number:05d}/{row // 1000:04d}/{row:07d}"  # no folder with a hundred thousand files
            try:
                if isinstance(entry, BadEntry):
                    raise entry
                record, images = make_record(entry, f"{path.name} {name}", place, given, passed_over)
            except (BadEntry, BadRecord) as error:
                entry = {"file": str(path), "entry": name, "reason": str(error)}
                bad_lines.write(json.dumps(entry).encode() + b"\n")
                continue
            for image, content in images.items():
                (output / "images" / image).parent.mkdir(parents=True, exist_ok=True)
                (output / "images" / image).write_bytes(content)
            good_lines.write(json.dumps(record).encode() + b"\n")
        for what, count in sorted(passed_over.items()):
            passed_lines.write(json.dumps({"file": str(path), "what": what, "count": count}).encode() + b"\n")
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
    passed = output / "passed_over.jsonl"
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
        for kind, whole in (("bad", faults), ("passed", passed), ("records", records)):
            with atomic_write(whole) as file:
                file.writelines(_part(output, number, kind).read_bytes() for number in range(len(files)))
    shutil.rmtree(output / "parts", ignore_errors=True)

    with open(records, "rb") as lines:
        count = sum(1 for _ in lines)
    reasons = [entry["reason"] for entry in read_lines(faults)]
    print(f"{counted(count, 'record')}: train.py --data_path {records} --image_folder {output / 'images'}")
    passed_over = Counter()
    for line in read_lines(passed):
        passed_over[line["what"]] += line["count"]
    if +passed_over:
        found = (f"{what} ({count:,})" for what, count in (+passed_over).most_common())
        print(f"Not in the records: {', '.join(found)}.")
    if reasons:
        which = "1 entry" if len(reasons) == 1 else f"{len(reasons):,} entries"
        print(f"{which} became no record, listed in {faults}:")
        print("\n".join(f"  {line}" for line in count_reasons(reasons)))
    return len(reasons)


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m mini_llava.tools.convert", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a directory written by datasets' save_to_disk, a directory of files, or a file",
    )
    add("--output", required=True, metavar="FOLDER", help="folder for records.jsonl and images/")
    add("--split", metavar="NAME", help="split to convert, if the source has several")
    add(
        "--text_column",
        metavar="NAME",
        help=f"column with conversations or captions [the first of {', '.join(TEXT_COLUMNS)}]",
    )
    image_help = (
        f"column with images; repeat for several [the first of {', '.join(IMAGE_COLUMNS)}, or image_1, image_2, ...]"
    )
    add("--image_column", metavar="NAME", action="append", default=[], help=image_help)
    add(
        "--id_column", metavar="NAME", help=f"column with ids [the first of {', '.join(ID_COLUMNS)}, else file and row]"
    )
    add("--image_root", metavar="FOLDER", help="folder of images that the data refer to by name")
    add("--follow_links", nargs="?", type=boolean, const=True, metavar="True|False", help="as for train.py")
    rating_help = f"leave out rounds with a lower rating (columns that end with {RATINGS}, as FineVision's)"
    add("--min_rating", type=int, metavar="NUMBER", help=rating_help)
    add("--drop_system", action="store_true", help="leave out system prompts, as templates have their own")
    unread_help = "columns and marks to ignore although they look like media or a prompt, as in train.py"
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
