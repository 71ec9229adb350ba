"""LoRA directories: merged they compute what was trained, PEFT reads them, LLaVA's are read, nothing is half-read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from mini_llava import build as building
from mini_llava.arguments import TrainingArguments, resolve
from mini_llava.errors import UserError
from mini_llava.formats.towers import load_vision_tower
from mini_llava.formats.write import Description
from mini_llava.model.llava import LlavaModel
from mini_llava.model.projector import build_projector
from mini_llava.options import lora
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.forked_runs import start
from tests.launching import train_in_turn
from tests.model.test_formats import build, save, tied_language_model, tokenizer

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
SETTINGS = TrainingArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, seed=1)
ADAPTED = {
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory, model in memory) of three steps with LoRA and the tower trained too."""
    directory, kept, load = tmp_path_factory.mktemp("lora") / "run", [], building.load_llava
    values = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-2, "global_batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        # The real model; the test keeps hold of it.
        patch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        runs.train_here(runs.flags_of(2, directory, {**LORA, **values, "unfreeze_mm_vision_tower": True}))
    return directory, kept[0].eval()


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "cache")))


@torch.no_grad()
def logits(model: LlavaModel) -> torch.Tensor:
    """Of a sequence with the image of a fixed noise in it."""
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(3, 33)[None]
    embeddings = model.embed(ids, pixels, torch.arange(5, 21))
    return model.language_model(inputs_embeds=embeddings, use_cache=False).logits


def load_merged(directory: Path, dtype: torch.dtype, base: str | None = None) -> LlavaModel:
    return open_saved(str(directory), base).load(dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-6 of the largest logit: merged and unmerged differ in the order of fp32 sums alone."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


# --- what gets adapters ----------------------------------------------------------------------------------------------


def test_every_linear_layer_of_the_language_model_but_the_head_gets_an_adapter_and_nothing_else_does():
    model = build()
    before = logits(model)
    lora.add_lora(model.language_model, "base", SETTINGS, torch.float32)
    assert set(lora.adapters(model.language_model)) == ADAPTED
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "language_model" not in name]
    assert torch.equal(logits(model), before), "a new adapter adds nothing"


def test_new_adapters_depend_on_the_seed_alone():
    models = [build() for _ in range(2)]
    for model, drawn in zip(models, (0, 5), strict=True):
        torch.rand(drawn)
        lora.add_lora(model.language_model, "base", SETTINGS, torch.float32)
    first, second = (dict(model.language_model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("all", 6), ("lora_only", 6)])
def test_biases_are_trained_saved_and_merged_where_asked_for(tmp_path, bias, count):
    model = build(language_model=tied_language_model())  # Qwen 2 has biases in three layers of each block
    base = tmp_path / "base"
    model.language_model.save_pretrained(base)
    lora.add_lora(model.language_model, str(base), replace(SETTINGS, lora_bias=bias), torch.float32)
    trained = {name: p for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("bias") for name in trained) == count
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_directory(tmp_path / "lora", model)
    merged = load_merged(tmp_path / "lora", torch.float32).language_model.state_dict()
    for name, layer in lora.adapters(model.language_model).items():
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")  # PEFT's own product
        torch.testing.assert_close(merged.pop(f"{name}.weight"), weight.detach())
    for name, tensor in model.language_model.state_dict().items():
        if "lora_" not in name and not name.endswith("base_layer.weight"):
            assert torch.equal(merged.pop(name.replace("base_layer.", "")), tensor)
    assert not merged


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_of_lora_merge_into_what_was_trained_and_peft_reads_them(tmp_path, variant):
    kept, load = [], building.load_llava
    values = LORA | {variant: True, "max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0, "global_batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        runs.train_here(runs.flags_of(2, tmp_path, values))
    expected = logits(kept[0].eval())
    if variant == "use_dora":
        magnitudes = {n: p for n, p in kept[0].language_model.named_parameters() if "lora_magnitude_vector" in n}
        assert len(magnitudes) == len(ADAPTED) and all(p.requires_grad for p in magnitudes.values())
    merged = load_merged(tmp_path, torch.float32)
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    merged.language_model = PeftModel.from_pretrained(base, tmp_path).eval()
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=f"has {variant} True, but --{variant} is False"):
        runs.train_here(runs.flags_of(2, tmp_path / "on", values | {"lora_weight_path": tmp_path, variant: False}))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["self_attn.q_proj", "model.layers.1.self_attn.v_proj"]])
