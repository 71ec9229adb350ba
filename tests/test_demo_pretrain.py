"""The command that made the demo's two models makes the same ones, but for the training, of which it takes a step."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel

from mini_llava import demo
from mini_llava.arguments import ModelArguments
from mini_llava.demo import pretrain
from mini_llava.formats.read import open_source

pytestmark = pytest.mark.slow  # one tokenizer and two models are made for all


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directory it has written, and what it has printed."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = "--tower_steps 2 --language_steps 1 --batch_size 8 --documents 40 --held_out_documents 40 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("sys.argv", ["pretrain", "--output", str(folder), *words.split()])
        patch.setattr("builtins.print", lambda *words, **how: printed.append(" ".join(map(str, words))))
        pretrain.main()
    return folder, "\n".join(printed)


def test_the_tokenizer_it_trains_is_the_one_that_is_shipped(made):
    ours, shipped = (folder / demo.LANGUAGE_MODEL.name for folder in (made[0], demo.HERE))
    assert json.loads((ours / "tokenizer.json").read_text()) == json.loads((shipped / "tokenizer.json").read_text())


@pytest.mark.parametrize("shipped", [demo.VISION_TOWER, demo.LANGUAGE_MODEL], ids=lambda path: path.name)
def test_its_models_have_the_shapes_of_the_shipped_ones_and_are_written_in_half_precision(made, shipped):
    load = CLIPVisionModel if shipped == demo.VISION_TOWER else AutoModelForCausalLM
    ours, theirs = (load.from_pretrained(folder).state_dict() for folder in (made[0] / shipped.name, shipped))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in ours.values())


def test_the_trainer_reads_what_it_writes(made):
    folder, _ = made
    model_flags = ModelArguments(str(folder / demo.LANGUAGE_MODEL.name), str(folder / demo.VISION_TOWER.name))
    source = open_source(model_flags)
    assert source.image_size() == pretrain.IMAGE_SIZE


def test_it_says_how_well_each_view_of_the_tower_and_each_kind_of_answer_is_known(made):
    _, printed = made
    for view in ("class token", "mean patch", "single patch"):
        shape, colour = re.search(rf"{view}: shape (\S+), color (\S+?)[;\n]", printed + "\n").groups()
        assert 0 <= float(shape) < 1 and 0 <= float(colour) < 1
    assert re.search(r"language step 1: loss \d.*; held out: captions 0\.\d+, first turns 0\.\d+, later", printed)


def test_a_document_has_an_answer_to_every_question_and_a_description_as_long_as_an_image(made):
    tokenizer = pretrain.train_tokenizer(dict(list(demo.read_questions("train").items())[:50]))
    scenes = demo.answers_by_scene(demo.read_questions("train"))
    ids, answered = pretrain.make_documents(tokenizer, scenes, 30, seed=3)
    again, _ = pretrain.make_documents(tokenizer, scenes, 30, seed=3)
    assert (ids == again).all() and ids.shape == answered.shape == (30, pretrain.MAX_TOKENS)
    for row, mask in zip(ids, answered, strict=True):
        assert mask.any() and not mask[row == 0].any()
        text = tokenizer.decode(row[mask])
        assert "USER" not in text and "blank" not in text
