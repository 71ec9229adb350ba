"""Turns packages of drawn emoji into pictures and LLaVA's records: for training, and held out in three ways.

Each thing that Unicode names ("dog face", category animals and nature) was drawn by many designers. Ten sets of
drawings are trained on. Held out are another designer's drawings of the same things, a tenth of the things by whichever
designer, and photographs of the same things.
"""

import argparse
import io
import json
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SIDE = 192  # pixels of the pictures that are written; the tower takes 256
TEXTS = "emojibase-data-*.tgz"
ICONS = "package/icons.json"  # Iconify's form: a set of SVG drawings in one file, by name
# Set of drawings: (package, pictures in it). Fluent, in any of its styles, is trained on nowhere.
TRAINED_HANDS = {
    "noto": ("iconify-json-noto-1*.tgz", ICONS),
    "noto-v1": ("iconify-json-noto-v1-*.tgz", ICONS),
    "twemoji": ("iconify-json-twemoji-*.tgz", ICONS),
    "emojione": ("iconify-json-emojione-1*.tgz", ICONS),
    "emojione-v1": ("iconify-json-emojione-v1-*.tgz", ICONS),
    "emojione-monotone": ("iconify-json-emojione-monotone-*.tgz", ICONS),
    "fxemoji": ("iconify-json-fxemoji-*.tgz", ICONS),
    "streamline": ("iconify-json-streamline-emojis-*.tgz", ICONS),
    "openmoji": ("openmoji-*.tgz", r"package/color/svg/(.+)\.svg"),
    "openmoji-black": ("openmoji-*.tgz", r"package/black/svg/(.+)\.svg"),
}
NEW_HAND = {"fluent": ("lobehub-fluent-emoji-3d-*.tgz", r"package/assets/(.+)\.webp")}
CATEGORIES = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
UNSEEN_SHARE = 0.1
PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "prince", "princess", "mx"}
NOT_FLUENTS = "flags"  # Fluent has none, and its package has Noto's in their place
EMPTY_WORDS = {"a", "an", "and", "at", "for", "from", "in", "no", "of", "on", "or", "s", "the", "to", "with"}
PHOTOGRAPHED = ("animals", "food", "hobbies", "household", "plants", "sports", "vehicles")

BRIEFLY = "Answer with a word or a short phrase."
# The first of each is what held-out pictures are asked.
NAME = (
    f"What does the picture show? {BRIEFLY}",
    "What is this?",
    "Name what you see.",
    "What is drawn here?",
    f"What is in the image? {BRIEFLY}",
)
CATEGORY = (
    f"Which category does the picture belong to: {', '.join(CATEGORIES.values())}? {BRIEFLY}",
    "What kind of thing is this?",
    "Which category is it in?",
)
KEYWORDS = ("Which keywords describe the picture?", "Give keywords for the picture.", "Which words go with it?")
YES_OR_NO = (
    "Does the picture show this: {name}? Answer yes or no.",
    "Is this a picture of: {name}?",
    "Yes or no: is it {name}?",
)
CHOICE = ("Which of these does the picture show: {names}?", "Choose what you see: {names}.")


class Thing(NamedTuple):
    """What Unicode says of one emoji: its name, category and keywords."""

    key: str
    name: str
    category: str
    keywords: tuple[str, ...]

    @property
    def family(self) -> str:
        """The name without who: "woman astronaut" and "man astronaut" are one family, held out together."""
        return " ".join(word for word in re.split(r"[ :,]+", self.name) if word not in PEOPLE)


def same_key(hexcode: str) -> str:
    """One spelling for the code points in packages' file names, without variation selectors and joiners."""
    parts = [part.lstrip("0") for part in hexcode.lower().split("-")]
    return "-".join(part for part in parts if part not in ("fe0f", "200d"))


def read_things(package: Path) -> dict[str, Thing]:
    """The things in emojibase's English data; skin tones are not things of their own."""
    with tarfile.open(package) as packed:
        entries = json.load(packed.extractfile("package/en/data.json"))
    things = {}
    for entry in entries:
        if (category := CATEGORIES.get(entry.get("group"))) is not None:
            key, words = same_key(entry["hexcode"]), entry.get("tags", [])
            things[key] = Thing(key, entry["label"], category, tuple(word for word in words if len(word) > 1))
    return things


