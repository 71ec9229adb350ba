"""A tower of a kind that is not known here: what README's diff adds, and that nothing else is needed."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    MLCDVisionConfig,
    MLCDVisionModel,
)

from mini_llava.formats import towers
from mini_llava.model import vision_tower
from tests.end_to_end import runs
from tests.model.test_towers import pictures
from tests.model.tiny_towers import CROPPED, SHAPE
from tests.readme_diffs import patched

NEW = "mlcd_vision_model"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict:
    """The towers known when the diff is applied."""
    return patched("model/vision_tower", NEW, tmp_path_factory.mktemp("patched")).KINDS


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("mlcd")
    torch.manual_seed(0)
    MLCDVisionModel(MLCDVisionConfig(**SHAPE, intermediate_size=64)).save_pretrained(folder)
    CLIPImageProcessorPil(**CROPPED).save_pretrained(folder)
    return str(folder)


def test_without_it_the_tower_is_refused_with_a_sentence(tower):
    with pytest.raises(ValueError, match=r"is mlcd_vision_model. Known are clip_vision_model, "):
        towers.load_vision_config(tower)


def test_with_it_the_tower_trains_and_transformers_reads_the_result(tower, kinds, tmp_path, monkeypatch):
    monkeypatch.setitem(vision_tower.KINDS, NEW, kinds[NEW])
    read = towers.load_vision_tower(tower, -2, "patch", torch.float32)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tower).eval()(pictures(), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(read(pictures()), expected[:, 1:])

    values = dict(vision_tower=tower, unfreeze_mm_vision_tower=True, max_steps=2, global_batch_size=4)
    runs.train_here(runs.flags_of(2, tmp_path / "run", values | {"save_strategy": "no", "learning_rate": 1e-3}))
    whole, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(loading.values()), loading
    trained = dict(whole.model.vision_tower.named_parameters())
    before, unused = dict(read.model.named_parameters()), read.unused_parameters()
    assert {f"model.{name}" for name in before if torch.equal(trained[name], before[name])} == unused
