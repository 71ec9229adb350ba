"""Images in tiles: cut, counted and ordered as transformers' LlavaNext does it, and measured from headers alone."""

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from mini_llava.data.collator import join_pictures
from mini_llava.data.images import NEWLINE, ImageReader, normalisation_table, normalise
from mini_llava.data.lengths import measure
from mini_llava.data.loader import RankSteps
from mini_llava.data.records import RecordStore
from mini_llava.data.samples import Samples
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, expand_images, tokenize, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.image_files import FORMATS, image_size, load_image
from mini_llava.options.tiles import choose_tiling
from tests.launching import ROOT

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
IMAGES = FIXTURES / "data" / "images"
TILE, GRID = 56, 4
TILING = choose_tiling(TILE, GRID**2)
# Not symmetrical, so that width and height cannot be exchanged unseen.
UNEVEN = choose_tiling(TILE, GRID**2, pinpoints=f"[({TILE}, {3 * TILE}), ({2 * TILE}, {TILE}), ({4 * TILE}, {TILE})]")
TILINGS = pytest.mark.parametrize("tiling", [TILING, UNEVEN], ids=["LLaVA-1.6's", "uneven"])


def sizes(count: int) -> list[tuple[int, int]]:
    """Widths and heights: any, and those at which something changes."""
    draw = np.random.default_rng(0)
    any_sizes = [tuple(int(side) for side in draw.integers(2, 500, 2)) for _ in range(count)]
    multiples = [(width, height) for width in (55, 56, 57, 112, 168, 336) for height in (55, 56, 57, 112, 168, 336)]
    return [*any_sizes, *multiples, (1, 1), (1, 200), (200, 1), (400, 3), (3, 400)]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil.from_pretrained(FIXTURES / "clip")


def llava_next_processor(tiling) -> LlavaNextProcessor:
    settings = clip_processor().to_dict()
    del settings["image_processor_type"]
    pinpoints = [[height, width] for width, height in tiling.pinpoints]
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints),
        load_tokenizer(FIXTURES / "llm"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# --- as transformers -------------------------------------------------------------------------------------------------


@TILINGS
def test_an_image_takes_as_many_tokens_as_for_llava_next(tiling):
    of_sizes = sizes(200)
    processor = llava_next_processor(tiling)
    expected = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in of_sizes])
    assert [len(tiling.arrange(size)[0]) for size in of_sizes] == expected["num_image_tokens"]
    assert len({tiling.resolution(size) for size in of_sizes}) == len(tiling.pinpoints), "every pinpoint should occur"