def read_pictures(package: Path, pattern: str, things: dict[str, Thing]) -> Iterator[tuple[str, Image.Image]]:
    """(key of the thing, square picture on white) of each file or icon in a package that shows a known thing."""
    seen = set()
    for key, data in read_icons(package, things) if pattern == ICONS else read_files(package, pattern):
        if key in things and key not in seen:
            seen.add(key)
            yield key, on_white(Image.open(io.BytesIO(draw(data) if data.startswith(b"<") else data)))


def read_files(package: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(key, contents) of the files in a package whose name is the code points of an emoji."""
    with tarfile.open(package) as packed:
        for member in packed:
            if found := re.fullmatch(pattern, member.name):
                yield same_key(found[1]), packed.extractfile(member).read()


def read_icons(package: Path, things: dict[str, Thing]) -> Iterator[tuple[str, bytes]]:
    """(key, SVG file) of the icons in a set of Iconify's that have an emoji's code points or name.

    Where a set has code points (chars.json) they count; otherwise names do, but for spaces, hyphens and numbers at
    the end: "flag-for-albania", "baby-1".
    """
    with tarfile.open(package) as packed:
        icons, chars = (json.load(packed.extractfile(f"package/{name}.json")) for name in ("icons", "chars"))
    by_code = {name: same_key(code) for code, name in reversed(chars.items()) if same_key(code) in things}
    by_name = {letters(thing.name): thing.key for thing in things.values()}
    for name, icon in icons["icons"].items():
        name_here = name.replace("flag-for-flag-", "flag-").replace("flag-for-", "flag-")
        plain = letters(re.sub(r"-\d$", "", name_here))
        candidates = letters(name_here), plain, plain.removesuffix("face")
        key = by_code.get(name) or next((by_name[found] for found in candidates if found in by_name), None)
        if key is None:
            continue
        left, top, width, height = (
            icon.get(field, icons.get(field, default))
            for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
        yield key, f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{icon["body"]}</svg>'.encode()


def letters(name: str) -> str:
    """A name's letters and digits, small."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def draw(svg: bytes) -> bytes:
    """A PNG of an SVG file, SIDE pixels wide and high."""
    import resvg_py  # needed for preparing only

    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode("utf-8"), width=SIDE, height=SIDE))


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a white square of at most SIDE pixels."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.convert("RGB")
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if side > SIDE else square


def read_photographs(folder: Path, things: dict[str, Thing]) -> Iterator[tuple[str, str, Image.Image]]:
    """(key, name of the file, picture) of Tux Paint's stamps whose description is the name of a thing.

    In these folders, but for their cartoons, the stamps are photographs without a background.
    """
    by_name = {thing.name.lower(): thing for thing in things.values()}
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.is_file() or path.relative_to(folder).parts[0] not in PHOTOGRAPHED or "cartoon" in path.parts:
            continue
        name = re.sub(r"^(an?|the|some) ", "", text.read_text(encoding="utf-8").split("\n")[0].strip(" .!").lower())
        thing = by_name.get(name) or by_name.get(name.removesuffix("s"))
        if thing:
            yield thing.key, path.stem, on_white(Image.open(path))


def conversation(*rounds: tuple[str, str]) -> list[dict]:
    """LLaVA's turns, with the picture in front of the first question."""
    turns = []
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def caption_record(thing: Thing, image: str) -> dict:
    """Stage 1: the name, and the keywords where there are some."""
    caption = f"{thing.name}. Keywords: {', '.join(thing.keywords)}." if thing.keywords else f"{thing.name}."
    return {"id": f"{image} caption", "image": image, "conversations": conversation(("", caption))}


def training_records(thing: Thing, image: str, others: list[Thing], generator: random.Random) -> list[dict]:
    """Stage 2: four conversations about one picture, each with other questions in other words, so one epoch is enough.

    others: the things of the same category that are trained on; wrong names are theirs.
    """
    others = [other for other in others if other.name != thing.name]

    def ask(wordings: tuple[str, ...], **values: str) -> str:
        return generator.choice(wordings).format(**values)

    def name() -> tuple[str, str]:
        return ask(NAME), thing.name

    def keywords() -> list[tuple[str, str]]:
        return [(ask(KEYWORDS), ", ".join(thing.keywords))] if thing.keywords else []

    def yes_or_no() -> list[tuple[str, str]]:
        both = [(thing.name, "yes"), (generator.choice(others).name, "no")]
        generator.shuffle(both)
        return [(ask(YES_OR_NO, name=asked), answer) for asked, answer in both]

    choices = [thing.name, *(other.name for other in generator.sample(others, min(3, len(others))))]
    generator.shuffle(choices)
    category = ask(CATEGORY), thing.category
    return [
        {"id": f"{image} {kind}", "image": image, "conversations": conversation(*rounds)}
        for kind, rounds in (
            ("name", [name(), *keywords()]),
            ("category", [category, name()]),
            ("yes_no", [*yes_or_no(), name()]),
            ("choice", [(ask(CHOICE, names=", ".join(choices)), thing.name), *keywords()]),
        )
    ]


