"""Adapters on transformers' LLaVA: PEFT reads those that are exported, and what PEFT saves there is read here."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mini_llava.options import lora
from mini_llava.tools import chat, export
from mini_llava.tools.saved_models import LORA, open_saved
from tests.end_to_end import runs
from tests.model import test_lora
from tests.model.test_formats import PICTURE, build, load_whole, save
from tests.model.test_lora import ADAPTED, trained  # noqa: F401

IN_THE_LANGUAGE_MODEL = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ENDINGS = ["q_proj", "v_proj", "fc1"]  # of the tower's layers too
PLAIN = {"r": 4, "lora_alpha": 8}
KINDS = {
    "in the language model": PLAIN | {"target_modules": IN_THE_LANGUAGE_MODEL},
    "and the projector in full": PLAIN
    | {"target_modules": IN_THE_LANGUAGE_MODEL, "modules_to_save": ["multi_modal_projector"]},
    "by endings, in the tower too": PLAIN | {"target_modules": ENDINGS},
    "everywhere": PLAIN | {"target_modules": "all-linear", "use_rslora": True},
    "of several ranks": PLAIN
    | {
        "target_modules": ENDINGS,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"vision_tower\..*\.fc1": 3},
        "alpha_pattern": {"model.language_model.layers.0.self_attn.v_proj": 5, "fc1": 7},
    },
    "with magnitudes of their own": PLAIN | {"target_modules": IN_THE_LANGUAGE_MODEL, "use_dora": True},
    "with rows of tokens": PLAIN
    | {
        "target_modules": IN_THE_LANGUAGE_MODEL,
        "trainable_token_indices": {"embed_tokens": [7, 20], "lm_head": [7, 20]},
    },
    "in the projector": PLAIN | {"target_modules": ["linear_1", "linear_2", "q_proj"]},
}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 2e-6 of the largest logit: products are added to weights, those of the tower too, or computed beside them."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())


def logits(model) -> torch.Tensor:
    """Without the rows that transformers' layout adds for `<image>`."""
    return test_lora.logits(model)[..., :800]


@torch.no_grad()
def logits_of_transformers(whole) -> torch.Tensor:
    """Of the sequence that `logits` has."""
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(3, 33)[None]
    ids[:, 5:21] = whole.config.image_token_id
    return whole.eval()(input_ids=ids, pixel_values=pixels).logits[..., :800]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA model in transformers' layout."""
    directory = tmp_path_factory.mktemp("base") / "whole"
    save(directory, build(), version="v1")
    return directory


