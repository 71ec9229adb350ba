"""Every recipe is read, says what was published, and takes a step with tiny stand-ins for its models and data."""

import json
import math
from pathlib import Path

import pytest
import yaml

from mini_llava import arguments as flags
from mini_llava.model.projector import build_projector, save_projector
from mini_llava.training.order import choose_batch
from tests.end_to_end import runs
from tests.launching import CONFIGS, ROOT
from tests.published_layouts import like_liuhaotian

RECIPES = {path.stem: path for path in sorted((ROOT / "mini_llava" / "recipes").glob("*.yaml"))}
VALUES = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in RECIPES.items()}


def resolved(name: str) -> flags.Arguments:
    return flags.resolve(VALUES[name]["stage"], {}, str(RECIPES[name]))


def test_all_systems_of_the_field_have_their_recipes():
    stages = ["pretrain", "finetune", "finetune-lora", "task", "task-lora"]
    expected = {f"llava-1.5-{size}-{stage}" for size in ("7b", "13b") for stage in stages}
    expected |= {f"llava-llama-3-8b-{stage}" for stage in stages[:3]} | {"llava-13b-scienceqa"}
    stages = ["1-projector", "2-resolution", "3-instruct"]
    expected |= {f"fastvlm-{size}-{stage}" for size in ("0.5b", "1.5b", "7b") for stage in stages}
    expected |= {f"qwen2-0.5b-{card}gb-{stage}" for card in (12, 24) for stage in ("pretrain", "finetune")}
    assert RECIPES.keys() == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_launched_by_the_command_at_its_head(name):
    head = RECIPES[name].read_text(encoding="utf-8").split("stage:")[0].replace("# ", "").replace("\\\n", " ")
    words = head[head.index("python -m mini_llava.launch") :].split()
    assert words[:4] == ["python", "-m", "mini_llava.launch", "--config_file"] and words[5] == "train.py"
    assert (ROOT / words[4]).parent == CONFIGS and (ROOT / words[4]).is_file()
    arguments = flags.parse_arguments(
        [word.replace("mini_llava/recipes", str(RECIPES[name].parent)) for word in words[6:]]
    )
    # One global batch on eight GPUs without accumulation, as the scripts have it; or LLaVA-1.5's on a single one.
    wanted = arguments.training.global_batch_size
    if "single_gpu" in words[4]:
        of_llava = resolved(f"llava-1.5-7b-{name.rsplit('-', 1)[1]}").training
        assert wanted == of_llava.global_batch_size and wanted % arguments.training.per_device_train_batch_size == 0
    else:
        assert choose_batch(arguments, 8) == (wanted, 1, None)
    assert arguments.training.output_dir == f"outputs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_starts_from_is_published_or_another_recipes_result(name):
    results = {f"outputs/{other}" for other in RECIPES} | {f"outputs/{other}/mm_projector.bin" for other in RECIPES}
    starts = [VALUES[name]["model_name_or_path"], VALUES[name].get("pretrain_mm_mlp_adapter")]
    for start in starts:
        assert start is None or start in results or not start.startswith("outputs"), start
        assert start is None or not start.startswith(f"outputs/{name}"), "of its own result"


def test_llavas_recipes_have_the_rates_and_batches_of_its_scripts():
    table = {
        "pretrain": ("plain", True, 1e-3, None, 256, 1, "square", False, 2048),
        "finetune": ("v1", False, 2e-5, None, 128, 1, "pad", True, 2048),
        "finetune-lora": ("v1", False, 2e-4, 2e-5, 128, 1, "pad", True, 2048),
        "task": ("v1", False, 2e-5, None, 128, 1, "pad", True, 2048),
        "task-lora": ("v1", False, 2e-4, 2e-5, 128, 1, "pad", True, 2048),
    }
    names = ("version", "tune_mm_mlp_adapter", "learning_rate", "mm_projector_lr", "global_batch_size")
    names += ("num_train_epochs", "image_aspect_ratio", "group_by_modality_length", "model_max_length")
    for stage, expected in table.items():
        small, large = (resolved(f"llava-1.5-{size}-{stage}").as_dict() for size in ("7b", "13b"))
        assert tuple(small[name] for name in names) == expected
        differing = {name for name in small if small[name] != large[name]}
        assert differing <= {"model_name_or_path", "pretrain_mm_mlp_adapter", "output_dir"}
    lora = resolved("llava-1.5-7b-finetune-lora").training
    assert (lora.lora_enable, lora.lora_r, lora.lora_alpha) == (True, 128, 256)
    science = resolved("llava-13b-scienceqa").as_dict()
    assert (science["num_train_epochs"], science["learning_rate"], science["global_batch_size"]) == (12, 2e-5, 128)


def test_fastvlm_trains_the_projector_first_and_then_all_parts():
    for size in ("0.5b", "1.5b", "7b"):
        first, second, third = (
            resolved(f"fastvlm-{size}-{stage}").model for stage in ("1-projector", "2-resolution", "3-instruct")
        )
        assert first.tune_mm_mlp_adapter and not first.unfreeze_mm_vision_tower
        for model in (second, third):
            assert model.unfreeze_mm_vision_tower
            assert not (model.tune_mm_mlp_adapter or model.freeze_backbone or model.freeze_mm_mlp_adapter)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """A LLaVA model of the published layout, and projectors between the golden tower and language model."""
    folder = tmp_path_factory.mktemp("stand-ins")
    found = {"llava": like_liuhaotian(folder / "llava")}
    for kind in ("linear", "mlp2x_gelu"):
        found[kind] = folder / kind
        found[kind].mkdir()
        save_projector(build_projector(kind, 32, 64), str(found[kind]))
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_a_step(name, stand_ins, tmp_path):
    values = VALUES[name]
    replaced = {
        "data_path": [runs.FIXTURES / "data" / f"train_stage{values['stage']}.json"] * len(values["data_path"]),
        "image_folder": [runs.FIXTURES / "data" / "images"] * len(values["data_path"]),
        "output_dir": tmp_path,
        # The batch of eight GPUs and the loader's processes take longest on a CPU.
        **{
            "max_steps": 1,
            "warmup_ratio": 0,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "dataloader_num_workers": 0,
        },
        "report_to": "none",
        "allow": "template",  # the stand-ins have a Llama tokenizer, whatever the recipe's model has
    }
    if "vision_tower" in values:  # of FastVLM too: tests/model/ has its own, where timm can be loaded
        replaced |= {"model_name_or_path": runs.FIXTURES / "llm", "vision_tower": runs.FIXTURES / "clip"}
    else:
        replaced["model_name_or_path"] = stand_ins["llava"]
    if "pretrain_mm_mlp_adapter" in values:
        replaced["pretrain_mm_mlp_adapter"] = stand_ins[values["mm_projector_type"]]
    words = ["--stage", str(values["stage"]), "--config", str(RECIPES[name])]
    for flag, value in replaced.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    runs.train_here(words)
    [line] = runs.log(tmp_path)
    assert math.isfinite(line["loss"]) and line["gradient_norm"] > 0
    ran_with = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    for flag, value in values.items():
        assert flag in replaced or ran_with[flag] == value, flag
    assert json.loads((tmp_path / "config.json").read_text())