@TILINGS
def test_features_come_in_the_order_of_llava_next(tiling):
    """Features that hold their own number go through transformers' own packing."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=TILE, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=None
    )
    pinpoints = [[height, width] for width, height in tiling.pinpoints]
    model = LlavaNextModel(
        LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints, image_token_index=7)
    )
    for width, height in sizes(30):
        across, down = tiling.resolution((width, height))
        tiles = 1 + (across // TILE) * (down // TILE)
        numbers = torch.arange(tiles * GRID**2, dtype=torch.float32).view(tiles, GRID**2, 1)
        [packed], _ = model.pack_image_features(
            [numbers], [[height, width]], "default", image_newline=torch.tensor([float(NEWLINE)])
        )
        assert tiling.arrange((width, height))[0].tolist() == packed.flatten().long().tolist(), (width, height)


@TILINGS
def test_the_tiles_are_those_of_llava_next_to_the_bit(tiling):
    processor, table = llava_next_processor(tiling).image_processor, normalisation_table(clip_processor())
    for size in sizes(30):
        image = picture(*size)
        found = tiling.open(image, clip_processor().resample)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert found.pixels.dtype == torch.uint8 and found.features == len(found.pixels) * GRID**2
        assert torch.equal(normalise(found.pixels, table), expected), size


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
def test_flat_and_spatial_lay_out_all_features_as_llava_does(merge_type):
    tiling = choose_tiling(TILE, GRID**2, merge_type)
    for size in sizes(20):
        columns, rows = (side // TILE for side in tiling.resolution(size))
        numbers = torch.arange((1 + rows * columns) * GRID**2)
        if merge_type == "spatial":  # row by row of the whole picture
            of_tiles = numbers[GRID**2 :].view(rows, columns, GRID, GRID)
            lines = [
                of_tiles[row, column, line] for row in range(rows) for line in range(GRID) for column in range(columns)
            ]
            numbers = torch.cat([numbers[: GRID**2], *lines])
        assert tiling.arrange(size)[0].tolist() == numbers.tolist()


def test_images_are_joined_behind_each_other_with_one_newline_for_all():
    pictures = [TILING.open(picture(*size), Image.Resampling.BICUBIC) for size in ((50, 90), (30, 30), (300, 60))]
    tiles, rows, weights = join_pictures(pictures, TILE)
    assert len(tiles) == sum(len(opened.pixels) for opened in pictures)
    total = len(tiles) * GRID**2
    start, features = 0, 0
    for opened in pictures:
        mine = rows[start : start + len(opened.order)].numpy()
        assert ((mine == total) == (opened.order == NEWLINE)).all()
        assert (mine[mine < total] == opened.order[opened.order != NEWLINE] + features).all()
        start, features = start + len(opened.order), features + opened.features
    assert start == len(rows) and rows.dtype == torch.int64 and weights is None


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name in FORMATS if name not in ("PPM", "BMP")])
def test_the_header_says_the_size_that_the_opened_image_has(kind, tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        how = {} if kind in ("GIF", "JPEG2000") else {"exif": exif}  # which hold none
        picture(50, 30).save(tmp_path / "image", format=kind, **how)
        assert image_size(tmp_path, "image") == load_image(tmp_path, "image").size
        assert (image_size(tmp_path, "image") == (30, 50)) == (orientation in (6, 8) and "exif" in how)


def test_a_png_may_say_behind_its_pixels_that_it_lies_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(50, 30).save(tmp_path / "before.png", exif=exif)
    content = (tmp_path / "before.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    iend = content.index(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(content[:start] + content[end:iend] + content[start:end] + content[iend:])
    for name in ("before.png", "behind.png"):
        assert image_size(tmp_path, name) == load_image(tmp_path, name).size == (30, 50)


# --- records ---------------------------------------------------------------------------------------------------------

# 34 tokens, 16 for the whole and 18 for what the tiles show of it, and 16 + 20.
SMALL, TALL = "square_rgb.png", "tall_rgb.png"


def record(images: list[str], question: str, answer: str = "It is red.") -> dict:
    return {"image": images, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def textual():
    return dict(template=get_template("v1"), tokenizer=load_tokenizer(FIXTURES / "llm"))


def tiled(store: RecordStore, textual: dict) -> Samples:
    image_reader = ImageReader(GRID**2, clip_processor(), "anyres", TILE, TILING)
    return Samples(store, max_length=500, image_reader=image_reader, **textual)


def of_fixture(name: str) -> int:
    return TILING.tokens(IMAGES, name)


def test_each_image_of_a_record_has_its_own_number_of_tokens_in_its_own_place(textual):
    to_sample = partial(tokenize, tokens_per_image=partial(TILING.tokens, IMAGES), max_length=500, **textual)
    names = [TALL, SMALL, "wide_rgb.png"]
    assert len({of_fixture(name) for name in names}) == 3
    sample = to_sample(record(names, "First <image> then <image><image> what?"))
    one_each = tokenize(
        record(names, "First <image> then <image><image> what?"), tokens_per_image=1, max_length=500, **textual
    )
    places = np.flatnonzero(one_each.input_ids == IMAGE_TOKEN_INDEX)
    expected = np.insert(
        one_each.input_ids, np.repeat(places, [of_fixture(name) - 1 for name in names]), IMAGE_TOKEN_INDEX
    )
    assert sample.input_ids.tolist() == expected.tolist() and sample.images == names
    assert (sample.labels != IGNORE_INDEX).sum() == (one_each.labels != IGNORE_INDEX).sum()


def test_a_cut_keeps_whole_images_only(textual):
    """Two images in a row are told apart although nothing stands between them."""
    names = [SMALL, TALL, SMALL]
    turns = [("human", "What?"), ("gpt", "Red."), ("human", "<image><image> And this?"), ("gpt", "Blue. " * 3)]
    turns += [("human", "And <image>?"), ("gpt", "It is blue.")]
    long = {"image": names, "conversations": [{"from": role, "value": text} for role, text in turns]}
    to_sample = partial(tokenize, tokens_per_image=partial(TILING.tokens, IMAGES), **textual)
    whole = to_sample(long, max_length=1000)
    first_trained = int(np.argmax(whole.labels != IGNORE_INDEX))
    kept = set()
    for cut in range(first_trained + 1, len(whole.input_ids) + 1):
        sample = to_sample(long, max_length=cut)
        length = len(sample.input_ids)
        assert length <= cut and sample.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert sample.images == names[: len(sample.images)]
        assert (sample.input_ids == IMAGE_TOKEN_INDEX).sum() == sum(map(of_fixture, sample.images))
        if length < cut:  # shorter than it might be, because of an image
            assert whole.input_ids[length] == IMAGE_TOKEN_INDEX
        kept.add(len(sample.images))
    assert kept == {0, 1, 2, 3}


def test_a_prompt_is_the_beginning_of_its_sample(textual):
    asked = record([SMALL, TALL], "<image> or <image>?")
    ids = expand_images(tokenize_prompt(asked, **textual), [of_fixture(SMALL), of_fixture(TALL)])
    sample = tokenize(asked, tokens_per_image=partial(TILING.tokens, IMAGES), max_length=500, **textual)
    assert ids.tolist() == sample.input_ids[: len(ids)].tolist()


def test_lengths_are_measured_without_opening_an_image_and_images_put_in_place_later_are_found(
    textual, tmp_path, monkeypatch
):
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    for name, size in (("a.png", (50, 90)), ("b.png", (300, 60))):
        picture(*size).save(images / name)
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:20])
    names = [["a.png"], ["b.png", "a.png"], [], ["torn.png"], ["gone.png"]]
    records = [record(of_record, "<image>" * len(of_record) + "What?") for of_record in names]
    (tmp_path / "data.json").write_text(json.dumps(records))
    store = RecordStore([str(tmp_path / "data.json")], [str(images)])
    samples = tiled(store, textual)
    assert (
        samples.measurement_key()
        != replace(samples, image_reader=replace(samples.image_reader, tiling=UNEVEN)).measurement_key()
    )

    lengths = measure(samples, 1, cache)
    assert lengths.length[:3].tolist() == [len(samples.tokenize(index).input_ids) for index in range(3)]
    assert list(lengths.bad) == [3, 4] and not lengths.length[3:].any()
    tiles = {name: len(TILING.open(load_image(images, name), Image.Resampling.BICUBIC).pixels) for name in names[1]}
    assert tiles["a.png"] > 1 and lengths.pictures[:3].tolist() == [tiles["a.png"], sum(tiles.values()), 0]
    assert lengths.has_image.tolist() == [True, True, False, True, True]  # also where it is not known how many
    assert "cannot be read" in lengths.bad[3] and "'gone.png' is not in the image folder" in lengths.bad[4]

    picture(70, 70).save(images / "gone.png")
    looked_at, tokenized = [], Samples.tokenize
    monkeypatch.setattr(Samples, "tokenize", lambda self, index: looked_at.append(index) or tokenized(self, index))
    again = measure(samples, 1, cache)
    assert looked_at == [3, 4], "only what was unknown is looked at again"
    assert list(again.bad) == [3] and again.length[4] == len(samples.tokenize(4).input_ids)
    assert again.pictures[4] == len(TILING.open(picture(70, 70), Image.Resampling.BICUBIC).pixels)
    without = replace(samples, store=RecordStore(store.data_path))
    assert "no --image_folder is given" in measure(without, 1, None).bad[0]


def test_an_image_that_is_replaced_while_it_is_read_is_a_bad_sample(textual, tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps([record([SMALL], "<image>What?")]))
    store = RecordStore([str(tmp_path / "data.json")], [str(IMAGES)])
    samples = tiled(store, textual)
    tall = samples.image_reader.open(IMAGES, TALL)
    monkeypatch.setattr(ImageReader, "open", lambda self, folder, name, several: tall)
    [(index, sentence)] = RankSteps(samples, True, "skip")[[[0]]].skipped
    assert index == 0 and "has changed its size since it was measured" in sentence


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pinpoints": "[(100, 56)]"}, "100x56 is not made up of tiles of the vision tower's 56 pixels"),
        ({"pinpoints": "1x1 to 6x6"}, r"expected a list of widths and heights"),
        ({"pinpoints": "[]"}, r"expected a list of widths and heights"),
        ({"pinpoints": [(56 * 65, 56)]}, "65 tiles; at most 64"),
        ({"tokens_per_tile": 17}, "17, not a square number"),
        ({"merge_type": "spatial_pad"}, "--mm_patch_merge_type spatial_pad: known values are flat, spatial"),
    ],
)
def test_what_makes_no_tiling_is_refused_with_the_reason(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose_tiling(**{"tile_size": TILE, "tokens_per_tile": GRID**2} | given)


def test_a_range_of_grids_is_written_as_llava_one_vision_does():
    tiling = choose_tiling(TILE, GRID**2, pinpoints="(1x1),...,(2x3)")
    grids = [(width // TILE, height // TILE) for width, height in tiling.pinpoints]
    assert grids == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


# --- LLaVA-OneVision's, whose large grids are interpolated -----------------------------------------------------------

ONE_VISION = choose_tiling(TILE, GRID**2, pinpoints="(1x1),...,(3x4)", max_tiles=2)


def height_first(tiling) -> list[list[int]]:
    return [[height, width] for width, height in tiling.pinpoints]


def one_vision_processor() -> LlavaOnevisionImageProcessorPil:
    settings = clip_processor().to_dict() | {"size": {"height": TILE, "width": TILE}, "do_center_crop": False}
    del settings["image_processor_type"], settings["crop_size"]
    return LlavaOnevisionImageProcessorPil(**settings, image_grid_pinpoints=height_first(ONE_VISION))


def test_an_image_takes_as_many_tokens_as_for_llava_one_vision():
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)  # __init__ needs torchvision, for videos
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=height_first(ONE_VISION))
    processor.num_image_tokens, processor.vision_aspect_ratio = GRID**2, "anyres_max_2"
    seen = set()
    for width, height in sizes(300):
        order, weights = ONE_VISION.arrange((width, height))
        assert len(order) == processor._get_number_of_features(height, width, TILE, TILE), (width, height)
        seen.add((ONE_VISION.resolution((width, height)), weights is not None))
    assert {resolution for resolution, _ in seen} == set(ONE_VISION.pinpoints)
    assert {interpolated for _, interpolated in seen} == {True, False}


@pytest.mark.parametrize(("max_tiles", "interpolates"), [(None, False), (2, True), (7, True), (8, False), (9, False)])
def test_a_plan_knows_whether_any_image_is_interpolated(max_tiles, interpolates):
    """Nine tiles are 1.13 times as many as seven on a side, and 1.06 times as many as eight."""
    tiling = choose_tiling(TILE, 3**2, pinpoints="(1x1),...,(3x3)", max_tiles=max_tiles)
    assert tiling.interpolates == interpolates == (tiling.arrange((3 * TILE, 3 * TILE))[1] is not None)


def test_a_strip_that_is_interpolated_keeps_a_column():
    """LLaVA-OneVision's code fails at it, asked for a size of 0."""
    strips = choose_tiling(TILE, 3**2, pinpoints=[(TILE, 40 * TILE)], max_tiles=1)
    order, weights = strips.arrange((1, 200))
    features, newlines = (order >= 9).all(axis=1).sum(), (order == NEWLINE).all(axis=1).sum()
    assert weights is not None and features == newlines > 0


