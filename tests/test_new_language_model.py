"""A language model of a family that is not known here: what trains as it is, and what README's diff adds."""

import pytest
import torch

from mini_llava import build
from tests.end_to_end import runs
from tests.families import FAMILIES, write_family
from tests.model import test_packing
from tests.readme_diffs import patched

NEW = "olmo2"


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """`mini_llava/options/attention.py` with the diff that README shows."""
    return patched("options/attention", NEW, tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    family = FAMILIES["qwen_2"]._replace(config=dict(model_type=NEW), generation={})
    return write_family(family, tmp_path_factory.mktemp("model") / NEW)


def command_line(language_model, output_dir, **values) -> list[str]:
    values |= dict(model_name_or_path=language_model, version="chat_template", max_steps=2, global_batch_size=4)
    return runs.flags_of(2, output_dir, {**values, "save_strategy": "no", "warmup_ratio": 0, "learning_rate": 1e-3})


def test_it_trains_padded_as_it_is_and_packing_it_is_refused(language_model, tmp_path):
    runs.train_here(command_line(language_model, tmp_path / "run", packing=False))
    assert len(runs.log(tmp_path / "run")) == 2
    with pytest.raises(ValueError, match="Packing is not known to keep samples apart in models of type 'olmo2'"):
        runs.train_here(command_line(language_model, tmp_path / "packed", packing=True))


def test_readmes_diff_lets_it_train_packed_to_the_same_losses(attention, language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "choose_attention", attention.choose_attention)
    for packing in (True, False):
        runs.train_here(command_line(language_model, tmp_path / str(packing), packing=packing))
    packed, padded = ([entry["loss"] for entry in runs.log(tmp_path / str(packing))] for packing in (True, False))
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(padded), rtol=1e-5, atol=0)  # sums in another order


def test_the_tests_of_packing_would_compare_it(attention, monkeypatch):
    assert NEW in attention.PACKABLE
    monkeypatch.setattr(test_packing, "choose_attention", attention.choose_attention)
    test_packing.test_packed_logits_equal_those_of_each_sample_alone(NEW, {}, "sdpa")
