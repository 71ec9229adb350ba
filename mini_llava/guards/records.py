"""Records that a run would train on otherwise than was meant, or not survive.

LLaVA looks for `image` and `conversations` and passes over everything else. Here `system` is read too, and a record is
refused if it has something under another name that data sets use for media or a system prompt, or, where it has no
image, a media file or its bytes under any other key. And if a question has a placeholder of another model's, such as
`<video>` or `<|image_pad|>`. What is meant to be left unread is named by `--leave_unread`.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice

from ..data.templates import IMAGE_MARK, BadRecord
from ..data.tokenization import NO_IMAGE, shorten

# Keys of LLaVA-Video, Video-LLaVA, LLaMA-Factory, ms-swift, Mantis, InternVL, SpatialBot and others, in any case. What
# says where a picture is from or how large (image_id, image_url, width, data_source) is not among them.
MEDIA_KEY = re.compile(
    r"images|imgs|image_list|(image|img|picture|photo)[_-]?\d+"
    r"|(video|audio|speech|sound|frame|depth|depth_?map|depth_?image|point_?cloud|pcd)s?([_-]?\d+)?"
    r"|(video|audio|speech|sound|frame|depth|point_?cloud|pcd)s?_(path|file|list|dir|folder)s?",
    re.IGNORECASE,
)
IDENTIFIER = re.compile(r"(?<!v)(?<!gr)ids?$", re.IGNORECASE)  # but not a vid or a grid
NOTHING = ("", "[]", "{}", "null")  # as text, too
PROMPT_KEY = re.compile(r"sys(tem)?([_-]?(prompt|message|instruction))?s?|tools|functions", re.IGNORECASE)

# A file name or an address that ends so, or the bytes of a file as text.
MEDIA_FILE = re.compile(
    r"[^\n]{0,1000}[^\s]\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|pgm|jp2|avif|heic|mp4|m4v|avi|mov|mkv|webm|flv|mpe?g|wav|mp3|flac"
    r"|ogg|m4a|opus|ply|pcd|npy|npz)(\?[^\n ]{1,1000})?",
    re.IGNORECASE,
)
MEDIA_BYTES = ("data:image/", "data:video/", "data:audio/", "/9j/4", "iVBORw0KGgo", "R0lGOD")  # base64: JPEG, PNG, GIF

# Placeholders that are nothing else: anywhere in a question.
PLACEHOLDER = re.compile(
    r"<\|(image|img|video|audio|vision|point|depth)[a-z0-9_]*\|>"
    r"|<(image|img|video|audio|speech|frame)[ _-]?(placeholder|here|content|context|token|soft_token|pad|\d+)>"
    r"|<start_of_(image|video|audio)>|<img>[^<>\n]+</img>",
    re.IGNORECASE,
)
# Those that are also HTML, or said of it: at the beginning of a question or alone on a line, and never closed. <Image>
# and <IMAGE> are others' marks, and text to us.
TAG = re.compile(
    r"<(?!(?-i:image>))(image|img|video|vid|audio|speech|sound|frame|depth|point|point_?cloud|pcd)s?>"
    r"|\[(img|image|video|audio)\]",
    re.IGNORECASE,
)
BEGINNING = re.compile(r"(?:\s+|<image>)*")
# Far beyond what a model can read. A record is tokenized whole before it is cut, and one of a million image marks would
# first become half a billion ids.
MAX_IMAGES = 1024
MAX_CHARACTERS = 4_000_000


class RecordCheck:
    """Refuses records whose media or prompt nobody reads, and those far too large to be read."""

    def __init__(self, left_unread: Iterable[str] = ()):
        """left_unread: keys and marks of `--leave_unread`; a number stands for any: `image_1` for `image_2` too."""
        self.left_unread = frozenset(map(_without_numbers, left_unread))

    def __repr__(self) -> str:
        return f"RecordCheck({sorted(self.left_unread)})"

    def __call__(self, record: dict) -> dict:
        """Return the record, without system prompts if they are left unread. What is no conversation stays as it is.

        Raises BadRecord, also for halves of surrogate pairs.
        """
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
        ):
            return record
        if "system" in self.left_unread:
            turns = [turn for turn in turns if turn.get("from") != "system"]
            record = {name: value for name, value in record.items() if name != "system"} | {"conversations": turns}
        texts = {f"turn {number}": turn["value"] for number, turn in enumerate(turns, start=1)}
        if isinstance(record.get("system"), str):
            texts["its 'system'"] = record["system"]
        for where, text in texts.items():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can escape what no text file can hold
                half = error.object[error.start]
                raise BadRecord(f"{where} holds {half!r}, half of a pair of characters.") from None
        if found := dict(islice(self.unread(record), 20)):
            raise BadRecord(_of_unread(found))
        if (characters := sum(map(len, texts.values()))) > MAX_CHARACTERS:
            raise BadRecord(f"its turns have {characters} characters; more than {MAX_CHARACTERS} are refused.")
        marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
        if marks > MAX_IMAGES:
            raise BadRecord(f"it has {marks} {IMAGE_MARK} marks; more than {MAX_IMAGES} are refused.")
        return record

    def unread(self, record: dict) -> Iterator[tuple[str, str]]:
        """Yield the keys and marks of a record that are not read, each with what it is: `media`, `prompt` or `mark`.

        record: whose turns are objects with a text `value`.
        """
        has_image = record.get("image") not in NO_IMAGE
        for name, value in record.items():
            if name not in ("id", "image", "conversations", "system") and value:
                kind = _kind_of(name, value, has_image)
                if kind and _without_numbers(name) not in self.left_unread:
                    yield name, kind
        for turn in record["conversations"]:
            for name, value in turn.items() if len(turn) > 2 else ():
                if name not in ("from", "value") and value:
                    kind = "media" if name == "image" else _kind_of(name, value, has_image)
                    if kind and _without_numbers(name) not in self.left_unread:
                        yield name, kind
        for turn in record["conversations"]:
            for mark in _marks(turn["value"]) if turn.get("from") == "human" else ():
                if _without_numbers(mark) not in self.left_unread:
                    yield mark, "mark"


def _of_unread(found: dict[str, str]) -> str:
    """Return a sentence about the first of what `unread` found, with the flag that lets all of it pass."""
    names = (name[:200] if name[:200].isprintable() else ascii(name[:200])[1:-1] for name in found)
    flag = " ".join(["--leave_unread", *map(shlex.quote, names)])
    name, kind = next(iter(found.items()))
    shown = shorten(name)
    if kind == "mark":
        return (
            f"a question has the mark {shown}, which is not read: an image's place is marked by {IMAGE_MARK}, other "
            f"media are not known. Write {IMAGE_MARK} for an image, or leave it in the text with {flag}."
        )
    if kind == "prompt":
        return (
            f"its key {shown} looks like a prompt and is not read: a system prompt is read only from the record's "
            f"'system'. Put it there or into the first question, or train without it with {flag}."
        )
    return (
        f"its key {shown} looks like media and is not read: images are read only from the record's 'image', other "
        f"media not at all. Put the name of an image under 'image', or train without it with {flag}."
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _kind_of(name: str, value: object, has_image: bool) -> str | None:
    """`media` or `prompt` if that is what a key and its value look like."""
    if kind := kind_of_name(name):
        # Numbers are boxes, points and seconds.
        return kind if any(isinstance(t, bytes) or t.strip() not in NOTHING for t in _strings(value)) else None
    if has_image or IDENTIFIER.search(name):
        return None
    found = any(isinstance(text, bytes) or _is_media(text) for text in _strings(value))
    return "media" if found else None


def _is_media(text: str) -> bool:
    return text.startswith(MEDIA_BYTES) or MEDIA_FILE.fullmatch(text) is not None


@lru_cache(maxsize=1024)
def kind_of_name(name: str) -> str | None:
    """`media` or `prompt` if data sets have that under a key of this name, whatever stands there."""
    if len(name) > 100:
        return None
    return "media" if MEDIA_KEY.fullmatch(name) else "prompt" if PROMPT_KEY.fullmatch(name) else None


def _strings(value: object, depth: int = 3) -> Iterator[str | bytes]:
    """The texts in a value, in lists and objects too; of long lists those among the first hundred."""
    if isinstance(value, str | bytes):
        yield value
    elif depth and isinstance(value, dict | list):
        for part in islice(value.values() if isinstance(value, dict) else value, 100):
            yield from _strings(part, depth - 1)


def _marks(text: str) -> Iterator[str]:
    if "<" not in text and "[" not in text:
        return
    yield from (found[0] for found in PLACEHOLDER.finditer(text))
    if not TAG.search(text):  # as in nearly all texts
        return
    closed = {}
    for found in _tags_that_stand_alone(text):
        tag, bracket = found.groups()
        if (tag, bracket) not in closed:
            closed[tag, bracket] = (f"</{tag}" if tag else f"[/{bracket}]") in text
        if not closed[tag, bracket]:
            yield found[0]


def _tags_that_stand_alone(text: str) -> Iterator[re.Match]:
    place = BEGINNING.match(text).end()
    while found := TAG.match(text, place):
        yield found
        place = BEGINNING.match(text, found.end()).end()
    yield from filter(None, (TAG.fullmatch(line.strip()) for line in text.split("\n")))