def test_features_are_joined_and_interpolated_as_by_llava_one_vision():
    """Random features go through transformers' own packing, and those of all pictures at once through ours."""
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaOnevisionConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=TILE, patch_size=14),
        text_config=LlamaConfig(vocab_size=8, **vision, pad_token_id=None),
        image_grid_pinpoints=height_first(ONE_VISION),
        image_token_index=7,
    )
    model, newline = LlavaOnevisionModel(config), torch.randn(8)
    of_sizes = sizes(30)
    pictures = [ONE_VISION.open(picture(*size), Image.Resampling.BICUBIC) for size in of_sizes]
    features = [torch.randn(len(opened.pixels), GRID**2, 8) for opened in pictures]
    [*packed], counts = model.pack_image_features(features, [size[::-1] for size in of_sizes], newline, "anyres_max_2")
    assert counts.tolist() == [opened.tokens for opened in pictures]

    _, rows, weights = join_pictures(pictures, TILE)
    table = torch.cat([*(of_image.flatten(0, 1) for of_image in features), newline[None]])
    found = (table[rows] * weights[..., None]).sum(1)
    torch.testing.assert_close(found, torch.cat(packed), rtol=0, atol=5e-6)  # where to interpolate, rounded in fp32


def test_the_tiles_are_those_of_llava_one_vision_to_the_bit():
    processor, table = one_vision_processor(), normalisation_table(clip_processor())
    for size in sizes(30):
        image = picture(*size)
        found = ONE_VISION.open(image, clip_processor().resample)
        assert torch.equal(normalise(found.pixels, table), processor(image, return_tensors="pt")["pixel_values"][0])


