"""Mutated records, JSON files and images: each is accepted or named, nothing else ever leaves the reader.

The mutations are drawn from a fixed seed, so that a failure can be run again; `FUZZ_SEED` tries another one.
"""

import io
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mini_llava.data.images import ImageReader
from mini_llava.data.lengths import measure
from mini_llava.data.records import RecordStore
from mini_llava.data.samples import Samples
from mini_llava.data.templates import TEMPLATES, BadRecord
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.guards.records import RecordCheck
from mini_llava.image_files import BadImage, load_image
from mini_llava.tools.doctor import examine_records

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SEED = int(os.environ.get("FUZZ_SEED", "0"))
RECORDS, FILES, IMAGES = 10_000, 1_000, 500
TOKENS_PER_IMAGE, MAX_LENGTH = 4, 512

HOSTILE_TEXTS = [
    *("", " ", "\n", "\0", "<image>", "<image>\n<image>", "<imag", "<<image>image>", "</s>", "<s>", "<|im_end|>"),
    *("\ud800", "a\udfff", "\udc80", "\U0010ffff", "e\u0301", "\u202e", "\ufeff", "日本語", "\x1b[31m", "'\"\\"),
    *("../a.png", "/etc/passwd", "a/" * 5000, "x" * 300, "square_rgb.png", "square_rgb.png\0", "[INST]"),
    *("human", "gpt", "system", "NaN", "0x" * 700, " " * 5000, "word " * 2000),
]
HOSTILE_VALUES = [
    *(None, True, False, 0, -1, 10**400, 2**63, 1e308, float("nan"), float("-inf"), [], {}, [[]], [None], {"": {}}),
    *({"from": "human"}, {"value": "a"}, {"from": ["human"], "value": {}}, ["square_rgb.png"] * 9),
]


def valid_records():
    records = json.loads((FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
    return [
        *records[:20],
        {"id": 7, "image": "square_rgb.png", "conversations": [human, gpt]},
        {"id": "two", "image": ["square_rgb.png", "tall_rgb.png"], "conversations": [human, gpt] * 2},
        {"id": None, "conversations": [{"from": "human", "value": "Hi\u00e9"}, gpt, {"from": "human", "value": "?"}]},
    ]


SEEDS = valid_records()


def mutated(value, draw, strength):
    """A copy of a JSON value with some parts replaced, dropped, doubled, swapped or wrapped."""
    if draw.random() < strength * 0.4:
        return draw.choice([*HOSTILE_VALUES, *HOSTILE_TEXTS])
    if draw.random() < strength * 0.1:
        return [value] if draw.random() < 0.5 else {"value": value}
    if isinstance(value, dict):
        items = [
            (mutated_text(key, draw) if draw.random() < strength * 0.1 else key, mutated(part, draw, strength))
            for key, part in value.items()
            if draw.random() > strength * 0.1
        ]
        return dict(draw.sample(items, len(items)))
    if isinstance(value, list):
        parts = [mutated(part, draw, strength) for part in value if draw.random() > strength * 0.3]
        if parts and draw.random() < strength:
            parts.insert(draw.randrange(len(parts) + 1), draw.choice(parts))
        if draw.random() < strength * 0.2:
            draw.shuffle(parts)
        return parts * (200 if draw.random() < strength * 0.02 else 1)
    if isinstance(value, str) and draw.random() < strength:
        return mutated_text(value, draw)
    return value


def mutated_text(text, draw):
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(HOSTILE_TEXTS) + text[place + draw.randrange(3) :]


def mutated_bytes(content, draw, changes):
    """A copy with bytes flipped, overwritten, dropped, doubled or cut off, more often in the first hundred."""
    content = bytearray(content)
    for _ in range(changes):
        place = draw.randrange(min(len(content), 100) if draw.random() < 0.5 else len(content)) if content else 0
        length = draw.choice([1, 1, 2, 4, 16])
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place : place + length] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place : place + length] = draw.randbytes(length)
        elif kind == 5 and draw.random() < 0.3:
            del content[place:]
    return bytes(content)