def test_adapters_stand_beside_the_layers_that_are_named(tmp_path, targets):
    values = LORA | {"lora_target_modules": targets, "max_steps": 2, "global_batch_size": 8, "learning_rate": 1e-2}
    runs.train_here(runs.flags_of(2, tmp_path, values))
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    chosen = {name for name in ADAPTED if any(name.endswith(target) for target in targets)}
    assert layers == {f"base_model.model.{name}" for name in chosen} and len(chosen) == (
        4 if len(targets[0]) == 6 else 3
    )
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == chosen
    merged = load_merged(tmp_path, torch.float32).language_model.state_dict()
    base = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32).state_dict()
    changed = {name.removesuffix(".weight") for name in base if not base[name].equal(merged[name])}
    assert changed == chosen


@pytest.mark.parametrize("target, said", [("q_prj", "known are q_proj"), ("lm_head", "all but the head"),
                                          ("vision_tower", "--lora_vision_tower True adds")])  # fmt: skip
def test_a_target_that_is_no_layer_of_the_language_model_is_refused(tmp_path, target, said):
    with pytest.raises(ValueError, match=f"--lora_target_modules {target}: .*{said}"):
        runs.train_here(runs.flags_of(2, tmp_path, LORA | {"lora_target_modules": ["v_proj", target]}))


def test_all_linear_is_the_default():
    model = build().language_model
    assert lora.adapted_layers(model, ["all-linear"]) == lora.adapted_layers(model, None) == lora.linear_layers(model)


def save_directory(directory: Path, model: LlavaModel) -> None:
    tower = str(runs.FIXTURES / "clip")
    lora.save_lora(directory, model, Description("mlp2x_gelu", tower, "pad", 512, tokenizer=tokenizer()))


# --- what is done with a directory -----------------------------------------------------------------------------------


def test_result_and_checkpoint_merge_into_what_was_trained(trained):
    directory, model = trained
    expected = logits(model)
    merged = load_merged(directory, torch.float32)
    assert_same(logits(merged), expected)
    assert_same(logits(load_merged(directory / "checkpoint-3", torch.float32)), expected)
    assert type(merged.language_model).__name__ == "LlamaForCausalLM"
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    # Adapters and tower were worth training: without them it is another function.
    assert (logits(build()) - expected).abs().max() > 1e-2


def test_merged_it_is_a_model_of_transformers(trained, tmp_path):
    directory, model = trained
    save(tmp_path, load_merged(directory, torch.float32))
    whole, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(3, 33)[None]
    ids[:, 5:21] = whole.config.image_token_id
    with torch.no_grad():
        found = whole.eval()(input_ids=ids, pixel_values=pixels).logits[..., :800]
    assert_same(found, logits(model))