def test_several_images_of_a_record_are_shown_whole_as_by_llava_one_vision(tmp_path):
    """In tokens, pixels to the bit and the order of features, one newline at the end; a record's only one in tiles."""
    reader = ImageReader(GRID**2, clip_processor(), "anyres", TILE, ONE_VISION)
    table, one_vision = normalisation_table(clip_processor()), one_vision_processor()
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)  # __init__ needs torchvision, for videos
    processor.image_processor, processor.image_token = one_vision, "*"
    processor.num_image_tokens, processor.vision_aspect_ratio = GRID**2, "anyres_max_2"
    processor.vision_feature_select_strategy = "full"
    for first, second in itertools.pairwise(sizes(30)):
        images = [picture(*first), picture(*second)]
        inputs = one_vision([images, images[:1]], return_tensors="pt")
        assert inputs["batch_num_images"].tolist() == [2, 1]
        for place, image in enumerate([*images, images[0]]):
            name, several = f"{place}.png", place < 2
            image.save(tmp_path / name)
            opened = reader.open(tmp_path, name, several)
            expected = inputs["pixel_values"][place]
            assert torch.equal(normalise(opened.pixels, table), expected[: len(opened.pixels)]), image.size
            assert not expected[len(opened.pixels) :].any()  # filled up to the most tiles
            tokens = len(processor.replace_image_token(inputs, place))
            assert opened.tokens == reader.tokens(tmp_path, name, several) == tokens
            assert len(opened.pixels) == reader.tiles(tmp_path, name, several)
            if several:
                assert opened.order.tolist() == [*range(GRID**2), NEWLINE] and opened.weights is None


