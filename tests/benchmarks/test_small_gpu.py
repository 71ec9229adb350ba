"""The recipes for one small GPU are planned as their heads say; what needs a GPU is not run here."""

import re

import pytest

from benchmarks import small_gpu
from mini_llava import arguments as flags
from mini_llava.tools import memory
from tests.launching import ROOT


@pytest.fixture(scope="module")
def configurations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_gpu")
    small_gpu.make_configurations(folder)
    return folder


def test_every_recipe_has_the_table_at_its_head():
    files = {recipe.name: ROOT / "mini_llava" / "recipes" / f"{recipe.name}.yaml" for recipe in small_gpu.RECIPES}
    tables = {file.read_text(encoding="utf-8").split("#   recipe")[1].split("#\n")[0] for file in files.values()}
    assert len(tables) == 1
    assert re.findall(r"qwen2-\S+", tables.pop()) == list(files)


def test_the_flags_are_the_recipes_but_for_models_and_data(configurations):
    for recipe in small_gpu.RECIPES:
        arguments = flags.parse_arguments(small_gpu.words_of(recipe, configurations))
        assert arguments.stage == recipe.stage
        published = flags.resolve(
            recipe.stage, {}, str(ROOT / "mini_llava" / "recipes" / f"{recipe.name}.yaml")
        ).as_dict()
        differing = {name for name, value in arguments.as_dict().items() if published[name] != value}
        assert differing <= {
            *("model_name_or_path", "vision_tower", "data_path", "image_folder", "output_dir", "use_liger_kernel"),
            *("save_strategy", "logging_steps", "version", "pretrain_mm_mlp_adapter", "report_to"),
        }


@pytest.mark.slow
def test_the_heads_say_what_is_planned_and_that_is_what_was_measured(configurations, monkeypatch):
    monkeypatch.setattr(memory, "torch_groups_heads", lambda: False)  # torch 2.11, as measured
    for recipe in small_gpu.RECIPES:
        values = small_gpu.planned(recipe, configurations)
        head = (ROOT / "mini_llava" / "recipes" / f"{recipe.name}.yaml").read_text(encoding="utf-8")
        [numbers] = re.findall(rf"#   {recipe.name}" + 4 * r" +([\d.]+)", head)
        needed, card, peak, measured = map(float, numbers)
        assert values["fits"] and card == small_gpu.CARD_GIB[recipe.card]
        assert values["planned"] == pytest.approx(needed, abs=0.2)
        assert values["planned_peak"] == pytest.approx(peak, abs=0.1)
        assert peak == pytest.approx(measured, rel=0.03)  # as of the larger models in test_memory.py
        assert small_gpu.row(recipe, values | {"peak": 1.0, "samples_per_second": 2.0}).endswith("| 1.0 | 2.0 |")