def mutated_line(draw):
    """One line of JSON, or what is left of it."""
    line = json.dumps(mutated(draw.choice(SEEDS), draw, draw.choice([0.01, 0.05, 0.15])), ensure_ascii=True).encode()
    kind = draw.random()
    if kind < 0.1:
        line = mutated_bytes(line, draw, draw.randrange(1, 5)).replace(b"\n", b"")
    elif kind < 0.12:
        line = line.replace(b'"value"', b'"value": ' + b"[" * 5000 + b"]" * 5000 + b', "value"', 1)
    elif kind < 0.14:
        line = line.replace(b"{", b'{"n": ' + b"9" * 5000 + b", ", 1)
    elif kind < 0.16:
        line = line.replace(b'"from"', b'"\xed\xa0\x80"', 1)  # a surrogate written as UTF-8
    return line or b"{}"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    draw = random.Random(SEED)
    path = tmp_path_factory.mktemp("fuzz") / "records.jsonl"
    lines = [json.dumps(SEEDS[0]).encode(), *(mutated_line(draw) for _ in range(RECORDS))]
    path.write_bytes(b"\n".join(lines))
    return RecordStore([str(path)], [str(FIXTURES / "data" / "images")])


@pytest.mark.slow
@pytest.mark.parametrize("version, tokenizer", [("v1", "llama"), ("plain", "llama"), ("qwen_2", "qwen")])
def test_ten_thousand_mutated_records_are_trained_on_or_named(version, tokenizer, store):
    """`measure` lets nothing but BadRecord pass; any other exception would end it. The doctor finds the same."""
    tokenizer = load_tokenizer(FIXTURES / f"tokenizer_{tokenizer}")

    class Checked(Samples):
        def tokenize(self, index, max_length=MAX_LENGTH):
            started = time.monotonic()
            sample = super().tokenize(index, max_length)
            assert time.monotonic() - started < 5
            assert sample.input_ids.shape == sample.labels.shape and len(sample.input_ids) <= max_length
            assert (sample.input_ids == IMAGE_TOKEN_INDEX).sum() == TOKENS_PER_IMAGE * len(sample.images)
            assert ((sample.labels == sample.input_ids) | (sample.labels == IGNORE_INDEX)).all()
            return sample

    samples = Checked(store, TEMPLATES[version], tokenizer, MAX_LENGTH, ImageReader(TOKENS_PER_IMAGE), RecordCheck())
    lengths = measure(samples, 1, None)
    assert len(lengths.length) >= RECORDS
    accepted = len(lengths.length) - len(lengths.bad)
    assert accepted > (500 if version == "plain" else 2500), "mutations are too strong to test what is accepted"
    assert len(lengths.bad) > 2500, "mutations are too weak"
    found = examine_records(samples, range(len(store)))
    assert found.faults == lengths.bad and (found.length == lengths.length).all()
    for index, sentence in lengths.bad.items():
        shown = f"{store.describe(index)}: {sentence}"
        assert len(shown) < 2000 and shown.isprintable(), shown