def questions(thing: Thing, image: str, others: list[Thing], generator: random.Random) -> Iterator[dict]:
    """Held out: one question a record. `thing`, `kind` and `words` are for the score and mean nothing to train.py.

    others: the things of the same category, of which one is asked about where "no" is right. For a thing that is not
    trained on they are not either, so that knowing which names were trained on says nothing.
    """
    others = [other for other in others if other.name != thing.name]
    is_yes = generator.random() < 0.5 or not others
    asked = thing if is_yes else generator.choice(others)
    rounds = {
        "name": (NAME[0], thing.name),
        "category": (CATEGORY[0], thing.category),
        "yes_no": (YES_OR_NO[0].format(name=asked.name), "yes" if is_yes else "no"),
    }
    words = sorted(set(re.findall(r"\w+", " ".join((thing.name, *thing.keywords)).lower())) - EMPTY_WORDS)
    for kind, asked_and_answered in rounds.items():
        about = {"id": f"{image} {kind}", "image": image, "thing": thing.key, "kind": kind, "words": words}
        yield about | {"conversations": conversation(asked_and_answered)}


def prepare(
    packages: Path,
    stamps: Path | None,
    output: Path,
    trained_hands: dict[str, tuple[str, str]] = TRAINED_HANDS,
    seed: int = 0,
) -> dict[str, int]:
    """Writes output/images and the records beside it; returns how many records each file has.

    Raises FileNotFoundError if a package is missing.
    """
    generator = random.Random(seed)
    things = read_things(the_file(packages, TEXTS))
    families = sorted({thing.family for thing in things.values()})
    held_out = set(generator.sample(families, round(len(families) * UNSEEN_SHARE)))
    unseen = {key for key, thing in things.items() if thing.family in held_out}
    # What may be asked about in place of a thing: of its category, and like it trained on or not.
    alike = {key: (thing.category, key in unseen) for key, thing in things.items()}
    others = {group: [things[key] for key in sorted(alike) if alike[key] == group] for group in set(alike.values())}
    files = {name: [] for name in ("stage1", "stage2", "new_hand", "new_things", "photographs")}
    drawn = set()

    def keep(hand: str, name: str, picture: Image.Image) -> str:
        (output / "images" / hand).mkdir(parents=True, exist_ok=True)
        picture.save(output / "images" / hand / f"{name}.webp", quality=75)
        return f"{hand}/{name}.webp"

    for hand, (pattern, inside) in (trained_hands | NEW_HAND).items():
        for key, picture in read_pictures(the_file(packages, pattern), inside, things):
            thing = things[key]
            if hand in NEW_HAND and thing.category == NOT_FLUENTS:
                continue
            image, around = keep(hand, key, picture), others[alike[key]]
            if key in unseen:
                files["new_things"] += questions(thing, image, around, generator)
            elif hand in trained_hands:
                drawn.add(key)
                files["stage1"].append(caption_record(thing, image))
                files["stage2"] += training_records(thing, image, around, generator)
            elif key in drawn:
                files["new_hand"] += questions(thing, image, around, generator)
    for key, name, picture in read_photographs(stamps, things) if stamps else ():
        if key in drawn:
            image = keep("photographs", name, picture)
            files["photographs"] += questions(things[key], image, others[alike[key]], generator)
    for name, records in files.items():
        (output / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
    return {name: len(records) for name, records in files.items()}


def the_file(packages: Path, pattern: str) -> Path:
    """The one file of that name. Raises FileNotFoundError that says where to read what to fetch."""
    found = sorted(packages.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{packages} has {len(found)} files {pattern}, and one is needed: README.md beside this script has the "
            f"commands that fetch it."
        )
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm packages, as fetched")
    parser.add_argument("--stamps", type=Path, help="Tux Paint's folder stamps/, for the photographs; none without it")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    for name, count in prepare(given.packages, given.stamps, given.output).items():
        print(f"{given.output}/{name}.json: {count:,} records")


if __name__ == "__main__":
    main()