def test_llava_1_6_splits_each_of_several_images():
    assert not TILING.shows_whole(several=True)
    assert TILING.tokens(IMAGES, TALL, several=True) == TILING.tokens(IMAGES, TALL) > GRID**2 + 1


def test_a_record_that_is_truncated_to_one_of_its_images_shows_it_whole(textual, tmp_path):
    turns = [("human", "<image> What?"), ("gpt", "Red. " * 30), ("human", "<image> And this?"), ("gpt", "Blue.")]
    long = {"image": [SMALL, TALL], "conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "data.json").write_text(json.dumps([long, record([TALL], "<image> What?")]))
    store = RecordStore([str(tmp_path / "data.json")], [str(IMAGES)])
    samples = tiled(store, textual)
    samples = replace(samples, image_reader=replace(samples.image_reader, tiling=ONE_VISION))
    assert samples[0].images == [SMALL, TALL] and [p.tokens for p in samples[0].pictures] == [GRID**2 + 1] * 2
    second = np.flatnonzero(samples[0].input_ids == IMAGE_TOKEN_INDEX)[GRID**2 + 1]
    samples = replace(samples, max_length=int(second) + 5)
    assert samples[0].images == [SMALL] and [p.tokens for p in samples[0].pictures] == [GRID**2 + 1]
    lengths = measure(samples, 1, None)
    assert lengths.pictures.tolist() == [1, ONE_VISION.tiles(IMAGES, TALL)] and not lengths.bad
    assert lengths.length.tolist() == [len(samples[index].input_ids) for index in range(2)]