def test_mutated_files_are_read_or_refused_with_file_and_place(tmp_path, monkeypatch):
    draw = random.Random(SEED + 1)
    for module in ("data.records", "data_file"):
        monkeypatch.setattr(f"mini_llava.{module}.CHUNK_BYTES", 4096)  # so that windows end inside elements
    array = json.dumps(SEEDS, indent=1).encode()
    lines = b"\n".join(json.dumps(record).encode() for record in SEEDS)
    deep = b"[" + b'{"a":' * 5000 + b"}" * 5000 + b"]"
    contents = [b"", b" ", b"[", b"[]", b"{", b"null", b"\xff\xfe[\0]\0", b"[1,", b"[" * 10_000, deep, deep[1:-1]]
    contents += [b"[" + b"9" * 10_000 + b"]", b"[" + b"1234567890, " * 5000 + b"1]", b"[-1.5e-7" * 9, b"[NaN]"]
    contents += [mutated_bytes(draw.choice([array, lines]), draw, draw.randrange(1, 6)) for _ in range(FILES)]
    read = refused = 0
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        started = time.monotonic()
        try:
            store = RecordStore([str(path)])
        except ValueError as error:
            assert str(path) in str(error), error
            places = (" byte ", " line ", " begins with ", " is empty", "No record")
            assert any(place in str(error) for place in places), error
            refused += 1
        else:
            for index in range(len(store)):
                try:
                    assert isinstance(store[index], dict)
                except BadRecord as error:
                    assert str(error).endswith("."), error
            read += 1
        assert time.monotonic() - started < 5, path
    assert read > 50 and refused > 50


def picture(mode, size=(61, 47)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def valid_images():
    """(suffix, bytes) of small files of every kind that data sets hold."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        *[("png", mode, {}) for mode in ("RGB", "RGBA", "P", "1", "L", "I;16")],
        *[("jpg", mode, {}) for mode in ("RGB", "CMYK", "L")],
        ("jpg", "RGB", {"progressive": True, "exif": exif}),
        *[("gif", "P", {}), ("gif", "P", {"save_all": True, "append_images": [picture("P")] * 3})],
        *[("bmp", "RGB", {}), ("bmp", "P", {}), ("webp", "RGB", {}), ("webp", "RGBA", {"lossless": True})],
        *[("tif", "RGB", {"compression": name}) for name in ("raw", "tiff_lzw", "jpeg", "tiff_deflate")],
        *[("tif", "1", {"compression": "group4"}), ("ppm", "RGB", {}), ("jp2", "RGB", {})],
    ]
    for suffix, mode, options in kinds:
        file = io.BytesIO()
        source = picture("L").convert("I").convert("I;16") if mode == "I;16" else picture(mode)
        source.save(file, Image.registered_extensions()[f".{suffix}"], **options)
        yield suffix, file.getvalue()


def test_five_hundred_mutated_images_are_read_or_named(tmp_path):
    draw = random.Random(SEED + 2)
    originals = list(valid_images())
    read = named = 0
    for number in range(IMAGES):
        suffix, content = originals[number % len(originals)]
        name = f"{number}.{suffix}"
        kind = draw.random()
        if kind < 0.2:
            content = content[: draw.randrange(len(content))]
        elif kind < 0.4:  # sizes and offsets of the header
            place = draw.randrange(8, 60)
            content = content[:place] + draw.choice([b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0"]) + content[place + 2 :]
        else:
            content = mutated_bytes(content, draw, draw.randrange(1, 12))
        (tmp_path / name).write_bytes(content)
        started = time.monotonic()
        try:
            image = load_image(tmp_path, name)
        except BadImage as error:
            assert name in str(error) and len(str(error)) < 2000
            named += 1
        else:
            assert image.mode == "RGB" and image.tobytes()
            read += 1
        assert time.monotonic() - started < 10, f"{name} took too long"
    assert read > 50 and named > 50


def test_what_other_programs_would_read_is_refused(tmp_path):
    """Pillow hands PostScript to Ghostscript, a program with a long record of holes."""
    picture("RGB").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match=r"a\.jpg' cannot be read: UnidentifiedImageError"):
        load_image(tmp_path, "a.jpg")


@pytest.mark.parametrize(
    "name", ["a\0.png", "\ud800.png", "a/" * 500_000 + "a.png", "x" * 300 + ".png", "loop/a.png", "pipe"]
)
def test_names_that_no_file_can_have_are_named_at_once(name, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path, name)
    assert time.monotonic() - started < 1 and len(str(caught.value)) < 2000 and str(caught.value).isprintable()
