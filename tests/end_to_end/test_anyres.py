"""Both stages on images in tiles and several images a record: on one process, under ZeRO-3, resumed, and asked."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mini_llava.data.records import RecordStore
from mini_llava.data.templates import BadRecord
from mini_llava.formats.towers import load_vision_tower
from mini_llava.tools import doctor, export
from mini_llava.tools.saved_models import PROJECTOR, STATE, WHOLE, open_saved
from mini_llava.training.checkpoint import read_manifest
from tests.end_to_end import runs
from tests.launching import train_in_turn

pytestmark = pytest.mark.slow

IMAGES = runs.FIXTURES / "data" / "images"
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(56, 112), (168, 56), (112, 112)]"}
STEPS = {"max_steps": 4, "learning_rate": 1e-2, "global_batch_size": 4, "per_device_train_batch_size": 1}
STEPS |= {"save_steps": 2, "warmup_ratio": 0, "model_max_length": 400, **ANYRES}


# A tower of another size, trained too.
RESIZED = {"image_size": 84, "image_grid_pinpoints": "[(84, 168), (168, 168)]", "unfreeze_mm_vision_tower": True}
RESIZED |= {"max_steps": 2, "save_strategy": "no", "model_max_length": 800}
# One image of a record is interpolated, each of several is shown whole.
ONE_VISION = {"max_steps": 3, "save_strategy": "no", "export_format": "llava"}


def from_the_middle(folder) -> dict:
    return {"resume_from_checkpoint": folder / "stage2" / "checkpoint-2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records with no, one, two and three images, of which some global batches have text only; and their order."""
    folder = tmp_path_factory.mktemp("anyres")
    records = []
    for names in ([], ["wide_rgb.png"], ["tall_rgb.png", "square_rgb.png"], ["odd_rgb.png"] * 3):
        for number in range(4):
            marks = " and ".join(["<image>"] * len(names))
            turns = [("human", f"What is number {number} {marks}?"), ("gpt", f"It is {number} of {len(names)}.")]
            conversation = [{"from": role, "value": text} for role, text in turns]
            records.append({"id": f"{len(names)}-{number}", "image": names, "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "order.json").write_text(json.dumps([[0, 4, 8, 12], [1, 2, 3, 0], [5, 9, 13, 1], [6, 10, 2, 14]]))
    return folder


def held_out(folder) -> dict:
    return {"eval_data_path": folder / "data.json", "eval_image_folder": IMAGES}


def one_vision(folder) -> dict:
    return ONE_VISION | held_out(folder) | {"model_name_or_path": folder / "base"}


def command_line(folder, stage: int, name: str, **more) -> list[str]:
    values = {"data_path": folder / "data.json", "sample_order": folder / "order.json", "version": "v1"}
    return runs.flags_of(stage, folder / name, STEPS | values | more)


@pytest.fixture(scope="module")
def here(folder):
    """Stage 1, stage 2 on its projector, the same resumed from the middle, and a resized tower; in this process. And
    stage 2's model under the configuration of LLaVA-OneVision, trained on."""
    runs.train_here(command_line(folder, 1, "stage1"))
    runs.train_here(command_line(folder, 2, "stage2", pretrain_mm_mlp_adapter=folder / "stage1"))
    runs.train_here(
        command_line(folder, 2, "resumed", pretrain_mm_mlp_adapter=folder / "stage1", **from_the_middle(folder))
    )
    runs.train_here(command_line(folder, 2, "resized", **RESIZED))
    of_base = ["--export_format", "llava", "--vision_tower", str(runs.FIXTURES / "clip")]
    export.main([str(folder / "stage2"), str(folder / "base"), *of_base])
    config = json.loads((folder / "base" / "config.json").read_text()) | {"image_aspect_ratio": "anyres_max_2"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    runs.train_here(command_line(folder, 2, "one-vision", **one_vision(folder)))
    return folder


@pytest.fixture(scope="module")
def on_two(folder, here):
    """The same in two ZeRO-3 processes, resumed from the one process's checkpoint into LLaVA's layout; and LoRA."""
    projector = {"pretrain_mm_mlp_adapter": here / "stage1"}
    of_lora = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "mm_projector_lr": 1e-2}
    train_in_turn(
        runs.config_file("zero3", folder),
        [
            command_line(folder, 1, "zero3-stage1"),
            command_line(folder, 2, "zero3-stage2", **projector),
            command_line(folder, 2, "zero3-resumed", **projector, export_format="llava", **from_the_middle(folder)),
            command_line(folder, 2, "zero3-lora", **projector, **of_lora),
            command_line(folder, 2, "zero3-resized", **RESIZED, export_format="llava"),
            command_line(folder, 2, "zero3-one-vision", **one_vision(folder)),
        ],
        folder,
    )
    return folder


def weights(run) -> dict[str, torch.Tensor]:
    found = torch.load(run / "mm_projector.bin", weights_only=True)
    return found | (load_file(run / "model.safetensors") if (run / "model.safetensors").exists() else {})


def test_the_newline_is_trained_saved_and_read_again(here):
    assert read_manifest(here / "stage1" / "checkpoint-2")["parameters"]["image_newline.weight"] == [64]
    first, second = weights(here / "stage1"), weights(here / "stage2")
    assert first.keys() == {f"model.mm_projector.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")} | {
        "model.image_newline"
    }
    assert not torch.equal(first["model.image_newline"], second["model.image_newline"])
    assert torch.equal(second["image_newline"], second["model.image_newline"])
    states = [torch.load(here / "stage2" / f"checkpoint-{n}" / "mm_projector.bin", weights_only=True) for n in (2, 4)]
    moved = (states[0]["model.image_newline"] - first["model.image_newline"]).abs().max()
    assert 0 < moved < 0.03, "the second stage begins with the first one's"
    for name, kind in (("stage1", PROJECTOR), ("stage2", WHOLE), ("stage2/checkpoint-4", STATE)):
        saved = open_saved(str(here / name))
        assert saved.kind == kind and saved.source.tiling.pinpoints == ((56, 112), (168, 56), (112, 112))
        assert torch.equal(saved.load().image_newline.weight, weights(here / name.split("/")[0])["model.image_newline"])


def test_a_resumed_run_ends_with_the_same_bits(here):
    whole, resumed = weights(here / "stage2"), weights(here / "resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[line["loss"] for line in runs.log(here / name)] for name in ("stage2", "resumed")]
    assert losses[0][2:] == losses[1]


@pytest.mark.parametrize("name", ["stage1", "stage2", "resumed", "resized", "one-vision"])
def test_two_zero3_processes_train_the_same(on_two, name):
    """Also where one rank has tiles, the other text only, and all ranks text only."""
    found, expected = ([line for line in runs.log(on_two / run) if "loss" in line] for run in (f"zero3-{name}", name))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # sums in another order, over four steps
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    mine, theirs = (open_saved(str(on_two / run)).load() for run in (f"zero3-{name}", name))
    assert mine.vision_tower.image_size == theirs.vision_tower.image_size == (84 if name == "resized" else 56)
    mine, theirs = mine.state_dict(), theirs.state_dict()
    for key, tensor in theirs.items():
        rows = len(mine[key]) if tensor.dim() else None  # transformers' layout has more, for <image>
        # Adam divides by the gradient's size: rounding of the smallest ones grows to a part of the step of 1e-2.
        torch.testing.assert_close(mine[key], tensor[:rows] if rows else tensor, rtol=0, atol=1e-3, msg=key)


def test_llava_one_vision_shows_several_images_whole_in_training_and_held_out(on_two):
    for run in ("one-vision", "zero3-one-vision"):
        assert open_saved(str(on_two / run)).source.tiling.max_tiles == 2
    mine, theirs = (
        [line for line in runs.log(on_two / run) if "eval/loss" in line] for run in ("zero3-one-vision", "one-vision")
    )
    assert len(mine) == len(theirs) == 2
    for line, expected in zip(mine, theirs, strict=True):
        assert line["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)
    base = open_saved(str(on_two / "base"))
    assert base.source.tiling.tokens(IMAGES, "tall_rgb.png", several=True) == 16 + 1
    assert base.source.tiling.tokens(IMAGES, "tall_rgb.png") > 16 + 1


def test_llavas_layout_and_lora_hold_the_newline_from_partitioned_models(on_two):
    config = json.loads((on_two / "zero3-resumed" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[56, 112], [168, 56], [112, 112]]
    of_lora = torch.load(on_two / "zero3-lora" / "non_lora_trainables.bin", weights_only=True)
    lora = open_saved(str(on_two / "zero3-lora"))
    assert torch.equal(lora.load().image_newline.weight, of_lora["base_model.model.model.image_newline"])


# --- flags and tools -------------------------------------------------------------------------------------------------


def test_a_tiled_model_trains_on_as_it_is_and_contradictions_are_refused(here):
    base = {"model_name_or_path": here / "stage2", "max_steps": 1, "warmup_ratio": 0, "save_strategy": "no"}
    words = command_line(here, 2, "further", **base)
    for flag in ("--vision_tower", "--image_aspect_ratio", "--image_grid_pinpoints"):
        place = words.index(flag)
        del words[place : place + 2]
    runs.train_here(words)
    assert open_saved(str(here / "further")).source.tiling == open_saved(str(here / "stage2")).source.tiling
    for flags, sentence in (
        (["--image_aspect_ratio", "pad"], "--image_aspect_ratio pad contradicts"),
        (["--mm_patch_merge_type", "flat"], "--mm_patch_merge_type flat contradicts"),
    ):
        with pytest.raises(ValueError, match=sentence):
            runs.train_here([*words, *flags])
    plain = runs.flags_of(2, here / "plain", {"max_steps": 1, "warmup_ratio": 0, "mm_patch_merge_type": "spatial"})
    with pytest.raises(ValueError, match="spatial does nothing without --image_aspect_ratio anyres"):
        runs.train_here(plain)
    with pytest.raises(ValueError, match="trained on images in tiles: use --image_aspect_ratio anyres"):
        runs.train_here(
            runs.flags_of(
                2, here / "plain", {"max_steps": 1, "warmup_ratio": 0, "pretrain_mm_mlp_adapter": here / "stage1"}
            )
        )


def test_a_plan_knows_the_newline_and_the_resized_tower(folder, capsys):
    runs.plan_here(command_line(folder, 2, "planned", **RESIZED, num_gpus=1, gpu_memory_gib=80))
    printed = capsys.readouterr().out
    assert re.search(r"image_newline +64 +64 +full", printed) and "It fits: " in printed
    positions, width = 1 + (84 // 14) ** 2, 32
    in_tower = next(line for line in printed.splitlines() if line.split()[:1] == ["vision_tower"])
    whole = next(iter(load_vision_tower(str(runs.FIXTURES / "clip"), -2, "patch", torch.float32).children()))
    before = sum(parameter.numel() for parameter in whole.parameters())
    assert int(in_tower.split()[1].replace(",", "")) == before + (positions - 17) * width


def test_questions_about_several_images_are_answered_before_and_after_training(folder, capsys):
    asked = {"max_steps": 1, "warmup_ratio": 0, "save_strategy": "no"}
    runs.train_here(command_line(folder, 2, "asked", **asked, **held_out(folder)))
    printed = capsys.readouterr().out
    assert printed.count("16 held-out questions") == 2


def test_the_doctor_counts_as_the_trainer_does(folder, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "here.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "here.png").read_bytes()[:30])
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A picture."}]
    records = [{"image": name, "conversations": turns} for name in ("here.png", "torn.png")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["--data_path", tmp_path / "data.json", "--image_folder", tmp_path, "--output", tmp_path / "bad.jsonl"]
    words += ["--model_name_or_path", runs.FIXTURES / "llm", "--vision_tower", runs.FIXTURES / "clip"]
    words += [word for name, value in ANYRES.items() for word in (f"--{name}", value)]
    assert doctor.main([str(word) for word in words]) == 1
    [bad] = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    store = RecordStore([str(tmp_path / "data.json")], [str(tmp_path)])
    with pytest.raises(BadRecord) as error:
        runs.train_here(
            runs.flags_of(2, tmp_path / "run", STEPS | {"data_path": store.data_path[0], "image_folder": tmp_path})
        )
    assert bad["index"] == 1 and bad["reason"] in str(error.value)