def saved_by_peft(directory, base, settings) -> torch.Tensor:
    """Write adapters with random values, as PEFT saves them on the base; return the logits of both."""
    torch.manual_seed(7)
    wrapped = get_peft_model(load_whole(base), LoraConfig(**settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(directory)
    return logits_of_transformers(wrapped)


def as_before_4_52(directory) -> None:
    """Rename the tensors as PEFT names them where transformers has the language model inside `language_model`."""
    tensors, renamed = load_file(directory / "adapter_model.safetensors"), {}
    for key, tensor in tensors.items():
        key = key.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
        key = key.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
        key = re.sub(r"^base_model\.model\.model\.(vision_tower|multi_modal)", r"base_model.model.\1", key)
        renamed[key.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("older", [False, True], ids=["transformers 5", "transformers 4.51"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saved_on_transformers_llava_is_read(base, kind, older, tmp_path):
    expected = saved_by_peft(tmp_path / "adapter", base, KINDS[kind])
    if older:
        as_before_4_52(tmp_path / "adapter")
        if kind == "of several ranks":
            path = tmp_path / "adapter" / "adapter_config.json"
            path.write_text(path.read_text().replace("model.language_model.layers", "language_model.model.layers"))
    assert (expected - logits_of_transformers(load_whole(base))).abs().max() > 1e-2
    saved = open_saved(str(tmp_path / "adapter"))
    assert (saved.kind, saved.version, saved.image_aspect_ratio()) == (LORA, "v1", "pad")
    assert_same(logits(saved.load(torch.float32)), expected)

    export.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merge"])
    assert_same(logits_of_transformers(load_whole(tmp_path / "merged")), expected)
    if "use_dora" in KINDS[kind]:
        with pytest.raises(SystemExit, match="vLLM does not take DoRA's adapters"):
            export.main([str(tmp_path / "adapter"), str(tmp_path / "beside"), "--adapters"])
        return
    export.main([str(tmp_path / "adapter"), str(tmp_path / "beside"), "--adapters"])
    assert_same(read_by_peft(tmp_path / "beside"), expected)


def read_by_peft(directory) -> torch.Tensor:
    whole, folder = LlavaForConditionalGeneration.from_pretrained(directory), directory / "adapter"
    return logits_of_transformers(PeftModel.from_pretrained(whole, folder))


def test_peft_reads_what_was_trained_here_with_the_trained_projector_and_tower_in_the_base(trained, tmp_path):  # noqa: F811
    directory, model = trained
    export.main([str(directory), str(tmp_path / "out"), "--adapters"])
    expected = logits(model)
    assert_same(read_by_peft(tmp_path / "out"), expected)
    without = logits_of_transformers(load_whole(tmp_path / "out"))
    assert (without - expected).abs().max() > 1e-3

    # Of what vLLM checks: only its own kinds of settings, and no module in full.
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    names = load_file(tmp_path / "out/adapter/adapter_model.safetensors").keys()
    layers = {f"model.language_model.{name.removeprefix('model.')}" for name in ADAPTED}
    assert set(config["target_modules"]) == layers and "modules_to_save" not in config
    assert names == {f"base_model.model.{name}.lora_{factor}.weight" for name in layers for factor in "AB"}
    assert config["base_model_name_or_path"] == str(tmp_path / "out")
    # And it is read here again, as any adapters of PEFT's are.
    assert_same(logits(open_saved(str(tmp_path / "out/adapter")).load(torch.float32)), expected)


def test_trained_biases_are_in_the_base(tmp_path):
    values = {"max_steps": 2, "learning_rate": 1e-2, "lora_enable": True, "lora_r": 4, "lora_bias": "all"}
    values |= {"model_name_or_path": tmp_path / "llm", "warmup_ratio": 0, "packing": False}
    model = build().language_model
    shutil.copytree(runs.FIXTURES / "llm", tmp_path / "llm")
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    biased = type(model)(type(model.config).from_pretrained(tmp_path / "llm"))
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.save_pretrained(tmp_path / "llm")
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    expected = logits(open_saved(str(tmp_path / "run")).load(torch.float32))
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--adapters"])
    assert_same(read_by_peft(tmp_path / "out"), expected)


def test_a_run_goes_on_from_them(base, tmp_path, capsys):
    saved_by_peft(tmp_path / "adapter", base, KINDS["and the projector in full"])
    values = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_weight_path": tmp_path / "adapter"}
    values |= {"max_steps": 1, "learning_rate": 0, "mm_projector_lr": 0, "allow": "learning_rate"}
    values |= {"model_name_or_path": base}
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    layers = {key.replace(".language_model.", "."): tensor for key, tensor in before.items() if "lora_" in key}
    assert layers.keys() == after.keys() and all(torch.equal(layers[key], after[key]) for key in layers)
    others = torch.load(tmp_path / "run" / "non_lora_trainables.bin", weights_only=True)
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        mine = others[f"base_model.model.model.mm_projector.{number}.weight"]
        assert torch.equal(mine, before[f"base_model.model.model.multi_modal_projector.{layer}.weight"])


REFUSED = {
    "by endings, in the tower too": ({}, "has adapters of the vision tower .*--merge makes a model"),
    "everywhere": ({}, "has adapters of the projector .*--merge makes a model"),
    "with magnitudes of their own": ({}, "has use_dora True, but --use_dora is False"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_run_does_not_go_on_from_what_it_would_not_train(base, kind, tmp_path):
    saved_by_peft(tmp_path / "adapter", base, KINDS[kind])
    model = build()
    settings = lora.TrainingArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, seed=1)
    lora.add_lora(model.language_model, "base", settings, torch.float32)
    with pytest.raises(ValueError, match=REFUSED[kind][1]):
        lora.start_from(model, tmp_path / "adapter")


def test_what_cannot_be_read_is_refused_in_a_sentence(base, tmp_path, capsys):
    saved_by_peft(tmp_path / "adapter", base, KINDS["in the language model"])

    def refused(*words) -> str:
        with pytest.raises(SystemExit) as ended:
            export.main([str(tmp_path / "adapter"), str(tmp_path / "out"), *map(str, words)])
        return str(ended.value)

    assert "is a language model" in refused("--merge", "--model_base", runs.FIXTURES / "llm", *TOWER)
    assert "no --merge" in refused("--merge", "--adapters")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    assert "has modules_to_save lm_head; of modules trained in full only the projector" in refused("--merge")
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="It has no adapters"):
        export.main([str(base), str(tmp_path / "out"), "--adapters"])
    chat.main([str(tmp_path / "adapter"), "--prompt", "What?", "--image", str(PICTURE), "--max_new_tokens", "2"])
    assert capsys.readouterr().out


TOWER = ("--vision_tower", runs.FIXTURES / "clip")
