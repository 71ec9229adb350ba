"""Turns packages of drawn emoji into pictures and LLaVA's records: for training, and held out in three ways.

Each thing that Unicode names ("dog face", category animals and nature) was drawn by several designers. Four of them are
trained on. Held out are a fifth designer's drawings of the same things, a tenth of the things by whichever designer,
and photographs of the same things.
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

SIDE = 128  # of the pictures that are written at most; Noto's and Twemoji's have 64 pixels in their packages
TEXTS = "emojibase-data-*.tgz"
# Designer: (package, pictures in it). Fluent is trained on nowhere.
TRAINED_HANDS = {
    "noto": ("emoji-datasource-google-*.tgz", r"package/img/google/64/(.+)\.png"),
    "twemoji": ("emoji-datasource-twitter-*.tgz", r"package/img/twitter/64/(.+)\.png"),
    "emojione": ("emojione-2*.tgz", r"package/assets/png_128x128/(.+)\.png"),
    "openmoji": ("openmoji-*.tgz", r"package/color/svg/(.+)\.svg"),
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
NOT_FLUENTS = "flags"  # Fluent has none, and its package has Noto's in their place
PHOTOGRAPHED = ("animals", "food", "hobbies", "household", "plants", "sports", "vehicles")

BRIEFLY = "Answer with a word or a short phrase."
NAME = f"What does the picture show? {BRIEFLY}"
CATEGORY = f"Which category does the picture belong to: {', '.join(CATEGORIES.values())}? {BRIEFLY}"
KEYWORDS = "Which keywords describe the picture?"
YES_OR_NO = "Does the picture show this: {name}? Answer yes or no."


class Thing(NamedTuple):
    """What Unicode says of one emoji: its name, category and keywords."""

    key: str
    name: str
    category: str
    keywords: tuple[str, ...]


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
    """(key of the thing, square picture on white) of each file in a package that shows a known thing."""
    with tarfile.open(package) as packed:
        seen = set()
        for member in packed:
            found = re.fullmatch(pattern, member.name)
            if found and (key := same_key(found[1])) in things and key not in seen:
                seen.add(key)
                data = packed.extractfile(member).read()
                yield key, on_white(Image.open(io.BytesIO(draw(data) if member.name.endswith(".svg") else data)))


def draw(svg: bytes) -> bytes:
    """A PNG of an SVG file, SIDE pixels wide."""
    import resvg_py  # needed for the one package that has no pixels

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
    """Stage 2: three conversations about one picture, each beginning with another kind of question."""
    name, category = (NAME, thing.name), (CATEGORY, thing.category)
    wrong = generator.choice([other for other in others if other.name != thing.name])
    yes_or_no = [(YES_OR_NO.format(name=thing.name), "yes"), (YES_OR_NO.format(name=wrong.name), "no")]
    generator.shuffle(yes_or_no)
    first = [name, (KEYWORDS, ", ".join(thing.keywords))] if thing.keywords else [name]
    return [
        {"id": f"{image} {kind}", "image": image, "conversations": conversation(*rounds)}
        for kind, rounds in (("name", first), ("category", [category, name]), ("yes_no", yes_or_no))
    ]


def questions(thing: Thing, image: str, kinds: tuple[str, ...], others: list[Thing], generator: random.Random):
    """Held out: one question a record. `thing` and `kind` are for the score and mean nothing to train.py."""
    is_yes = generator.random() < 0.5
    asked = thing if is_yes else generator.choice([other for other in others if other.name != thing.name])
    rounds = {
        "name": (NAME, thing.name),
        "category": (CATEGORY, thing.category),
        "yes_no": (YES_OR_NO.format(name=asked.name), "yes" if is_yes else "no"),
    }
    for kind in kinds:
        about = {"id": f"{image} {kind}", "image": image, "thing": thing.key, "kind": kind}
        yield about | {"conversations": conversation(rounds[kind])}


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
    keys = sorted(things)
    unseen = set(generator.sample(keys, round(len(keys) * UNSEEN_SHARE)))
    by_category = {name: [t for t in things.values() if t.category == name] for name in CATEGORIES.values()}
    files = {name: [] for name in ("stage1", "stage2", "new_hand", "new_things", "photographs")}
    drawn = set()

    def keep(hand: str, name: str, picture: Image.Image) -> str:
        (output / "images" / hand).mkdir(parents=True, exist_ok=True)
        picture.save(output / "images" / hand / f"{name}.png")
        return f"{hand}/{name}.png"

    for hand, (pattern, inside) in (trained_hands | NEW_HAND).items():
        for key, picture in read_pictures(the_file(packages, pattern), inside, things):
            thing = things[key]
            if hand in NEW_HAND and thing.category == NOT_FLUENTS:
                continue
            image, others = keep(hand, key, picture), by_category[thing.category]
            if key in unseen:
                # Nobody can know the name of what was never shown; what category it is in can be seen.
                files["new_things"] += questions(thing, image, ("category",), others, generator)
            elif hand in trained_hands:
                drawn.add(key)
                files["stage1"].append(caption_record(thing, image))
                files["stage2"] += training_records(thing, image, others, generator)
            elif key in drawn:
                files["new_hand"] += questions(thing, image, ("name", "category", "yes_no"), others, generator)
    for key, name, picture in read_photographs(stamps, things) if stamps else ():
        if key in drawn:
            thing, image = things[key], keep("photographs", name, picture)
            others = by_category[thing.category]
            files["photographs"] += questions(thing, image, ("name", "category", "yes_no"), others, generator)
    for name, records in files.items():
        (output / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
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