def test_merging_rounds_once(trained):
    directory, _ = trained
    exact, rounded = (load_merged(directory, dtype).state_dict() for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def test_peft_reads_the_adapter_onto_the_plain_language_model(trained):
    directory, model = trained
    plain = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    read = PeftModel.from_pretrained(plain, directory).eval()
    mine = {f"base_model.model.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    theirs = read.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        assert torch.equal(read(ids, use_cache=False).logits, model.language_model(ids, use_cache=False).logits)


def llavas_directory(directory: Path) -> LlavaModel:
    """A LoRA directory as LLaVA's training writes it: PEFT's own wrapper, short target names, pickles, no tokenizer."""
    torch.manual_seed(5)
    language_model = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    short = sorted({name.rsplit(".")[-1] for name in ADAPTED})
    wrapped = get_peft_model(language_model, LoraConfig(r=2, lora_alpha=6, target_modules=short, task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tower = load_vision_tower(str(runs.FIXTURES / "clip"), -2, "patch", torch.float32)
    model = LlavaModel(tower, build_projector("mlp2x_gelu", 32, 64), language_model).eval()

    wrapped.peft_config["default"].base_model_name_or_path = str(runs.FIXTURES / "llm")
    wrapped.save_pretrained(directory)
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    others = {f"base_model.model.model.mm_projector.{name}": p for name, p in model.projector.state_dict().items()}
    torch.save(others, directory / "non_lora_trainables.bin")
    config = json.loads((runs.FIXTURES / "llm" / "config.json").read_text()) | {
        "model_type": "llava_llama",
        "mm_vision_tower": str(runs.FIXTURES / "clip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return model


def test_a_directory_of_llavas_own_is_read(tmp_path):
    model = llavas_directory(tmp_path)
    assert_same(logits(load_merged(tmp_path, torch.float32)), logits(model))


def test_what_is_written_has_llavas_names_and_shapes(trained, tmp_path):
    llavas_directory(tmp_path)
    theirs = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert load_file(trained[0] / "adapter_model.safetensors").keys() == theirs.keys()
    theirs = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    mine = torch.load(trained[0] / "non_lora_trainables.bin", weights_only=True)
    assert {name: t.shape for name, t in mine.items() if "mm_projector" in name} == {
        n: t.shape for n, t in theirs.items()
    }
    tower = [name for name in mine if "mm_projector" not in name]
    assert tower and all(
        name.startswith("base_model.model.model.vision_tower.vision_tower.vision_model.") for name in tower
    )


def test_the_directory_says_what_it_is(trained):
    for directory in (trained[0], trained[0] / "checkpoint-3"):
        adapter = json.loads((directory / "adapter_config.json").read_text())
        assert set(adapter["target_modules"]) == ADAPTED
        assert adapter["base_model_name_or_path"] == str(runs.FIXTURES / "llm")
        config = json.loads((directory / "config.json").read_text())
        assert config["model_type"] == "llava_llama" and config["unfreeze_mm_vision_tower"] is True
        assert (directory / "tokenizer.json").is_file()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(directory: Path, base: Path | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_merged(directory, torch.float32, base and str(base))
    return str(caught.value)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "non_lora_trainables.bin"])
@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_tensor_that_is_missing_surplus_or_of_another_shape_is_named(copied, file, change):
    path = copied / file
    weights = load_file(path) if file.endswith("safetensors") else torch.load(path, weights_only=True)
    key = next(iter(weights))
    if change == "missing":
        del weights[key]
    elif change == "surplus":
        key = key.replace("lora_A", "lora_C").replace("mm_projector.0", "mm_projector.4")
        weights[key] = torch.zeros(3)
    else:
        weights[key] = torch.zeros(3, 7)
    save_file(weights, path) if file.endswith("safetensors") else torch.save(weights, path)
    sentence = refused(copied)
    name = key.removeprefix("base_model.model.").removeprefix("model.mm_")
    assert str(path) in sentence and name in sentence
    assert change != "shape" or "[3, 7]" in sentence


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "non_lora_trainables.bin", "adapter_config.json", "config.json"]
)
def test_a_missing_file_is_named(copied, file):
    (copied / file).unlink()
    assert file in refused(copied)


def test_the_wrong_base_is_named_with_its_differences(copied, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    with torch.no_grad():
        other.get_input_embeddings().weight[7] += 0.1
    other.save_pretrained(tmp_path / "same shapes")
    assert "other word embeddings" in refused(copied, tmp_path / "same shapes")
    wider = tied_language_model()
    wider.save_pretrained(tmp_path / "wider")
    assert "intermediate_size 128 there, 96 here" in refused(copied, tmp_path / "wider")


IN_TOWER = LORA | {"lora_vision_tower": True, "lora_dropout": 0, "max_steps": 3, "save_steps": 2, "warmup_ratio": 0}
IN_TOWER |= {"learning_rate": 1e-2, "global_batch_size": 8, "per_device_train_batch_size": 2}


def changed_in_tower(directory: Path) -> set[str]:
    """Names of the tower's weights that differ from those of the tower that it was trained from."""
    before = load_vision_tower(str(runs.FIXTURES / "clip"), -2, "patch", torch.float32).model.state_dict()
    after = load_merged(directory, torch.float32).vision_tower.model.state_dict()
    return {name for name in before if not before[name].equal(after[name])}


@pytest.fixture(scope="module")
def in_tower(tmp_path_factory):
    """(directory, model in memory) of three steps with adapters in the tower too."""
    directory, kept, load = tmp_path_factory.mktemp("in_tower") / "run", [], building.load_llava
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        runs.train_here(runs.flags_of(2, directory, IN_TOWER))
    return directory, kept[0].eval()


def test_adapters_in_the_tower_stand_where_its_features_come_from_and_are_saved_as_its_weights(in_tower):
    directory, model = in_tower
    layers = set(lora.adapters(model.vision_tower.model))
    linear = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"}
    numbers = range(model.vision_tower.model.config.num_hidden_layers - 1)  # the last one is behind the features
    assert {name.partition("layers.")[2] for name in layers} == {
        f"{number}.{name}" for number in numbers for name in linear
    }
    assert changed_in_tower(directory) == {f"{name}.weight" for name in layers}
    assert_same(logits(load_merged(directory, torch.float32)), logits(model))


def test_a_run_with_adapters_in_the_tower_goes_on_and_another_starts_from_it(in_tower, tmp_path):
    directory, _ = in_tower
    on = IN_TOWER | {"resume_from_checkpoint": directory / "checkpoint-2"}
    runs.train_here(runs.flags_of(2, tmp_path / "on", on))
    start_from = IN_TOWER | {"lora_weight_path": directory, "learning_rate": 0, "allow": "learning_rate"}
    runs.train_here(runs.flags_of(2, tmp_path / "next", start_from | {"max_steps": 1, "mm_projector_lr": 0}))
    before, resumed, following = (
        torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        for folder in (directory, tmp_path / "on", tmp_path / "next")
    )
    assert all(before[name].equal(resumed[name]) and before[name].equal(following[name]) for name in before)


def test_dora_in_the_tower_merges_into_what_was_trained(tmp_path):
    kept, load = [], building.load_llava
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        runs.train_here(runs.flags_of(2, tmp_path, IN_TOWER | {"use_dora": True, "save_strategy": "no"}))
    expected = logits(kept[0].eval())
    assert (logits(load_merged(tmp_path, torch.float32)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_adapters_in_the_tower_under_zero3_are_those_of_one_process(in_tower, tmp_path):
    flags = runs.flags_of(2, tmp_path / "two", IN_TOWER | {"save_strategy": "no"})
    train_in_turn(runs.config_file("zero3", tmp_path), [flags], tmp_path)
    expected, found = ([line["loss"] for line in runs.log(folder)] for folder in (in_tower[0], tmp_path / "two"))
    assert found == pytest.approx(expected, rel=1e-5)  # sums of fp32 in another order, through three steps of 1e-2
    one, two = (
        torch.load(folder / "non_lora_trainables.bin", weights_only=True) for folder in (in_tower[0], tmp_path / "two")
    )
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-3 for name in one)  # of 3e-2 that Adam moves a weight at most


def test_adapters_in_a_tower_that_is_trained_in_full_are_a_contradiction():
    with pytest.raises(UserError, match="--unfreeze_mm_vision_tower trains the tower in full"):
        resolve(2, IN_TOWER | {"unfreeze_mm_vision_tower": True, "model_name_or_path": "m", "data_path": ["d"]})


def test_an_adapter_of_another_kind_is_refused(copied):
    path = copied / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    assert "peft_type IA3" in refused(copied)


# --- further runs ----------------------------------------------------------------------------------------------------


def test_another_run_starts_from_a_lora_directory(trained, tmp_path):
    values = {
        **LORA,
        "lora_weight_path": trained[0],
        "max_steps": 1,
        "global_batch_size": 4,
        "learning_rate": 0,
        "allow": "learning_rate",
        "mm_projector_lr": 0,
    }
    runs.train_here(runs.flags_of(2, tmp_path / "run", values | {"unfreeze_mm_vision_tower": True}))
    for file in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        before, after = (d / file for d in (trained[0], tmp_path / "run"))
        read = load_file if file.endswith("safetensors") else lambda path: torch.load(path, weights_only=True)
        before, after = read(before), read(after)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="has r 4, but --lora_r is 8"):
        runs.train_here(runs.flags_of(2, tmp_path / "other", values | {"lora_r": 8}))


QUANTISED = {**LORA, "lora_dropout": 0, "max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0}
QUANTISED |= {"global_batch_size": 8, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def losses_of_one(tmp_path_factory):
    """By bits, of a run on one process."""
    folder = tmp_path_factory.mktemp("quantised")
    for bits in (4, 8):
        runs.train_here(runs.flags_of(2, folder / str(bits), QUANTISED | {"bits": bits}))
    return {bits: [line["loss"] for line in runs.log(folder / str(bits))] for bits in (4, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_quantised_runs_on_two_processes_have_the_losses_of_one(tmp_path, backend, losses_of_one):
    lines = [runs.flags_of(2, tmp_path / str(bits), QUANTISED | {"bits": bits}) for bits in (4, 8)]
    train_in_turn(None if backend == "ddp" else runs.config_file(backend, tmp_path), lines, tmp_path)
    for bits, expected in losses_of_one.items():
        # The order of fp32 sums differs; the weights are the same 4 or 8 bits.
        found = [line["loss"] for line in runs.log(tmp_path / str(bits))]
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_dora_is_refused_under_zero3(tmp_path):
    words = runs.flags_of(2, tmp_path / "run", LORA | {"use_dora": True, "max_steps": 1})
    run = start(words, tmp_path / "printed.txt", runs.config_file("zero3", tmp_path))
    assert run.wait() != 0 and "--use_dora needs the whole weight of each layer" in run.text
    assert "zero2.yaml" in run.text.splitlines()[-1]
    assert "peak learning rate" not in run.text, "the model was loaded"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_adapters_learn_and_merge_into_the_unquantised_base(tmp_path, bits):
    values = {**LORA, "bits": bits, "max_steps": 4, "global_batch_size": 8, "learning_rate": 1e-2}
    runs.train_here(runs.flags_of(2, tmp_path, values))
    losses = [line["loss"] for line in runs.log(tmp_path)]
    assert losses[-1] < losses[0] - 0.05
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert logits(load_merged(tmp_path, torch.float32)).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_evaluated_without_dropout_and_its_gradients_are_the_same_after_it(
    tmp_path, monkeypatch, bits
):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # see tests/end_to_end/test_evaluation
    kept, load = [], building.load_llava
    monkeypatch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
    values = {**LORA, "lora_dropout": 0.5, "bits": bits, "max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0}
    runs.train_here(runs.flags_of(2, tmp_path, values | {"global_batch_size": 4, "save_strategy": "no"}))
    model = kept[0]

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)  # the same dropout
        model.zero_grad()
        model.language_model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name])

    embeddings = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    before = gradient()
    with_dropout = logits(model)
    assert not torch.equal(with_dropout, logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model)) and not torch.equal(logits(model), with_dropout)
    model.train()
    assert before.norm() > 0 and torch.equal(gradient(), before)
